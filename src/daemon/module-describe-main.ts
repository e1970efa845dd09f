/** The entry of a thread that only looks at a device module: what it is, and whether it takes these options. */
import { parentPort, workerData } from 'node:worker_threads'
import { portable } from '../engine/portable.ts'
import type { DescribeData, DescribeResult } from './module-describe.ts'
import { describeModule } from './module-guest.ts'
import { loadModule } from './module-load.ts'

const { address, given } = workerData as DescribeData

async function describe(): Promise<DescribeResult> {
  try {
    return { described: describeModule(await loadModule(address), given).described }
  } catch (error) {
    return { error: portable(error) }
  }
}

parentPort!.postMessage(await describe())
// Whatever the module has started already.
process.exit()
