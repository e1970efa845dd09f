/**
 * The device module that is fuzzed, in the short style: a disk on four queues whose requests wait in all the ways that a
 * promise can, and a queue of buffers that it fills by a timer.
 */
import { setImmediate, setTimeout as sleep } from 'node:timers/promises'
import { API_VERSION, defineDevice } from 'virtiod/device'
import { blkConfig, blkDevice, blkFeatures, handleBlkRequest } from 'virtiod/device/virtio-blk'

const SIZE = 4 * 2 ** 20
const DISKS = 4
/** A letter of its own: what it is given must be what it finds. */
const FILL = 0x6d

export default defineDevice({
  apiVersion: API_VERSION,
  name: 'victim',
  ...blkDevice,
  queues: [
    ...Array.from({ length: DISKS }, (_, i) => ({ name: `disk ${i}` })),
    { name: 'buffers', kind: 'buffers' as const },
  ],
  features: blkFeatures({ flush: true, discard: true, writeZeroes: true }),
  config: blkConfig(SIZE),
  create({ queues, signal }) {
    const bytes = new Uint8Array(SIZE)
    const buffers = queues[DISKS]!
    let turn = 0
    /** At once, in a microtask, in the next turn of the event loop, or milliseconds later. */
    const pause = async (): Promise<void> => {
      switch (turn++ % 8) {
        case 0:
          return await sleep(turn % 5)
        case 1:
        case 2:
          return await setImmediate()
        case 3:
          return await Promise.resolve()
      }
    }
    const disk = {
      size: SIZE,
      async read(offset: number, length: number) {
        await pause()
        return bytes.slice(offset, offset + length)
      },
      async write(offset: number, data: Uint8Array) {
        await pause()
        bytes.set(data, offset)
      },
      flush: pause,
      async discard(offset: number, length: number) {
        await pause()
        bytes.fill(0, offset, offset + length)
      },
      async writeZeroes(offset: number, length: number) {
        bytes.fill(0, offset, offset + length)
        await pause()
      },
    }
    /** Also those that have no room: whatever was taken is given back. */
    const fill = async (): Promise<void> => {
      for (;;) {
        const chain = await buffers.next(signal)
        chain.writer.fill(Math.min(chain.writer.remaining, 4096), FILL)
        await pause()
        chain.complete()
      }
    }
    const timer = setInterval(() => {
      const chain = buffers.take()
      if (chain === undefined) return
      if (chain.writer.remaining >= 8) chain.writer.u64(0x0123_4567_89ab_cdefn)
      chain.complete()
    }, 1)
    fill().catch(() => {})
    return {
      handle: async (chain) => {
        // The same request, read once before the wait and once after it.
        const before = chain.reader.length
        await pause()
        if (chain.reader.length !== before) throw new Error('a chain has changed')
        await handleBlkRequest(chain, disk)
      },
      saveState: () => ({ turn }),
      loadState(state) {
        turn = Number((state as { turn?: unknown }).turn ?? 0)
      },
      close: () => clearInterval(timer),
    }
  },
})
