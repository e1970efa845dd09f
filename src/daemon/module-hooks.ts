/**
 * How the imports of a device module resolve on its thread: `virtiod` and what it exports are this running virtiod's own
 * files, whatever is installed where the module lies, so that its classes and ours are the same; `valibot` is ours when
 * the module has none. It knows which local files were imported, for `--watch`. It runs on module threads only.
 */
import { readFileSync } from 'node:fs'
import { type ResolveHookContext, registerHooks } from 'node:module'
import { fileURLToPath } from 'node:url'
import { isOurs, pathOf } from './module-failure.ts'

/** What to import for the module itself. */
export const MODULE_SPECIFIER = 'virtiod:module'

const isSource = import.meta.url.endsWith('.ts')
/** The checkout, or dist/ of the package. */
const root = new URL('../../', import.meta.url).href
const packageFile = new URL('package.json', isSource ? root : new URL('../', root))

type NextResolve = (specifier: string, context?: Partial<ResolveHookContext>) => { url: string }

export interface ImportedFiles {
  /** The URL of the module itself, when it was found. */
  readonly module: string | undefined
  /** URLs of the module and of the local files that it imports; those in node_modules and virtiod's own are not there. */
  readonly local: ReadonlySet<string>
}

/**
 * @param specifier the module: a file URL, or the name of a package
 * @param base the directory where a package is looked for, as a URL with a final slash
 */
export function installModuleHooks(specifier: string, base: string): ImportedFiles {
  const own = ownExports()
  const local = new Set<string>()
  let module: string | undefined
  registerHooks({
    resolve: (asked, context, nextResolve) => {
      const resolved = resolve(asked, context, nextResolve as NextResolve)
      if (asked === MODULE_SPECIFIER) module = resolved.url
      if (isLocal(resolved.url)) local.add(resolved.url)
      return resolved
    },
  })
  return {
    local,
    get module() {
      return module
    },
  }

  function resolve(asked: string, context: ResolveHookContext, next: NextResolve): { url: string } {
    if (asked === MODULE_SPECIFIER) return next(specifier, { ...context, parentURL: base })
    const file = own.get(asked)
    if (file !== undefined) return next(target(file, context), context)
    try {
      return next(asked, context)
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      const missing = code === 'ERR_MODULE_NOT_FOUND' || code === 'MODULE_NOT_FOUND'
      if (!missing || (asked !== 'valibot' && !asked.startsWith('valibot/'))) throw error
      return next(target(import.meta.resolve(asked), context), context)
    }
  }
}

/** A file as `import` or `require` wants it: the latter knows no URLs. */
function target(url: string, { conditions }: ResolveHookContext): string {
  return conditions.includes('require') ? fileURLToPath(url) : url
}

/** What package.json exports, as the files of this process: `virtiod/device` → `file:///…/src/device/index.ts`. */
function ownExports(): Map<string, string> {
  const { name, exports } = JSON.parse(readFileSync(packageFile, 'utf8')) as {
    name: string
    exports: Record<string, string | { default: string }>
  }
  const files = new Map<string, string>()
  for (const [subpath, target] of Object.entries(exports)) {
    if (typeof target === 'string') continue
    const file = new URL(target.default.replace('./dist/', './'), root).href
    files.set(name + subpath.slice(1), isSource ? file.replace(/\.js$/, '.ts') : file)
  }
  return files
}

function isLocal(url: string): boolean {
  return url.startsWith('file:') && !url.includes('/node_modules/') && !isOurs(pathOf(url))
}
