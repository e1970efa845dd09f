/** Requests of async devices over the engine of testDevice: their completion, failures and disabled rings. */
import { setTimeout as sleep, setImmediate as turn } from 'node:timers/promises'
import { ChainError, type DeviceChain, type DeviceHandlers, type DeviceQueue } from 'virtiod/device'
import { describe, expect, test } from 'vitest'
import { bytes, type Create, open, text, turns } from './sample.ts'

describe('requests', () => {
  const echo: Create = () => ({
    handle(chain) {
      chain.writer.bytes(chain.reader.bytes())
    },
  })

  test('is completed when handle returns, with what was written by then', async () => {
    await using device = await open(echo)
    expect(await device.request(0, bytes(1, 2, 3), 5)).toEqual({ written: 3, bytes: bytes(1, 2, 3, 0xa5, 0xa5) })
    expect(device.operations).toEqual({ read: 1, write: 0 })
  })

  test('is completed when its promise resolves, and not before', async () => {
    const gate = Promise.withResolvers<void>()
    await using device = await open(() => ({
      async handle(chain) {
        chain.writer.u8(1)
        await gate.promise
        chain.writer.u8(2)
        chain.operation('write', 2)
      },
    }))
    let done = false
    const request = device.request(0, [], 2).finally(() => {
      done = true
    })
    await turns()
    expect(done).toBe(false)
    gate.resolve()
    expect(await request).toEqual({ written: 2, bytes: bytes(1, 2) })
    expect(device.operations).toEqual({ read: 0, write: 1 })
  })

  test('many are in work at once, and end in any order', async () => {
    const gates: (() => void)[] = []
    await using device = await open(() => ({
      handle: (chain) =>
        new Promise((resolve) => {
          const index = chain.reader.u8()
          gates[index] = () => {
            chain.writer.u8(index)
            resolve()
          }
        }),
    }))
    const order: number[] = []
    const requests = [0, 1, 2].map(async (i) => {
      const reply = await device.request(0, bytes(i), 1)
      order.push(reply.bytes[0]!)
    })
    await turns()
    for (const i of [2, 0, 1]) {
      gates[i]!()
      await turns()
    }
    await Promise.all(requests)
    expect(order).toEqual([2, 0, 1])
  })

  test('as many as the ring holds; the rest waits in line', async () => {
    let inWork = 0
    let most = 0
    await using device = await open(
      () => ({
        async handle() {
          most = Math.max(most, ++inWork)
          await turn()
          inWork--
        },
      }),
      { queueSize: 4 }
    )
    await Promise.all(Array.from({ length: 20 }, () => device.request(0, bytes(1))))
    expect(most).toBe(4)
  })

  test('may be completed before the handler is through', async () => {
    const gate = Promise.withResolvers<void>()
    let through = false
    await using device = await open(() => ({
      async handle(chain) {
        chain.complete(1)
        await gate.promise
        through = true
      },
    }))
    expect((await device.request(0, [], 4)).written).toBe(1)
    expect(through).toBe(false)
    gate.resolve()
    await turns()
    expect(through).toBe(true)
    expect(device.failure).toBeUndefined()
  })

  test('handle gets its queue, and is called on what create returned', async () => {
    class Handlers implements DeviceHandlers {
      readonly names: string[] = []
      handle(_chain: DeviceChain, queue: DeviceQueue): void {
        this.names.push(`${queue.name} ${queue.index} ${queue.active}`)
      }
    }
    const handlers = new Handlers()
    await using device = await open(() => handlers)
    await device.request(0, bytes(1))
    expect(handlers.names).toEqual(['requests 0 true'])
  })

  test('heads are unique among those in work', async () => {
    const heads: number[] = []
    await using device = await open(() => ({
      async handle(chain) {
        heads.push(chain.head)
        await turn()
      },
    }))
    await Promise.all([1, 2, 3].map((i) => device.request(0, bytes(i))))
    expect(new Set(heads).size).toBe(3)
  })

  test('errors are counted', async () => {
    await using device = await open(() => ({ handle: (chain) => chain.error('bad') }))
    await device.request(0, bytes(1))
    expect(device.errors).toEqual({ bad: 1 })
  })
})

