/** From what an operator says about a device module to its part of a {@link DaemonConfig}. The module is looked at on a thread that ends right after. */
import { isAbsolute, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import * as v from 'valibot'
import { API_VERSION, type DeviceDefinition } from '../device/index.ts'
import type { DeviceConfig } from './config.ts'
import { describe } from './module-describe.ts'
import { pathOf, shownPath } from './module-failure.ts'
import type { ModuleAddress } from './module-load.ts'
import type { Described } from './module-messages.ts'
import type { GivenOptions } from './module-options.ts'

export interface AskedModule {
  /** A path or a file URL, or the name of a package. */
  readonly module: string
  /** Where relative paths begin and packages are looked for. */
  readonly directory: string
  readonly given: GivenOptions
  readonly watch: boolean
}

/** @throws ConfigError naming file and line, or option, and what was expected */
export async function configuredModule(
  asked: AskedModule
): Promise<Pick<DeviceConfig, 'definition' | 'options'> & Required<Pick<DeviceConfig, 'module'>>> {
  const address = moduleAddress(asked.module, asked.directory)
  const described = await describe({ address, given: asked.given })
  const { values, qemu } = described
  const { file: _, ...given } = asked.given
  return {
    definition: describedDefinition(described),
    options: values,
    module: { address, given: { ...given, values, text: false }, watch: asked.watch, ...(qemu && { qemu }) },
  }
}

/** @param module as in {@link AskedModule} */
export function moduleAddress(module: string, directory: string): ModuleAddress {
  const base = pathToFileURL(`${resolve(directory)}/`).href
  const isPath = isAbsolute(module) || /^\.{1,2}(\/|$)|^file:|\.[cm]?[jt]s$/.test(module)
  if (!isPath) return { specifier: module, base, shown: module }
  const path = module.startsWith('file:') ? pathOf(module) : resolve(directory, module)
  return { specifier: pathToFileURL(path).href, base, shown: shownPath(path) }
}

/** What the control thread has instead of the module's own definition, which is never here. */
function describedDefinition({ shape }: Described): DeviceDefinition {
  const names = shape.options.map(({ name }) => [name, v.exactOptional(v.unknown())] as const)
  return {
    ...shape,
    apiVersion: API_VERSION,
    queueModule: new URL(shape.queueModule),
    options: v.strictObject(Object.fromEntries(names)),
    open: () => {
      throw new Error('a module is opened on a thread of its own')
    },
  }
}
