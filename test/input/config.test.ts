/** `virtiod/device/virtio-input`: the config space and the events, for input devices of anybody's. */

import { defineDevice } from 'virtiod/device'
import { testDevice } from 'virtiod/testing'
import { expect, test } from 'vitest'
import {
  EV_ABS,
  EV_KEY,
  InputConfig,
  type InputEvent,
  readInputEvent,
  VIRTIO_ID_INPUT,
  VIRTIO_INPUT_CFG_ABS_INFO,
  VIRTIO_INPUT_CFG_ID_DEVIDS,
  VIRTIO_INPUT_CFG_ID_SERIAL,
  VIRTIO_INPUT_CFG_PROP_BITS,
  VIRTIO_INPUT_CONFIG_SIZE,
  VIRTIO_INPUT_EVENT_SIZE,
  writeInputEvent,
} from '../../src/device/virtio-input.ts'

const ABS_MISC = 0x28

/** What a selection shows. */
function shown(config: InputConfig, bytes: Uint8Array, select: number, subsel: number): number[] {
  expect(config.write(0, Uint8Array.of(select, subsel))).toBe(true)
  return [...bytes.subarray(8, 8 + bytes[2]!)]
}

test('shows properties, axes with negative values, and nothing of what is not there', () => {
  const bytes = new Uint8Array(VIRTIO_INPUT_CONFIG_SIZE)
  const config = new InputConfig(bytes, {
    name: 'x',
    properties: [1, 9],
    events: { [EV_ABS]: [ABS_MISC] },
    axes: { [ABS_MISC]: { min: -40_000, max: 125_000, fuzz: 1, flat: 2, resolution: 3 } },
  })
  expect(shown(config, bytes, VIRTIO_INPUT_CFG_PROP_BITS, 0)).toEqual([2, 2])
  const info = Buffer.from(shown(config, bytes, VIRTIO_INPUT_CFG_ABS_INFO, ABS_MISC))
  expect([0, 4, 8, 12, 16].map((at) => info.readInt32LE(at))).toEqual([-40_000, 125_000, 1, 2, 3])
  expect(shown(config, bytes, VIRTIO_INPUT_CFG_ABS_INFO, 0)).toEqual([])
  expect(shown(config, bytes, VIRTIO_INPUT_CFG_ID_DEVIDS, 0)).toEqual([])
  expect(shown(config, bytes, VIRTIO_INPUT_CFG_ID_SERIAL, 0)).toEqual([])
})

test('a write beyond the end changes nothing', () => {
  const bytes = new Uint8Array(VIRTIO_INPUT_CONFIG_SIZE)
  const config = new InputConfig(bytes, { name: 'x', events: {} })
  expect(config.write(135, Uint8Array.of(1, 1))).toBe(false)
  expect(config.write(0, new Uint8Array(137).fill(1))).toBe(false)
  expect(bytes).toEqual(new Uint8Array(VIRTIO_INPUT_CONFIG_SIZE))
})

test.each([
  [{ name: 'x'.repeat(129), events: {} }, 'selection 0x1: 129 bytes are more than 128'],
  [{ name: 'x', serial: 'ü'.repeat(65), events: {} }, 'selection 0x2: 130 bytes'],
  [{ name: 'x', events: { [EV_KEY]: [1024] } }, 'selection 0x11: 129 bytes'],
])('what does not fit is refused: %o', (description, message) => {
  expect(() => new InputConfig(new Uint8Array(VIRTIO_INPUT_CONFIG_SIZE), description)).toThrow(message)
})

test('a config space of another size is refused', () => {
  expect(() => new InputConfig(new Uint8Array(8), { name: 'x', events: {} })).toThrow('a config space of 8 bytes')
})

test('events are read as they were written', async () => {
  const device = defineDevice({
    apiVersion: 1,
    name: 'mirror',
    virtioId: VIRTIO_ID_INPUT,
    queues: [{ name: 'status' }],
    create: () => ({ handle: (chain) => void writeInputEvent(chain.writer, readInputEvent(chain.reader)) }),
  })
  await using mirror = await testDevice(device, { split: true })
  const event: InputEvent = { type: EV_ABS, code: ABS_MISC, value: -2 }
  const bytes = Buffer.alloc(VIRTIO_INPUT_EVENT_SIZE)
  bytes.writeUInt16LE(event.type, 0)
  bytes.writeUInt16LE(event.code, 2)
  bytes.writeInt32LE(event.value, 4)
  const reply = await mirror.request(0, bytes, VIRTIO_INPUT_EVENT_SIZE)
  expect(Buffer.from(reply.bytes)).toEqual(bytes)
})
