/** The control half of async devices: context, config space, metrics and state. */
import { setImmediate as turn } from 'node:timers/promises'
import type { DeviceContext } from 'virtiod/device'
import { describe, expect, test } from 'vitest'
import { AsyncDevice } from '../../src/device/async-device.ts'
import type { TestDevice } from '../../src/testing/plain.ts'
import { bytes, type Create, open, text } from './sample.ts'

describe('the context', () => {
  test('has what a device needs', async () => {
    let context: DeviceContext | undefined
    await using device = await open(
      (given) => {
        context = given
        return { handle() {} }
      },
      { name: 'mine' },
      { features: 6n }
    )
    expect(context!.name).toBe('mine')
    expect(context!.options).toEqual({})
    expect(context!.queues.map(({ index, name, active }) => [index, name, active])).toEqual([
      [0, 'requests', true],
      [1, 'buffers', true],
    ])
    context!.log.info({ sectors: 5 }, 'opened')
    expect(device.log).toEqual([{ level: 'info', message: 'opened', details: { sectors: 5 } }])
    expect(context!.host.name).toBe('mine')
    expect(context!.features).toBe(6n | (1n << 32n))
    expect(context!.signal.aborted).toBe(false)
    await device.close()
    expect(context!.features).toBe(0n)
    expect(context!.signal.aborted).toBe(true)
  })

  test('an async create is waited for, and what it throws is what open throws', async () => {
    await using device = await open(async () => {
      await turn()
      return { handle: (chain) => void chain.writer.u8(1) }
    })
    expect((await device.request(0, [], 1)).written).toBe(1)
    const broken = open(async () => {
      throw new RangeError('no entropy')
    })
    await expect(broken).rejects.toThrow(new RangeError('no entropy'))
  })

  test('methods of the driver and of the daemon come in order', async () => {
    const calls: string[] = []
    const device = await open(
      () => ({
        handle() {},
        negotiated: (features) => void calls.push(`negotiated ${features}`),
        queueActive: (queue, active) => void calls.push(`${queue.name} ${active} ${queue.active}`),
        reset: () => void calls.push('reset'),
        async refresh() {
          await turn()
          calls.push('refresh')
        },
        async close() {
          await turn()
          calls.push('close')
        },
      }),
      { features: 2n },
      { features: 3n }
    )
    const started = [`negotiated ${2n | (1n << 32n)}`, 'requests true true', 'buffers true true']
    const stopped = ['requests false false', 'buffers false false', 'reset']
    expect(calls.splice(0)).toEqual(started)
    await device.refresh()
    expect(calls.splice(0)).toEqual(['refresh'])
    await device.reset()
    expect(calls.splice(0)).toEqual([...stopped, ...started])
    await device.close()
    expect(calls).toEqual([...stopped, 'close'])
  })

  test('the queue half finds no device that is closed, or of another thread', async () => {
    const device = await open(() => ({ handle() {} }))
    const { queueData } = device.device
    await device.close()
    expect(() => AsyncDevice.of(queueData as { device: number })).toThrow(
      expect.objectContaining({ code: 'ERR_DEVICE_THREAD' })
    )
  })
})

describe('the config space', () => {
  const config = bytes(1, 2, 3, 4)

  test('is what the description says, a copy of its own for each device', async () => {
    await using first = await open(
      ({ config: own }) => {
        own.view.setUint16(0, 0x0605, true)
        return { handle() {} }
      },
      {},
      { config }
    )
    await using second = await open(() => ({ handle() {} }), {}, { config })
    expect(first.config).toEqual(bytes(5, 6, 3, 4))
    expect(second.config).toEqual(config)
  })

  test('the driver sees changes at once, and is told of them by changed', async () => {
    let context: DeviceContext | undefined
    await using device = await open(
      (given) => {
        context = given
        return { handle() {} }
      },
      {},
      { config }
    )
    context!.config.bytes[3] = 9
    expect(device.config).toEqual(bytes(1, 2, 3, 9))
    expect(device.configChanges).toBe(0)
    context!.config.changed()
    expect(device.configChanges).toBe(1)
  })

  test('without writeConfig every write is refused', async () => {
    await using device = await open(() => ({ handle() {} }), {}, { config })
    expect(await device.writeConfig(0, bytes(1))).toBe(false)
  })

  test('with it the device decides, in its own time', async () => {
    await using device = await open(
      ({ config: own }) => ({
        handle() {},
        async writeConfig(offset, values) {
          await turn()
          if (offset !== 2) return false
          own.bytes.set(values, offset)
          return true
        },
      }),
      {},
      { config }
    )
    expect(await device.writeConfig(0, bytes(7))).toBe(false)
    expect(await device.writeConfig(2, bytes(7, 8))).toBe(true)
    expect(device.config).toEqual(bytes(1, 2, 7, 8))
  })
})

