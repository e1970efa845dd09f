/**
 * virtio-input for devices (virtio 1.3 §5.8): the names of its config space and of its events, and the config space itself,
 * which shows what the driver selects. Queue 0 (`buffers`) takes events to the driver, queue 1 (`requests`) the driver's.
 */
import type { ChainReader, ChainWriter } from './define.ts'

export const VIRTIO_ID_INPUT = 18

// Values of `select` in the config space (virtio 1.3 §5.8.4).
export const VIRTIO_INPUT_CFG_UNSET = 0x00
export const VIRTIO_INPUT_CFG_ID_NAME = 0x01
export const VIRTIO_INPUT_CFG_ID_SERIAL = 0x02
export const VIRTIO_INPUT_CFG_ID_DEVIDS = 0x03
export const VIRTIO_INPUT_CFG_PROP_BITS = 0x10
export const VIRTIO_INPUT_CFG_EV_BITS = 0x11
export const VIRTIO_INPUT_CFG_ABS_INFO = 0x12

/** Bytes of struct virtio_input_config, and of what is selected: its union. */
export const VIRTIO_INPUT_CONFIG_SIZE = 136
export const VIRTIO_INPUT_CONFIG_UNION_SIZE = 128
/** Bytes of struct virtio_input_event. */
export const VIRTIO_INPUT_EVENT_SIZE = 8

// Types of events, as in Linux' input-event-codes.h, to which the specification refers.
export const EV_SYN = 0x00
export const EV_KEY = 0x01
export const EV_REL = 0x02
export const EV_ABS = 0x03
export const EV_MSC = 0x04
export const EV_SW = 0x05
export const EV_LED = 0x11
export const EV_SND = 0x12
export const EV_REP = 0x14

/** The event of type EV_SYN that ends a group: what came since the last one belongs together. */
export const SYN_REPORT = 0

export const BUS_VIRTUAL = 0x06

/** What a device says of itself. */
export interface InputDescription {
  /** At most 128 bytes of UTF-8: what the guest calls it. */
  readonly name: string
  /** The same; unset: none. */
  readonly serial?: string
  readonly ids?: { readonly bus: number; readonly vendor: number; readonly product: number; readonly version: number }
  /** INPUT_PROP_*; unset: none. */
  readonly properties?: readonly number[]
  /**
   * Type → the codes that the device can send, or take: `{ [EV_KEY]: [30, 48] }`. EV_REP with any code: the guest
   * repeats keys that are held.
   */
  readonly events: Readonly<Record<number, readonly number[]>>
  /** ABS_* → the range of that axis; those that are not here have none. */
  readonly axes?: Readonly<Record<number, InputAxis>>
}

export interface InputAxis {
  readonly min: number
  readonly max: number
  /** Changes up to here are noise; default 0. */
  readonly fuzz?: number
  /** Values up to here count as the middle; default 0. */
  readonly flat?: number
  /** Units per millimetre, or per radian; default 0: unknown. */
  readonly resolution?: number
}

export interface InputEvent {
  /** EV_* */
  readonly type: number
  readonly code: number
  /** Of 32 bits, signed. */
  readonly value: number
}

/**
 * The config space of an input device. The driver writes `select` and `subsel`, and reads what they stand for:
 *
 *   config: new Uint8Array(VIRTIO_INPUT_CONFIG_SIZE),
 *   create({ config }) {
 *     const space = new InputConfig(config.bytes, { name: 'thermometer', events: { [EV_ABS]: [ABS_MISC] } })
 *     return { writeConfig: (offset, bytes) => space.write(offset, bytes), reset: () => space.reset(), … }
 *   }
 */
export class InputConfig {
  readonly #bytes: Uint8Array
  readonly #description: InputDescription

