/** Looks at a device module on a thread that ends right after it: what it is, and whether it takes the options. */
import { Worker } from 'node:worker_threads'
import { ConfigError } from '../device/errors.ts'
import { moduleUrl } from '../engine/module-url.ts'
import { type PortableError, revived } from '../engine/portable.ts'
import { errorText, placeOf } from './module-failure.ts'
import type { ModuleAddress } from './module-load.ts'
import type { Described } from './module-messages.ts'
import type { GivenOptions } from './module-options.ts'

/** `workerData` of the thread. */
export interface DescribeData {
  readonly address: ModuleAddress
  /** Unset: options are not checked. */
  readonly given: GivenOptions | undefined
}

export type DescribeResult = { readonly described: Described } | { readonly error: PortableError }

/** How long a module may take until its top level is through, in milliseconds. */
export const LOAD_LIMIT_MS = 20_000

/** @throws ConfigError naming what is wrong with the module or the options */
export async function describe(data: DescribeData): Promise<Described> {
  const { shown } = data.address
  const worker = new Worker(moduleUrl(new URL('./module-describe-main.ts', import.meta.url)), { workerData: data })
  let timer: NodeJS.Timeout | undefined
  try {
    const result = await new Promise<DescribeResult>((resolve, reject) => {
      worker.once('message', resolve)
      worker.once('error', (error) =>
        reject(moduleError(placeOf(error) ?? shown, `it failed while it was loaded: ${errorText(error)}`))
      )
      worker.once('exit', (code) =>
        reject(moduleError(shown, `it ended its thread while it was loaded (exit code ${code})`))
      )
      timer = setTimeout(() => reject(loadTimeout(shown)), LOAD_LIMIT_MS)
    })
    if ('error' in result) throw revived(result.error)
    return result.described
  } finally {
    clearTimeout(timer)
    await worker.terminate()
  }
}

/** The top level of a module waits for something, or never ends. */
export function loadTimeout(shown: string): ConfigError {
  return moduleError(shown, `it is not loaded after ${LOAD_LIMIT_MS / 1000} s`)
}

function moduleError(where: string, problem: string): ConfigError {
  return new ConfigError('ERR_DEVICE_MODULE', where, problem, 'Correct the module.')
}
