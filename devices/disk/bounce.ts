/**
 * Aligned buffers for O_DIRECT where the guest's are not aligned, and for what has to be looked at or made up on the
 * way; and a buffer of zeroes. One set per iothread, shared by all its queues of disks; a request that finds none free
 * waits its turn.
 */
import type { Chain, DeviceIo, IoBuffer } from '../../src/device/index.ts'

/** Bytes per bounce buffer; a larger request goes through it in pieces. */
export const BOUNCE_SIZE = 128 * 1024
const BOUNCE_COUNT = 16
/** Bytes of the buffer of zeroes. */
export const ZEROES = 1024 * 1024

/** Who waits for a buffer. */
export interface BounceUser {
  bounceReady(chain: Chain, bounce: number): void
}

// Module state is per iothread: each worker has its own instance of this module.
const buffers: IoBuffer[] = []
const free: number[] = []
const waiting: { user: BounceUser; chain: Chain }[] = []
let zeroes: IoBuffer | undefined

export const BouncePool = {
  /** Calls `user.bounceReady` with a buffer, now or when one is given back. */
  take(io: DeviceIo, user: BounceUser, chain: Chain): void {
    let bounce = free.pop()
    if (bounce === undefined && buffers.length < BOUNCE_COUNT) {
      bounce = buffers.length
      buffers.push(io.allocate(BOUNCE_SIZE))
    }
    if (bounce === undefined) waiting.push({ user, chain })
    else user.bounceReady(chain, bounce)
  },

  buffer(bounce: number): IoBuffer {
    return buffers[bounce]!
  },

  /** `user` is gone: it waits no more. What it holds it gives back itself. */
  leave(user: BounceUser): void {
    for (let i = waiting.length - 1; i >= 0; i--) if (waiting[i]!.user === user) waiting.splice(i, 1)
  },

  give(bounce: number): void {
    const next = waiting.shift()
    if (next === undefined) free.push(bounce)
    else next.user.bounceReady(next.chain, bounce)
  },
}

/** {@link ZEROES} bytes of zeroes. Nobody writes to it. */
export function zeroBuffer(io: DeviceIo): IoBuffer {
  zeroes ??= io.allocate(ZEROES)
  return zeroes
}
