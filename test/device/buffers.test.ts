/** Queues of kind `buffers`: who waits for chains, in which order, and until when. */
import type { DeviceQueue } from 'virtiod/device'
import { describe, expect, test } from 'vitest'
import { AsyncDevice } from '../../src/device/async-device.ts'
import type { TestDevice, TestDeviceOptions } from '../../src/testing/plain.ts'
import { bytes, open, turns } from './sample.ts'

describe('buffers', () => {
  /** The queue, out of a device that does nothing by itself. */
  async function buffers(settings?: TestDeviceOptions): Promise<{ device: TestDevice; queue: DeviceQueue }> {
    let queue: DeviceQueue | undefined
    const device = await open((context) => {
      queue = context.queues[1]
      return { handle() {} }
    }, settings)
    return { device, queue: queue! }
  }

  test('wait until the device takes one', async () => {
    const { device, queue } = await buffers()
    await using _ = device
    expect(queue.take()).toBeUndefined()
    const given = device.give(1, 8)
    await turns()
    const chain = queue.take()!
    expect(queue.take()).toBeUndefined()
    chain.writer.u16(0x0201)
    chain.complete()
    expect(await given).toEqual(bytes(1, 2))
  })

  test('next resolves at once when there is one, and else when there is one', async () => {
    const { device, queue } = await buffers()
    await using _ = device
    const first = device.give(1, 4)
    await turns()
    ;(await queue.next()).complete(0)
    expect(await first).toEqual(bytes())
    const next = queue.next()
    await turns()
    const second = device.give(1, 4)
    const chain = await next
    chain.writer.u8(5)
    chain.complete()
    expect(await second).toEqual(bytes(5))
  })

  test('several that wait are served in the order of their calls', async () => {
    const { device, queue } = await buffers()
    await using _ = device
    const waiting = [1, 2, 3].map(async (i) => {
      const chain = await queue.next()
      chain.writer.u8(i)
      chain.complete()
    })
    const given = [1, 2, 3].map(() => device.give(1, 1))
    await Promise.all(waiting)
    expect(await Promise.all(given)).toEqual([bytes(1), bytes(2), bytes(3)])
  })

  test('one that comes later does not overtake them', async () => {
    const { device, queue } = await buffers()
    await using _ = device
    const first = queue.next()
    const given = [device.give(1, 1), device.give(1, 1)]
    const second = queue.next()
    const [a, b] = [await first, await second]
    a.writer.u8(1)
    b.writer.u8(2)
    a.complete()
    b.complete()
    expect(await Promise.all(given)).toEqual([bytes(1), bytes(2)])
  })

  test('a signal takes one out of the line', async () => {
    const { device, queue } = await buffers()
    await using _ = device
    const abort = new AbortController()
    const first = queue.next(abort.signal)
    const second = queue.next()
    abort.abort(new Error('never mind'))
    await expect(first).rejects.toThrow('never mind')
    await expect(queue.next(abort.signal)).rejects.toThrow('never mind')
    const given = device.give(1, 1)
    ;(await second).complete()
    await given
    // And has no effect on one that was served.
    const late = new AbortController()
    const third = queue.next(late.signal)
    const more = device.give(1, 1)
    const chain = await third
    late.abort()
    chain.complete()
    await more
  })

  test('waiting goes on over the end of a driver and the beginning of another', async () => {
    const { device, queue } = await buffers()
    await using _ = device
    const next = queue.next()
    await device.reset()
    const given = device.give(1, 1)
    ;(await next).complete()
    await given
  })

  test('what waits holds no chain: the ring stops at once', async () => {
    const { device, queue } = await buffers()
    await using _ = device
    const next = queue.next()
    const given = device.give(1, 1)
    ;(await next).complete()
    await given
    queue.next().catch(() => {})
    await device.saveState()
  })

  test('what was taken keeps the ring from draining until it is completed', async () => {
    const { device, queue } = await buffers()
    await using _ = device
    const given = device.give(1, 1)
    await turns()
    const chain = queue.take()!
    let saved = false
    const saving = device.saveState().finally(() => {
      saved = true
    })
    await turns()
    expect(saved).toBe(false)
    chain.complete()
    await Promise.all([given, saving])
  })

  test('nothing is taken from a ring that is disabled, and what waits is served when it no longer is', async () => {
    const { device, queue } = await buffers()
    await using _ = device
    device.enableQueue(1, false)
    expect(queue.active).toBe(false)
    const given = device.give(1, 1)
    await turns()
    expect(queue.take()).toBeUndefined()
    const next = queue.next()
    await turns()
    device.enableQueue(1, true)
    ;(await next).complete()
    await given
  })

  test('waits only while somebody does: what wants kicks is asked for its state', async () => {
    let contexts = 0
    const { device, queue } = await buffers()
    await using _ = device
    const ring = AsyncDevice.of(device.device.queueData as { device: number }).ring({
      queueIndex: 1,
      queueSize: 4,
      take: () => {
        contexts++
        return undefined
      },
    } as never) as { waiting: boolean; receive(): number }
    expect(ring.waiting).toBe(false)
    expect(ring.receive()).toBe(0)
    expect(contexts).toBe(0)
    queue.next().catch(() => {})
    expect(ring.waiting).toBe(true)
    expect(ring.receive()).toBe(0)
    expect(contexts).toBe(2)
  })

  test('a ring that ended is not asked for chains any more', async () => {
    let asked = 0
    const { device, queue } = await buffers()
    await using _ = device
    const ring = AsyncDevice.of(device.device.queueData as { device: number }).ring({
      queueIndex: 1,
      queueSize: 4,
      take: () => void asked++,
    } as never)
    queue.take()
    expect(asked).toBe(1)
    ring.close?.()
    expect(queue.take()).toBeUndefined()
    expect(asked).toBe(1)
  })

  test('are counted as requests when their operation is named', async () => {
    const { device, queue } = await buffers()
    await using _ = device
    for (const operation of [undefined, 'write']) {
      const given = device.give(1, 1)
      const chain = await queue.next()
      if (operation !== undefined) chain.operation(operation, 1)
      chain.complete()
      await given
    }
    expect(device.operations).toEqual({ read: 0, write: 1 })
  })

  test('the end of the device ends the waiting, with the reason of context.signal', async () => {
    let reason: unknown
    let rejected: unknown
    const device = await open((context) => {
      context.queues[1]!.next().catch((error: unknown) => {
        rejected = error
      })
      context.signal.addEventListener('abort', () => {
        reason = context.signal.reason
      })
      return {
        handle() {},
        async close() {
          await expect(context.queues[1]!.next()).rejects.toBe(reason)
        },
      }
    })
    await device.close()
    expect(reason).toBeInstanceOf(Error)
    expect(rejected).toBe(reason)
  })

  test('a queue of requests has none', async () => {
    let queue: DeviceQueue | undefined
    await using _ = await open((context) => {
      queue = context.queues[0]
      return { handle() {} }
    })
    const message =
      "queue 0 (requests) is of kind 'requests': its chains go to handle. Describe it with kind: 'buffers'"
    expect(() => queue!.take()).toThrow(new TypeError(`take: ${message}`))
    await expect(queue!.next()).rejects.toThrow(new TypeError(`next: ${message}`))
  })
})