describe('a handler that fails', () => {
  const failing: [string, Create, object][] = [
    [
      'throws',
      () => ({
        handle() {
          throw new TypeError('no such thing')
        },
      }),
      { name: 'TypeError', message: 'no such thing' },
    ],
    [
      'rejects',
      () => ({
        async handle() {
          await turn()
          throw new TypeError('no such thing')
        },
      }),
      { name: 'TypeError', message: 'no such thing' },
    ],
    [
      'completes twice',
      () => ({
        handle(chain) {
          chain.complete()
          chain.complete()
        },
      }),
      { code: 'ERR_DEVICE_COMPLETED_TWICE' },
    ],
    [
      'writes more than the chain holds',
      () => ({
        async handle(chain) {
          await turn()
          chain.writer.fill(5)
        },
      }),
      { code: 'ERR_DEVICE_OVERRUN' },
    ],
  ]
  test.each(failing)('%s: its session ends, and the next one begins', async (_, create, error) => {
    await using device = await open(create)
    const request = device.request(0, bytes(1), 4)
    // One that was completed before is answered.
    const [result] = await Promise.allSettled([request])
    if (result.status === 'rejected') expect(result.reason).toMatchObject(error)
    await turns()
    expect(device.failure).toMatchObject(error)
    await expect(device.request(0, bytes(1))).rejects.toThrow('the session ended: the device failed')
    await device.reset()
    expect(device.failure).toBeUndefined()
    const again = device.request(0, bytes(1), 4)
    again.catch(() => {})
    await turns()
    expect(device.failure).toMatchObject(error)
  })

  test('one that rejects ends what else is in work', async () => {
    await using device = await open(() => ({
      async handle(chain) {
        if (chain.reader.u8() === 2) throw new Error('two')
        await new Promise(() => {})
      },
    }))
    const [first, second] = await Promise.allSettled([device.request(0, bytes(1)), device.request(0, bytes(2))])
    expect(second).toMatchObject({ reason: { message: 'two' } })
    expect(first).toMatchObject({
      reason: { message: 'the session ended: the device failed', cause: { message: 'two' } },
    })
  })

  test('reads more than the chain has: its ring is broken, not the session', async () => {
    await using device = await open(() => ({
      async handle(chain) {
        await turn()
        chain.reader.bytes(16)
      },
    }))
    const error = { name: 'ChainError', message: 'chain 0 has 3 device-readable bytes, the handler reads 16 at 0' }
    await expect(device.request(0, bytes(1, 2, 3))).rejects.toMatchObject(error)
    await expect(device.request(0, bytes(1, 2, 3))).rejects.toThrow('queue 0 is broken')
    expect(device.failure).toBeUndefined()
  })

  test('a ChainError of its own does so too', async () => {
    await using device = await open(() => ({
      handle() {
        throw new ChainError('an unknown request')
      },
    }))
    await expect(device.request(0, bytes(1))).rejects.toThrow('an unknown request')
    expect(device.failure).toBeUndefined()
  })

  test('one that never completes is stuck', async () => {
    await using device = await open(() => ({ handle: () => new Promise(() => {}) }), {}, { timeoutMs: 20 })
    const error = {
      code: 'ERR_DEVICE_STUCK',
      message: 'chain 0 of queue 0 has not been completed for 0.02 s',
    }
    await expect(device.request(0, bytes(1))).rejects.toMatchObject(error)
    expect(device.failure).toMatchObject(error)
  })
})

describe('a disabled ring', () => {
  test('keeps its requests', async () => {
    await using device = await open(() => ({ handle() {} }))
    device.enableQueue(0, false)
    let done = false
    const request = device.request(0, bytes(1)).finally(() => {
      done = true
    })
    await turns()
    expect(done).toBe(false)
    device.enableQueue(0, true)
    await request
  })

  test('gives them to discard when there is one', async () => {
    const discarded: string[] = []
    await using device = await open(() => ({
      handle() {
        throw new Error('not for handle')
      },
      discard(chain, queue) {
        discarded.push(`${queue.name} ${chain.reader.length}`)
      },
    }))
    device.enableQueue(0, false)
    expect(await device.request(0, bytes(1, 2), 1)).toEqual({ written: 0, bytes: bytes(0xa5) })
    expect(discarded).toEqual(['requests 2'])
  })
})

test('promises, timers and whatever else needs an event loop work in handlers', async () => {
  await using device = await open(() => ({
    async handle(chain) {
      await sleep(1)
      const response = await fetch('data:text/plain,hello')
      chain.writer.bytes(await response.bytes())
    },
  }))
  expect((await device.request(0, [], 5)).bytes).toEqual(text.encode('hello'))
})
