/**
 * What keeps a device module from being imported, as a ConfigError: whose file, which line, what to do. Node tells the place of an
 * error in many ways, and of a syntax error in JavaScript not at all.
 */
import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { findPackageJSON } from 'node:module'
import { extname } from 'node:path'
import { pathToFileURL } from 'node:url'
import { ConfigError, DeviceError } from '../device/errors.ts'
import { errorText, pathOf, placeOf, shownPath } from './module-failure.ts'
import type { ImportedFiles } from './module-hooks.ts'
import type { ModuleAddress } from './module-load.ts'

/** How long Node may take to find the place of a syntax error, in milliseconds. */
const CHECK_LIMIT_MS = 10_000

interface Place {
  readonly file: string
  /** `device.ts:3:9` */
  readonly place: string
  /** The line itself. */
  readonly text: string
}

/** What Node says of `import`, `export`, `import.meta` and `await` in CommonJS, but also of mistakes in ES modules. */
const ESM_IN_COMMONJS = / outside a module$|^Unexpected token 'export'$|^await is only valid in /

export function loadError(
  error: unknown,
  { specifier, base, shown }: ModuleAddress,
  files: ImportedFiles
): ConfigError {
  if (error instanceof ConfigError) return error
  const { code = '', message } = error as NodeJS.ErrnoException
  const failed = (where: string, problem: string, fix: string): ConfigError =>
    new ConfigError('ERR_DEVICE_MODULE', where, problem, fix, { cause: error })
  if (code === 'ERR_MODULE_NOT_FOUND' && files.module === undefined) {
    const problem = `no package of that name is installed in ${pathOf(base)}`
    return failed(shown, problem, `Install it (npm install ${specifier}), or give a path: ./${specifier}.`)
  }
  const missing = /^Cannot find (module|package) '(.*)' imported from (.*?)$/m.exec(message)
  if (code === 'ERR_MODULE_NOT_FOUND' && missing !== null) {
    const [, kind, name = '', importer = ''] = missing
    const what = kind === 'package' ? name : shownPath(name)
    const fix = kind === 'package' ? `Install it: npm install ${name}.` : 'Write its name with the extension.'
    return failed(shownPath(pathOf(importer)), `it imports ${what}, which is not there`, fix)
  }
  if (code === 'ERR_UNSUPPORTED_NODE_MODULES_TYPE_STRIPPING') {
    const file = /"(file:.*?)"/.exec(message)?.[1]
    const fix = 'Build the package to JavaScript, or give the path of a copy outside.'
    const where = file === undefined ? shown : shownPath(pathOf(file))
    return failed(where, 'it is TypeScript inside node_modules, which Node does not run', fix)
  }
  if (error instanceof SyntaxError) {
    const found = placeInStack(error.stack ?? '') ?? checkedPlace(files)
    const line = found === undefined || found.text === '' ? '' : ` The line is: ${found.text}`
    const where = found?.place ?? shown
    if (found !== undefined && ESM_IN_COMMONJS.test(message) && isCommonJs(found.file))
      return failed(
        where,
        'it is written as an ES module (import, export), and Node takes it for CommonJS',
        `${toEsm(found.file)}${line}`
      )
    if (code !== 'ERR_UNSUPPORTED_TYPESCRIPT_SYNTAX')
      return failed(where, `SyntaxError: ${message}`, `Correct it.${line}`)
    const fix = `Node removes types and compiles nothing: write it without.${line}`
    return failed(where, message, fix)
  }
  if (error instanceof DeviceError) {
    // defineDevice says for itself what is wrong.
    const fix = 'Adapt the module, or install the virtiod that it was written for.'
    return new ConfigError(error.code, placeOf(error) ?? shown, message, fix, { cause: error })
  }
  const text = `it failed while it was loaded: ${errorText(error)}`
  return failed(placeOf(error) ?? shown, text, 'Correct the module.')
}

/**
 * What Node puts in front of the stack of a syntax error: `FILE:3`, some lines, and a line with carets below the one that is
 * meant, if it knows the column.
 */
function placeInStack(stack: string): Place | undefined {
  const lines = stack.split('\n')
  const head = /^((?:file:|\/).*):(\d+)$/.exec(lines[0] ?? '')
  if (head === null) return undefined
  const carets = lines.findIndex((line, index) => index >= 2 && /^\s*\^+\s*$/.test(line))
  const column = carets < 0 ? '' : `:${lines[carets]!.indexOf('^') + 1}`
  const text = (carets < 0 ? lines[1] : lines[carets - 1]) ?? ''
  const file = pathOf(head[1]!)
  return { file, place: `${shownPath(file)}:${head[2]}${column}`, text: text.trim() }
}

/** For JavaScript: asks a Node of its own for each file, the latest first. */
function checkedPlace(files: ImportedFiles): Place | undefined {
  for (const url of [...files.local].reverse()) {
    const { status, stderr } = spawnSync(process.execPath, ['--check', pathOf(url)], {
      encoding: 'utf8',
      timeout: CHECK_LIMIT_MS,
    })
    if (status !== 0) return placeInStack(stderr)
  }
  return undefined
}

/** It is CommonJS whatever is in it. Of others Node looks at the syntax. */
function isCommonJs(file: string): boolean {
  if (/\.c[jt]s$/.test(file)) return true
  const found = /\.[jt]s$/.test(file) ? findPackageJSON(pathToFileURL(file)) : undefined
  if (found === undefined) return false
  return (JSON.parse(readFileSync(found, 'utf8')) as { type?: unknown }).type === 'commonjs'
}

function toEsm(file: string): string {
  const extension = extname(file)
  const ending = `the ending ${extension.endsWith('ts') ? '.mts' : '.mjs'}.`
  if (extension.startsWith('.c')) return `Give it ${ending}`
  return `Write "type": "module" into its package.json, or give it ${ending}`
}
