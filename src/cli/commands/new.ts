/** `virtiod new NAME`: a starting point for a device, with tests. The files are in new-files.ts. */
import { existsSync, mkdirSync, readdirSync, readFileSync, realpathSync, statSync, writeFileSync } from 'node:fs'
import { basename, dirname, join, relative, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { shellQuote } from '../../daemon/qemu-args.ts'
import { ConfigError } from '../../device/errors.ts'
import type { Command } from '../command.ts'
import { EXIT_OK } from '../exit-codes.ts'
import { newFiles } from './new-files.ts'

/** npm's limit is 214. */
const MAX_NAME = 64

export const newCommand: Command = {
  name: 'new',
  description:
    'Write a starting point for a device of your own: a small device that works, tests of it, and what npm and TypeScript ' +
    'need. Nothing is installed, and no file is overwritten.',
  usage: ['NAME [DIRECTORY]'],
  positionals: [
    { name: 'NAME', description: 'what the device is called: lower-case letters, digits, dashes' },
    { name: 'DIRECTORY', description: 'where to write it (default: NAME, here); it is created', optional: true },
  ],
  scopes: [],
  run: async ({ positionals }) => {
    const [name = '', directory = name] = positionals
    checkName(name)
    const target = resolve(directory)
    const files = newFiles({ name, virtiod: dependency(target) })
    write(target, files)
    process.stdout.write(nextSteps(name, target, Object.keys(files)))
    return EXIT_OK
  },
}

/** @throws ConfigError ERR_NEW_NAME */
function checkName(name: string): void {
  if (/^[a-z][a-z0-9]*(-[a-z0-9]+)*$/.test(name) && name.length <= MAX_NAME && name !== 'node-modules') return
  const fix =
    `Give lower-case letters, digits and single dashes, a letter first, at most ${MAX_NAME}; ` +
    'a second word says the directory.'
  throw new ConfigError('ERR_NEW_NAME', 'NAME', `"${name}" can't be the name of a device`, fix)
}

/** @throws ConfigError ERR_NEW_DIRECTORY */
function write(target: string, files: Readonly<Record<string, string>>): void {
  const refuse = (problem: string, fix: string, cause?: unknown): ConfigError =>
    new ConfigError('ERR_NEW_DIRECTORY', target, problem, fix, cause === undefined ? {} : { cause })
  try {
    makeDirectory(target)
    if (readdirSync(target).length > 0) throw refuse('the directory is not empty', 'Give another name or directory.')
    // None of them is there; a file that somebody made this moment stays what it is.
    for (const [name, text] of Object.entries(files)) writeFileSync(join(target, name), text, { flag: 'wx' })
  } catch (cause) {
    if (cause instanceof ConfigError) throw cause
    const { code } = cause as NodeJS.ErrnoException
    throw refuse(`cannot be written (${code})`, 'Give a directory that you may write to.', cause)
  }
}

/** One by one: mkdir's `recursive` never returns where the file system refuses with ENOENT, as /proc does. */
function makeDirectory(path: string): void {
  if (statSync(path, { throwIfNoEntry: false })?.isDirectory() === true) return
  makeDirectory(dirname(path))
  mkdirSync(path)
}

function nextSteps(name: string, target: string, files: readonly string[]): string {
  const checkout = import.meta.url.endsWith('.ts') ? packageRoot() : undefined
  const here = relative(process.cwd(), target)
  const lines = [
    `${here === '' ? 'Here' : `${here}/`} has ${files.join(', ')}.`,
    '',
    'Next:',
    '',
    // A checkout runs without being built, but who imports it needs what is published.
    ...(checkout === undefined || existsSync(join(checkout, 'dist', 'src', 'testing', 'index.js'))
      ? []
      : [`  npm --prefix ${shellQuote(checkout)} run build`]),
    ...(here === '' ? [] : [`  cd ${shellQuote(here)}`]),
    '  npm install && npm test',
    `  npx virtiod device ./device.ts --socket-path ${name}.sock --watch`,
    '',
  ]
  return lines.join('\n')
}

/** The package's file lies above src/cli/commands/ in a checkout and above dist/src/cli/commands/ in a package. */
function packageRoot(): string {
  const here = dirname(fileURLToPath(import.meta.url))
  return resolve(here, import.meta.url.endsWith('.ts') ? '../../..' : '../../../..')
}

/**
 * What package.json says of virtiod: the version where it is one of the project's packages; otherwise (a checkout, an installation for the
 * whole machine) this very virtiod, which may be in no registry.
 */
function dependency(target: string): string {
  const root = packageRoot()
  const above = dirname(dirname(root))
  const own = basename(dirname(root)) === 'node_modules' && !relative(above, target).startsWith('..')
  if (!own) return `file:${relative(realPath(target), root)}`
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string }
  return `^${version}`
}

/** npm takes a relative path from where the directory really is. */
function realPath(path: string): string {
  return existsSync(path) ? realpathSync(path) : join(realPath(dirname(path)), basename(path))
}
