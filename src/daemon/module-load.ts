/**
 * Imports a device module on a thread of its own and checks what it is. Everything that can be wrong with it is a
 * ConfigError that names file, line and what was expected. It must not open the device.
 */
import { existsSync } from 'node:fs'
import { ConfigError } from '../device/errors.ts'
import { API_VERSION, type DeviceDefinition } from '../device/index.ts'
import { moduleUrl } from '../engine/module-url.ts'
import { definitionProblems } from './module-check.ts'
import { pathOf, shownPath } from './module-failure.ts'
import { type ImportedFiles, installModuleHooks, MODULE_SPECIFIER } from './module-hooks.ts'
import { loadError } from './module-load-error.ts'

/** Which module. */
export interface ModuleAddress {
  /** A file URL, or the name of a package. */
  readonly specifier: string
  /** The directory where a package is looked for, as a URL with a final slash. */
  readonly base: string
  /** For messages: what was asked for. */
  readonly shown: string
}

export interface LoadedModule {
  readonly definition: DeviceDefinition
  /** Of the module's file. */
  readonly url: string
  readonly files: ImportedFiles
}

/** Once per thread. @param files tells what was imported, also when it fails @throws ConfigError */
export async function loadModule(
  address: ModuleAddress,
  files: ImportedFiles = installModuleHooks(address.specifier, address.base)
): Promise<LoadedModule> {
  const { specifier, shown } = address
  if (specifier.startsWith('file:') && !existsSync(pathOf(specifier))) {
    const fix = 'Give the path of a device module, or the name of an installed package.'
    throw new ConfigError('ERR_DEVICE_MODULE', shown, 'there is no such file', fix)
  }
  try {
    const definition = checkedDefinition((await import(MODULE_SPECIFIER)) as Record<string, unknown>, shown)
    if (definition.queueModule !== undefined) await checkQueueModule(definition.queueModule)
    return { definition, url: files.module!, files }
  } catch (error) {
    throw loadError(error, address, files)
  }
}

/** Before a ring needs it: whatever is wrong with it is told at once, and no driver waits for its import. @throws ConfigError */
async function checkQueueModule(asked: URL): Promise<void> {
  const { href } = moduleUrl(asked)
  const wrong = (problem: string): ConfigError => {
    const fix = 'Correct queueModule, or write createQueueHandler beside it and leave it away.'
    return new ConfigError('ERR_DEVICE_DEFINITION', shownPath(pathOf(asked.href)), problem, fix)
  }
  if (href.startsWith('file:') && !existsSync(pathOf(href))) throw wrong('there is no such queueModule')
  const { createQueueHandler } = (await import(href)) as { createQueueHandler?: unknown }
  if (typeof createQueueHandler !== 'function') throw wrong('it does not export the function createQueueHandler')
}

function checkedDefinition(exports: Record<string, unknown>, shown: string): DeviceDefinition {
  const definition = exports['default']
  if (definition === undefined) {
    const names = Object.keys(exports)
    throw definitionError(shown, `it has no default export${names.length === 0 ? '' : `, only ${names.join(', ')}`}`)
  }
  const { apiVersion } = (definition ?? {}) as { apiVersion?: unknown }
  if (typeof apiVersion === 'number' && apiVersion !== API_VERSION) {
    const problem = `it is written for version ${apiVersion} of the device contract, and this virtiod has version ${API_VERSION}`
    const fix = 'Adapt the module, or install the virtiod that it was written for.'
    throw new ConfigError('ERR_DEVICE_API_VERSION', shown, problem, fix)
  }
  const problems = definitionProblems(definition)
  if (problems.length > 0) throw definitionError(shown, `its default export is no device: ${problems.join('; ')}`)
  return definition as DeviceDefinition
}

function definitionError(shown: string, problem: string): ConfigError {
  const fix = 'Write "export default defineDevice({ … })", with defineDevice of virtiod/device.'
  return new ConfigError('ERR_DEVICE_DEFINITION', shown, problem, fix)
}
