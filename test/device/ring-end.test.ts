/** Async devices whose rings end with chains in work: nothing may reach memory that is another one's by then. */
import type { DeviceChain } from 'virtiod/device'
import { describe, expect, test } from 'vitest'
import { bytes, open, text, turns } from './sample.ts'

describe('a ring that ends with chains in work', () => {
  test('late completions are ignored', async () => {
    const gate = Promise.withResolvers<void>()
    let chain: DeviceChain | undefined
    await using device = await open(() => ({
      async handle(given) {
        chain = given
        await gate.promise
        given.writer.u32(1)
      },
    }))
    const request = device.request(0, bytes(1), 4)
    await turns()
    await device.reset()
    await expect(request).rejects.toThrow('the driver reset the device')
    gate.resolve()
    await turns()
    chain!.complete()
    expect(device.failure).toBeUndefined()
    expect(device.log).toEqual([])
    expect(device.operations).toEqual({ read: 0, write: 0 })
  })

  test('a handler that reads on is ended without a trace; one that fails by itself is logged', async () => {
    const gate = Promise.withResolvers<void>()
    await using device = await open(() => ({
      async handle(chain) {
        const fails = chain.reader.u8() === 1
        await gate.promise
        if (fails) throw new Error('too late')
        chain.reader.u8()
      },
    }))
    device.request(0, bytes(0, 0)).catch(() => {})
    device.request(0, bytes(1, 0)).catch(() => {})
    await turns()
    await device.reset()
    gate.resolve()
    await turns()
    expect(device.failure).toBeUndefined()
    expect(device.log).toEqual([
      {
        level: 'warn',
        message: 'a handler failed after its ring ended',
        details: { err: new Error('too late'), queue: 0, chain: 1 },
      },
    ])
  })

  test('of many that fail one is logged: a front-end that comes and goes must not fill the log', async () => {
    await using device = await open(() => ({
      async handle() {
        await turns(8)
        throw new Error('too late')
      },
    }))
    for (let driver = 0; driver < 3; driver++) {
      for (let i = 0; i < 50; i++) device.request(0, bytes(i)).catch(() => {})
      await turns(2)
      await device.reset()
      await turns(20)
    }
    expect(device.failure).toBeUndefined()
    expect(device.log).toHaveLength(1)
  })

  test('a chain of the former ring does not touch the next one that has its head', async () => {
    const gate = Promise.withResolvers<void>()
    const chains: DeviceChain[] = []
    await using device = await open(() => ({
      async handle(chain) {
        chains.push(chain)
        if (chains.length > 1) return void chain.writer.u8(7)
        await gate.promise
      },
    }))
    device.request(0, [], 1).catch(() => {})
    await turns()
    await device.reset()
    const request = device.request(0, [], 1)
    chains[0]!.writer.u8(9)
    gate.resolve()
    expect(await request).toEqual({ written: 1, bytes: bytes(7) })
    expect(chains.map(({ head }) => head)).toEqual([0, 0])
  })

  test('requests of the next driver wait for handlers of the last one: those may still write', async () => {
    const gate = Promise.withResolvers<void>()
    const stored: string[] = []
    await using device = await open(() => ({
      async handle(chain) {
        const what = new TextDecoder().decode(chain.reader.bytes())
        if (what === 'old') await gate.promise
        stored.push(what)
      },
    }))
    device.request(0, text.encode('old')).catch(() => {})
    await turns()
    await device.reset()
    const requests = ['new', 'newer'].map((what) => device.request(0, text.encode(what)))
    await turns()
    expect(stored).toEqual([])
    gate.resolve()
    await Promise.all(requests)
    await device.request(0, text.encode('newest'))
    expect(stored).toEqual(['old', 'new', 'newer', 'newest'])
  })

  test('for those of all queues', async () => {
    const gates = [Promise.withResolvers<void>(), Promise.withResolvers<void>()]
    let old = true
    const ended: string[] = []
    await using device = await open(
      () => ({
        async handle(_chain, { index }) {
          if (old) await gates[index]!.promise
          ended.push(old ? `old ${index}` : 'new')
        },
      }),
      {},
      { queues: [{ name: 'first' }, { name: 'second' }] }
    )
    for (const queue of [0, 1]) device.request(queue, bytes(1)).catch(() => {})
    await turns()
    await device.reset()
    const request = device.request(1, bytes(1))
    gates[1]!.resolve()
    await turns()
    expect(ended).toEqual(['old 1'])
    gates[0]!.resolve()
    await turns(1)
    old = false
    await request
    expect(ended.slice(0, 2)).toEqual(['old 1', 'old 0'])
  })

  test('but not longer than timeoutMs', async () => {
    await using device = await open(
      () => ({
        async handle(chain) {
          if (chain.reader.u8() === 1) await new Promise(() => {})
        },
      }),
      {},
      { timeoutMs: 50 }
    )
    device.request(0, bytes(1)).catch(() => {})
    await turns()
    await device.reset()
    expect((await device.request(0, bytes(2))).written).toBe(0)
  })

  test('a request that waited so and whose ring ended as well is not begun', async () => {
    const gate = Promise.withResolvers<void>()
    let begun = 0
    await using device = await open(() => ({
      async handle() {
        begun++
        await gate.promise
      },
    }))
    for (const i of [1, 2]) {
      device.request(0, bytes(i)).catch(() => {})
      await turns()
      await device.reset()
    }
    gate.resolve()
    await device.request(0, bytes(3))
    // The first and the third.
    expect(begun).toBe(2)
  })

  test('a handler that throws at once after it waited fails as any other', async () => {
    const gate = Promise.withResolvers<void>()
    await using device = await open(() => ({
      handle(chain) {
        if (chain.reader.u8() === 1) return gate.promise
        throw new Error('two')
      },
    }))
    device.request(0, bytes(1)).catch(() => {})
    await turns()
    await device.reset()
    const request = device.request(0, bytes(2))
    await turns()
    gate.resolve()
    await expect(request).rejects.toThrow('two')
    expect(device.failure).toMatchObject({ message: 'two' })
  })
})
