/**
 * The moment after a back-end died, for the cases about in-flight tracking: an area, and a ring in memory that is not
 * started. What is in them a case writes by hand, so that each state is met exactly; nobody has to die for it.
 */
import { VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD } from '../../vhost-user/wire.ts'
import { VIRTIO_F_RING_PACKED } from '../../virtio/constants.ts'
import { InflightArea, type InflightState } from '../inflight.ts'
import { sleepMs } from '../virtqueue.ts'
import { expect } from './case.ts'
import type { Context } from './context.ts'
import type { Guest, Ring } from './guest.ts'

export const SIZE = 64
export const TRACKING = 'vhost-user.rst "Inflight I/O tracking"'
export const protocol = [VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD]
export const split = { device: 'blk', protocol } as const
export const packed = { device: 'blk', protocol, features: [VIRTIO_F_RING_PACKED] } as const

/** An area of one queue, a guest that shares it, and a ring in memory that is not started. */
interface Crash {
  readonly area: InflightArea
  readonly view: DataView
  readonly ring: Ring
  readonly guest: Guest
}

export function crash(
  context: Context,
  format: 'split' | 'packed',
  use: (crash: Crash) => string,
  arena?: number
): string {
  const area = InflightArea.create(1, SIZE, format === 'packed')
  try {
    const guest = context.guest({ inflight: area, packed: format === 'packed' })
    const ring = guest.prepare(0, { size: SIZE }, arena)
    const bytes = area.queue(0)
    return use({ area, view: new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), ring, guest })
  } finally {
    context.release(false)
    area.close()
  }
}

/**
 * The marks are cleared after the used ring was published: a moment is given for it. A stop may clear all of the
 * region.
 */
export function settled(area: InflightArea, isThere: (state: InflightState) => boolean): InflightState {
  for (const deadline = performance.now() + 500; ; sleepMs(1)) {
    const state = area.read(0)
    if ((isThere(state) && state.inflight.length === 0) || performance.now() > deadline) return state
  }
}

/** Starts the ring as QEMU does after a reconnection, from the used index, with a kick for those that were lost. */
export function resume(ring: Ring, base: number): void {
  ring.start(base)
  ring.queue.driver.kickRaw()
}

/** Looks into the area while requests are under way, which a back-end has to have marked before it begins with them. */
export function marksWhileBusy(context: Context, format: 'split' | 'packed'): string {
  return crash(
    context,
    format,
    ({ view, ring }) => {
      ring.start()
      const [first, step] = format === 'split' ? [16, 16] : [32, 32]
      let most = 0
      // On a busy machine the back-end may get the processor only when this thread doesn't look.
      for (let round = 0; round < 40 || (most === 0 && round < 400); round++) {
        const pending = ring.batchOf(context.longOperations(20))
        // Often, and nothing else meanwhile: requests that a page cache answers are under way for microseconds.
        for (const until = performance.now() + 200; !ring.queue.driver.hasUsed() && performance.now() < until; ) {
          let marked = 0
          for (let i = 0; i < SIZE; i++) if (view.getUint8(first + step * i) === 1) marked++
          if (marked > most) most = marked
        }
        ring.finishAll(pending)
      }
      expect(most > 0, 'entries that are marked while requests are under way', 'none, in 400 rounds of 20 requests')
      return `up to ${most} marked`
    },
    24 * 2 ** 20
  )
}