  /**
   * @param bytes the device's config space, {@link VIRTIO_INPUT_CONFIG_SIZE} of them
   * @throws RangeError when something of the description does not fit into it
   */
  constructor(bytes: Uint8Array, description: InputDescription) {
    if (bytes.length !== VIRTIO_INPUT_CONFIG_SIZE)
      throw new RangeError(`a config space of ${bytes.length} bytes, it has to have ${VIRTIO_INPUT_CONFIG_SIZE}`)
    this.#bytes = bytes
    this.#description = description
    // Whatever can be selected, once: what does not fit is found now, not when a driver asks.
    for (const select of [VIRTIO_INPUT_CFG_ID_NAME, VIRTIO_INPUT_CFG_ID_SERIAL, VIRTIO_INPUT_CFG_PROP_BITS])
      this.#show(select, 0)
    for (const type of Object.keys(description.events)) this.#show(VIRTIO_INPUT_CFG_EV_BITS, Number(type))
    this.reset()
  }

  /**
   * The driver's write. Only `select` and `subsel` are its to write; QEMU writes the whole space when the guest writes one
   * of them, so the rest is left as it is. Returns false for a write beyond the end.
   */
  write(offset: number, bytes: Uint8Array): boolean {
    if (offset + bytes.length > VIRTIO_INPUT_CONFIG_SIZE) return false
    const at = (position: number): number => bytes[position - offset] ?? (this.#bytes[position] as number)
    this.#show(at(0), at(1))
    return true
  }

  /** Nothing is selected. */
  reset(): void {
    this.#show(VIRTIO_INPUT_CFG_UNSET, 0)
  }

  #show(select: number, subsel: number): void {
    const content = this.#content(select, subsel)
    if (content.length > VIRTIO_INPUT_CONFIG_UNION_SIZE)
      throw new RangeError(`selection 0x${select.toString(16)}: ${content.length} bytes are more than 128`)
    this.#bytes.fill(0)
    this.#bytes.set([select, subsel, content.length])
    this.#bytes.set(content, VIRTIO_INPUT_CONFIG_SIZE - VIRTIO_INPUT_CONFIG_UNION_SIZE)
  }

  /** What a selection stands for; nothing for what the device has not, as the specification wants it. */
  #content(select: number, subsel: number): Uint8Array {
    const { name, serial = '', ids, properties = [], events, axes = {} } = this.#description
    // All but two know no `subsel` other than 0.
    if (select === VIRTIO_INPUT_CFG_EV_BITS) return bitmap(events[subsel] ?? [])
    if (select === VIRTIO_INPUT_CFG_ABS_INFO) return axisInfo(axes[subsel])
    if (subsel !== 0) return NOTHING
    if (select === VIRTIO_INPUT_CFG_ID_NAME) return Buffer.from(name)
    if (select === VIRTIO_INPUT_CFG_ID_SERIAL) return Buffer.from(serial)
    if (select === VIRTIO_INPUT_CFG_PROP_BITS) return bitmap(properties)
    if (select !== VIRTIO_INPUT_CFG_ID_DEVIDS || ids === undefined) return NOTHING
    const view = new DataView(new ArrayBuffer(8))
    for (const [i, id] of [ids.bus, ids.vendor, ids.product, ids.version].entries()) view.setUint16(2 * i, id, true)
    return new Uint8Array(view.buffer)
  }
}

const NOTHING = new Uint8Array(0)

/** As short as its highest bit allows: a size of 0 says that there is none. */
function bitmap(bits: readonly number[]): Uint8Array {
  const bytes = new Uint8Array(bits.length === 0 ? 0 : (Math.max(...bits) >> 3) + 1)
  for (const bit of bits) bytes[bit >> 3] = (bytes[bit >> 3] as number) | (1 << (bit & 7))
  return bytes
}

function axisInfo(axis: InputAxis | undefined): Uint8Array {
  if (axis === undefined) return NOTHING
  const { min, max, fuzz = 0, flat = 0, resolution = 0 } = axis
  const view = new DataView(new ArrayBuffer(20))
  for (const [i, value] of [min, max, fuzz, flat, resolution].entries()) view.setInt32(4 * i, value, true)
  return new Uint8Array(view.buffer)
}

/** @throws RangeError when the driver's buffer is too short */
export function writeInputEvent(writer: ChainWriter, { type, code, value }: InputEvent): void {
  writer
    .u16(type)
    .u16(code)
    .u32(value >>> 0)
}

/** The driver's event, of the status queue. @throws ChainError when its buffer is too short */
export function readInputEvent(reader: ChainReader): InputEvent {
  return { type: reader.u16(), code: reader.u16(), value: reader.u32() | 0 }
}