describe('metrics', () => {
  const metrics = [
    { name: 'bytes_total', type: 'counter', labels: [], help: 'Bytes.' },
    { name: 'dropped_total', type: 'counter', labels: ['rule', 'queue'], help: 'Dropped.' },
    { name: 'degrees', type: 'gauge', labels: [], help: 'Temperature.' },
  ] as const

  async function withMetrics(): Promise<{ device: TestDevice; context: DeviceContext }> {
    let context: DeviceContext | undefined
    const device = await open(
      (given) => {
        context = given
        return { handle() {} }
      },
      {},
      { metrics }
    )
    return { device, context: context! }
  }

  test('those without labels are there from the start', async () => {
    const { device } = await withMetrics()
    await using _ = device
    expect(device.metrics()).toEqual({ bytes_total: 0, degrees: 0 })
  })

  test('are counted by their labels', async () => {
    const { device, context } = await withMetrics()
    await using _ = device
    context.metric('bytes_total').add(512)
    context.metric('bytes_total').add()
    context.metric('dropped_total', { rule: 'loss', queue: 0 }).add()
    context.metric('dropped_total', { queue: '0', rule: 'loss' }).add()
    context.metric('dropped_total', { queue: 1, rule: 'loss' }).add()
    context.metric('degrees').set(20.5)
    context.metric('degrees').add(-30)
    expect(context.metric('degrees').value).toBe(-9.5)
    expect(device.metrics()).toEqual({
      bytes_total: 513,
      'dropped_total{rule="loss",queue="0"}': 2,
      'dropped_total{rule="loss",queue="1"}': 1,
      degrees: -9.5,
    })
  })

  test('one that was not declared, or has other labels', async () => {
    const { device, context } = await withMetrics()
    await using _ = device
    expect(() => context.metric('bites_total')).toThrow(
      new TypeError("metric: there is no 'bites_total' in the device's metrics: bytes_total, dropped_total, degrees")
    )
    expect(() => context.metric('dropped_total', { rule: 'loss' })).toThrow(
      new TypeError('metric dropped_total has rule, queue; given: rule')
    )
    expect(() => context.metric('degrees', { at: 'core' })).toThrow(
      new TypeError('metric degrees has no labels; given: at')
    )
  })

  test('a counter does not go down, and nothing is no number', async () => {
    const { device, context } = await withMetrics()
    await using _ = device
    const counter = context.metric('bytes_total')
    counter.set(5)
    expect(() => counter.add(-1)).toThrow(
      new RangeError('metric bytes_total: a counter cannot go from 5 to 4, make it a gauge')
    )
    expect(() => counter.set(4)).toThrow(RangeError)
    expect(() => context.metric('degrees').set(Number.NaN)).toThrow(
      new RangeError('metric degrees: NaN is not a finite number')
    )
    expect(device.metrics()).toMatchObject({ bytes_total: 5, degrees: 0 })
  })
})

describe('state', () => {
  const stateful = (state: unknown): Create => {
    let present = state
    return () => ({
      handle() {},
      saveState: () => present,
      async loadState(loaded) {
        await turn()
        if (loaded === 'bad') throw new RangeError('not that one')
        present = loaded
      },
    })
  }

  test('goes over as JSON', async () => {
    await using old = await open(stateful({ temperature: 20.5, heater: true }))
    await using young = await open(stateful(null))
    const state = await old.saveState()
    expect(new TextDecoder().decode(state)).toBe('{"temperature":20.5,"heater":true}')
    await young.loadState(state)
    expect(await young.saveState()).toEqual(state)
  })

  test('saveState may be async', async () => {
    await using device = await open(() => ({
      handle() {},
      async saveState() {
        await turn()
        return [1]
      },
      loadState() {},
    }))
    expect(new TextDecoder().decode(await device.saveState())).toBe('[1]')
  })

  test('what JSON does not have is refused', async () => {
    await using nothing = await open(stateful(undefined))
    await expect(nothing.saveState()).rejects.toThrow(
      new TypeError('saveState of sample returned undefined, which JSON does not have')
    )
    await using big = await open(stateful({ count: 1n }))
    await expect(big.saveState()).rejects.toThrow(TypeError)
  })

  test('what is no JSON is refused, before the module sees it', async () => {
    await using device = await open(stateful(1))
    await expect(device.loadState(text.encode('{"temp'))).rejects.toThrow(
      '6 bytes that are no state of sample: they are not JSON'
    )
    await expect(device.loadState(bytes(0xff))).rejects.toThrow('they are not JSON')
    await expect(device.loadState(text.encode('"bad"'))).rejects.toThrow(new RangeError('not that one'))
  })

  test('an empty one is that of a version that had none', async () => {
    await using device = await open(stateful(1))
    await device.loadState(bytes())
    expect(new TextDecoder().decode(await device.saveState())).toBe('1')
  })

  test('a device without the two methods has none', async () => {
    await using device = await open(() => ({ handle() {} }))
    expect(device.device.saveState).toBeUndefined()
    expect(await device.saveState()).toEqual(bytes())
    await expect(device.loadState(bytes(1))).rejects.toThrow('sample has no state to load')
  })
})
