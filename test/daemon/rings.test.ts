/** What the ring host does itself: config spaces of migrated devices, device state, the features of rings. */
import { describe, expect, test } from 'vitest'
import { changedSpan } from '../../src/daemon/config-space.ts'
import { RING_FEATURES, Rings } from '../../src/daemon/rings.ts'
import type { Device, DeviceDefinition } from '../../src/device/index.ts'
import type { IothreadPool } from '../../src/engine/pool.ts'
import {
  VHOST_F_LOG_ALL,
  VIRTIO_F_ACCESS_PLATFORM,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_RING_RESET,
} from '../../src/virtio/constants.ts'
import { hasFeature } from '../../src/virtio/features.ts'

const definition = { queueModule: new URL('./none.ts', import.meta.url) } as DeviceDefinition
const pool = { assign: () => ({}) } as unknown as IothreadPool

/** A device with a config space of eight bytes, of which byte 5 may be written. */
function host(more: Partial<Device> = {}) {
  const config = Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8)
  const writes: [offset: number, bytes: number[]][] = []
  const device: Partial<Device> = {
    features: 1n,
    numQueues: 1,
    config: () => config.slice(),
    writeConfig: (offset, bytes) => {
      if (offset !== 5 || bytes.length !== 1) return false
      writes.push([offset, [...bytes]])
      config.set(bytes, offset)
      return true
    },
    ...more,
  }
  return { rings: new Rings(definition, device as Device, pool), config, writes }
}

test('the rings offer what the engine does, and no reset of single rings', () => {
  for (const bit of [VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED])
    expect(hasFeature(RING_FEATURES, bit), `${bit}`).toBe(true)
  expect(hasFeature(RING_FEATURES, VIRTIO_F_RING_RESET)).toBe(false)
  expect(host().rings.features).toBe(RING_FEATURES | 1n)
})

describe('changedSpan', () => {
  const config = Uint8Array.of(1, 2, 3, 4)
  test.each([
    ['all the same', 0, [1, 2, 3, 4], [4, 4]],
    ['one byte', 0, [1, 9, 3, 4], [1, 2]],
    ['the first and the last', 0, [9, 2, 3, 9], [0, 4]],
    ['at an offset', 2, [3, 9], [1, 2]],
    ['behind the end, zero', 3, [4, 0, 0], [3, 3]],
    ['behind the end, not zero', 3, [4, 0, 1, 0], [2, 3]],
    ['nothing', 0, [], [0, 0]],
  ])('%s', (_, offset, bytes, [start, end]) => {
    expect(changedSpan(config, offset, Uint8Array.from(bytes))).toEqual({ start, end })
  })
})

describe('writeConfig', () => {
  test('of a driver goes to the device as it is', () => {
    const { rings, writes } = host()
    expect(rings.writeConfig(0, Uint8Array.of(1), false)).toBe(false)
    expect(rings.writeConfig(5, Uint8Array.of(6), false)).toBe(true)
    expect(writes).toEqual([[5, [6]]])
  })

  test('of a migration writes what is different, if that may be written', () => {
    const { rings, writes, config } = host()
    expect(rings.writeConfig(0, config.slice(), true)).toBe(true)
    expect(writes).toEqual([])
    expect(rings.writeConfig(0, Uint8Array.of(1, 2, 3, 4, 5, 60, 7, 8, 0, 0), true)).toBe(true)
    expect(writes).toEqual([[5, [60]]])
    // A read-only field, with and without the other.
    expect(rings.writeConfig(0, Uint8Array.of(9, 2, 3, 4, 5, 60, 7, 8), true)).toBe(false)
    expect(rings.writeConfig(0, Uint8Array.of(9, 2, 3, 4, 5, 6, 7, 8), true)).toBe(false)
    expect(rings.writeConfig(4, Uint8Array.of(5, 61, 9), true)).toBe(false)
    expect(config[5]).toBe(60)
  })
})

describe('device state', () => {
  test('of a device without any is empty, and nothing else is taken', async () => {
    const { rings } = host()
    expect(await rings.saveState()).toEqual(new Uint8Array(0))
    await rings.loadState(new Uint8Array(0))
    await expect(rings.loadState(Uint8Array.of(1))).rejects.toThrow('1 bytes of state for a device that has none')
  })

  test('is the device’s', async () => {
    let loaded: Uint8Array | undefined
    const { rings } = host({
      saveState: async () => Uint8Array.of(7),
      loadState: (state) => {
        loaded = state
      },
    })
    expect(await rings.saveState()).toEqual(Uint8Array.of(7))
    await rings.loadState(Uint8Array.of(8))
    expect(loaded).toEqual(Uint8Array.of(8))
    const refusing = host({
      loadState: () => {
        throw new Error('of another device')
      },
    })
    await expect(refusing.rings.loadState(Uint8Array.of(8))).rejects.toThrow('of another device')
  })
})
