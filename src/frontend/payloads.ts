/**
 * The payloads of vhost-user messages that a front-end sends and gets: values in, bytes out, and back. It must not know
 * sockets.
 */
import type { InflightDescription, MemoryRegionDescription } from '../vhost-user/wire.ts'
import * as wire from '../vhost-user/wire.ts'
import type { Message } from './channel.ts'
import { FrontendError } from './errors.ts'

export function dataView(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

export function u64(reply: Message): bigint {
  if (reply.payload.length !== 8) {
    throw new FrontendError(wire.requestName(reply.request), 'reply', `${reply.payload.length} bytes instead of a u64`)
  }
  return dataView(reply.payload).getBigUint64(0, true)
}

/** A u64 payload. */
export function payload64(value: bigint): Uint8Array {
  const bytes = new Uint8Array(8)
  new DataView(bytes.buffer).setBigUint64(0, value, true)
  return bytes
}

/** vhost-user.rst "A vring state description": u32 index, u32 num. */
export function vringState(index: number, num: number): Uint8Array {
  const bytes = new Uint8Array(8)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, index, true)
  view.setUint32(4, num, true)
  return bytes
}

/** vhost-user.rst "Single memory region description": u64 padding, then the region. */
export function singleRegion(region: MemoryRegionDescription): Uint8Array {
  const bytes = new Uint8Array(8 + wire.MEMORY_REGION_SIZE)
  wire.writeMemoryRegion(new DataView(bytes.buffer), 8, region)
  return bytes
}

/** vhost-user.rst "Virtio device config space": u32 offset, u32 size, u32 flags, then the bytes. */
export function configPayload(offset: number, size: number, flags: number, bytes: Uint8Array): Uint8Array {
  const payload = new Uint8Array(12 + bytes.length)
  const view = new DataView(payload.buffer)
  view.setUint32(0, offset, true)
  view.setUint32(4, size, true)
  view.setUint32(8, flags, true)
  payload.set(bytes, 12)
  return payload
}

export function inflight(description: InflightDescription): Uint8Array {
  const bytes = new Uint8Array(wire.INFLIGHT_DESCRIPTION_SIZE)
  wire.writeInflight(new DataView(bytes.buffer), 0, description)
  return bytes
}
