/**
 * Puts a new version of a device's module in the place of the one that serves, under running guests. Whatever is wrong
 * with the new one, the old one serves on; an old one that is stuck is ended. It must not know what a session is, nor why
 * it is time to reload.
 */
import { DeviceError } from '../device/errors.ts'
import { StillInFlight } from '../vhost-user/rehosting.ts'
import type { Logger } from './log.ts'
import type { ModuleDevice } from './module-device.ts'
import type { ModuleInstance } from './module-instance.ts'
import { shapeDifference } from './module-shape.ts'
import { within } from './within.ts'

/** Who serves the device. */
export interface ReloadServer {
  /** As {@link DeviceServer.exchange}. */
  exchange(swap: () => Promise<void>, limitMs: number): Promise<void>
  /** As {@link DeviceServer.replaced}. */
  replaced(device: ModuleDevice): void
  configChanged(): void
}

/** How long guests wait for what is in flight, and then for each step of the exchange. In milliseconds. */
export const RELOAD_LIMIT_MS = 5000

/** With how little of that one that blocks its thread already has to do: it may be about to answer. In milliseconds. */
const LAST_LIMIT_MS = 500

/** The old version neither serves nor stops: it was ended, and the module starts again as after a crash. */
export class StuckVersion extends DeviceError {
  constructor(problem: string) {
    const message = `${problem}, and its files have changed: it is ended without its state, and starts again`
    super('ERR_DEVICE_STUCK', message)
  }
}

/**
 * Resolves to how long guests had to wait, in milliseconds.
 * @param imported told of the files of the new version, also when it can't be loaded
 * @throws an Error that says what is wrong: the old version serves on, or is started again when that is not possible;
 * StuckVersion, which was told to who serves the device
 */
export async function reloadModule(
  device: ModuleDevice,
  server: ReloadServer,
  log: Logger,
  imported: (urls: readonly string[]) => void
): Promise<number> {
  const next = await device.load(imported)
  try {
    const { shape } = device.instance
    refuse(shapeDifference(shape, { ...shape, ...next.described.shape }))
  } catch (error) {
    await next.terminate()
    throw error
  }
  return exchange(device, server, log, next)
}

async function exchange(
  device: ModuleDevice,
  server: ReloadServer,
  log: Logger,
  next: ModuleInstance
): Promise<number> {
  const from = performance.now()
  const config = Buffer.from(device.config())
  let old = device.instance
  let failure: { readonly error: unknown } | undefined
  try {
    const limitMs = Math.max(LAST_LIMIT_MS, RELOAD_LIMIT_MS - device.blockingMs)
    await server.exchange(async () => {
      old = device.instance
      failure = await device.whileReplaced(() => swap(device, old, next, log))
      server.replaced(device)
    }, limitMs)
  } catch (error) {
    failure = { error }
  }
  const pauseMs = performance.now() - from
  if (!config.equals(device.config())) server.configChanged()
  const { instance } = device
  // Whichever of the two it is not any more.
  await Promise.all([old, next].filter((one) => one !== instance).map((one) => one.terminate()))
  if (failure === undefined) return pauseMs
  if (!(failure.error instanceof StillInFlight) || instance !== old) throw failure.error
  const stuck = stuckVersion(device, failure.error.message)
  await instance.kill(stuck)
  // It need not wait for another change.
  device.changed()
  throw stuck
}

function stuckVersion({ blockingMs }: ModuleDevice, problem: string): StuckVersion {
  if (blockingMs === 0) return new StuckVersion(problem)
  return new StuckVersion(`it has blocked its thread for ${Math.round(blockingMs / 1000)} s`)
}

/**
 * Returns what kept the new one from serving; the old one has been opened again then.
 * @throws when nothing has happened, or when there is neither of them any more
 */
async function swap(
  device: ModuleDevice,
  old: ModuleInstance,
  next: ModuleInstance,
  log: Logger
): Promise<{ readonly error: unknown } | undefined> {
  const state = await stateOf(device, old)
  try {
    await shut(old)
  } catch (error) {
    // With its threads goes what it still holds.
    log.warn({ err: error }, `the old version of the module was not closed as it should: ${(error as Error).message}`)
    await old.terminate()
  }
  try {
    await begin(device, next, state)
    refuse(shapeDifference(old.shape, next.shape))
    device.adopt(next)
    return undefined
  } catch (error) {
    // What it has opened may be what the old one needs.
    await shut(next).catch(() => {})
    await next.terminate()
    try {
      await begin(device, old, state)
    } catch (cause) {
      await device.startOver(cause)
      throw error
    }
    return { error }
  }
}

/** @throws an Error that says what helps, if no change of the file does */
async function stateOf(device: ModuleDevice, old: ModuleInstance): Promise<Uint8Array> {
  const late = new StillInFlight(`saveState() has not returned after ${RELOAD_LIMIT_MS / 1000} s`)
  try {
    return (await within(old.call({ kind: 'saveState' }), RELOAD_LIMIT_MS, late)) as Uint8Array
  } catch (cause) {
    if (cause === late) {
      const stuck = stuckVersion(device, late.message)
      // The rings can't go on there.
      await device.startOver(stuck)
      device.changed()
      throw stuck
    }
    if (old.ended) throw cause
    const message = `${(cause as Error).message}. As long as the version that serves cannot save its state, only a restart loads another`
    throw new DeviceError('ERR_DEVICE_FAILED', message, { cause })
  }
}

async function begin(device: ModuleDevice, instance: ModuleInstance, state: Uint8Array): Promise<void> {
  await limited(device.openInstance(instance), 'open()')
  await limited(instance.call({ kind: 'loadState', state }), 'loadState()')
}

/** Closes the device, and leaves its threads: it may be opened again. */
async function shut(instance: ModuleInstance): Promise<void> {
  instance.abort()
  await limited(instance.call({ kind: 'close' }), 'close()')
}

function limited<T>(work: Promise<T>, what: string): Promise<T> {
  return within(work, RELOAD_LIMIT_MS, `${what} has not returned after ${RELOAD_LIMIT_MS / 1000} s`)
}

function refuse(difference: string | undefined): void {
  if (difference === undefined) return
  throw new DeviceError('ERR_DEVICE_SHAPE', `the driver can't be moved to another device: ${difference}`)
}
