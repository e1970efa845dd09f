/**
 * Hostile sessions, made of honest ones: messages in QEMU's order with the values that it gives, of every request that there
 * is, and then changed. It must not know sockets.
 */
import * as wire from '../../src/vhost-user/wire.ts'
import { VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED } from '../../src/virtio/constants.ts'
import { MEMORY_BYTES, RING_ENTRIES, ringParts, SECOND_REGION } from './player.ts'
import type { Random } from './random.ts'
import { FD_KINDS, type FdKind, type FuzzMessage, type Scenario } from './scenario.ts'
import { VICTIMS, type Victim } from './victims.ts'

/** What a device offers. */
export interface Offer {
  readonly device: Victim
  readonly features: bigint
  readonly protocolFeatures: bigint
}

/** The front-end's addresses of the two regions, and their guest-physical ones. */
const UVA = [0x7f00_0000_0000n, 0x7e00_0000_0000n] as const
const GPA = [0n, 0x1_0000_0000n] as const
const REGION_BYTES = BigInt(SECOND_REGION)
/** What one batch may hold: their replies have to fit into a socket that nobody reads meanwhile. */
const BATCH = 100
const LAST_REQUEST = 46
/** Requests whose refusal is the end of the connection, since it can't be said in their reply, and their feature. */
const FATAL: ReadonlyMap<number, number> = new Map([
  [wire.VHOST_USER_GET_QUEUE_NUM, wire.VHOST_USER_PROTOCOL_F_MQ],
  [wire.VHOST_USER_GET_MAX_MEM_SLOTS, wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS],
  [wire.VHOST_USER_GET_STATUS, wire.VHOST_USER_PROTOCOL_F_STATUS],
  [wire.VHOST_USER_GET_INFLIGHT_FD, wire.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD],
  [wire.VHOST_USER_SET_LOG_BASE, wire.VHOST_USER_PROTOCOL_F_LOG_SHMFD],
  [wire.VHOST_USER_GET_CONFIG, wire.VHOST_USER_PROTOCOL_F_CONFIG],
])
const NEED_REPLY = wire.VHOST_USER_VERSION | wire.VHOST_USER_NEED_REPLY_MASK

/** What a session has agreed on, as far as its messages depend on it. */
interface Agreed {
  readonly features: bigint
  readonly protocolFeatures: bigint
  readonly packed: boolean
  readonly translated: boolean
}

export function makeScenario(random: Random, offer: Offer): Scenario {
  const agreed = agree(random, offer)
  const messages = random.one(6) ? soup(random, agreed, offer) : session(random, agreed, offer)
  // Some sessions are nearly honest, some have hardly a message as it was.
  const rate = random.pick([0, 500, 200, 60, 20, 5])
  const mutated =
    rate === 0 ? messages : messages.flatMap((message) => (random.one(rate) ? mutate(random, message) : message))
  const batches: FuzzMessage[][] = []
  for (let at = 0; at < mutated.length; at += BATCH) batches.push(mutated.slice(at, at + BATCH))
  const scenario = { device: offer.device, packed: agreed.packed, batches }
  if (!random.one(4)) return scenario
  // What breaks the framing comes last: nothing that follows is a message.
  const last = batches.at(-1)
  if (last === undefined) return scenario
  if (random.one(3)) last.push(unframed(random, random.pick(mutated)))
  return random.one(2) ? { ...scenario, bytesOfLast: random.below(40 * last.length) } : scenario
}

function agree(random: Random, { features, protocolFeatures }: Offer): Agreed {
  const only = (bits: bigint): bigint => {
    let left = 0n
    for (let bit = 0n; bit < 64n; bit++) if ((bits >> bit) & 1n && !random.one(8)) left |= 1n << bit
    return left
  }
  let chosen = only(features)
  const bit = (number: number): bigint => 1n << BigInt(number)
  if (!random.one(3)) chosen &= ~bit(VIRTIO_F_ACCESS_PLATFORM)
  if (!random.one(2)) chosen &= ~bit(VIRTIO_F_RING_PACKED)
  if (!random.one(4)) chosen &= ~bit(VHOST_F_LOG_ALL)
  let protocol = only(protocolFeatures)
  // Without acknowledgements the first refusal is the end; most sessions shall live longer.
  if (!random.one(10)) protocol |= bit(wire.VHOST_USER_PROTOCOL_F_REPLY_ACK) & protocolFeatures
  if ((chosen & bit(VIRTIO_F_ACCESS_PLATFORM)) !== 0n)
    protocol |= bit(wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ) & protocolFeatures
  if (random.one(2)) protocol &= ~bit(wire.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
  return {
    features: chosen,
    protocolFeatures: protocol,
    packed: (chosen & bit(VIRTIO_F_RING_PACKED)) !== 0n,
    translated: (chosen & bit(VIRTIO_F_ACCESS_PLATFORM)) !== 0n,
  }
}

// ---- honest messages

function message(
  request: number,
  payload: Uint8Array | undefined,
  fds: readonly FdKind[] = [],
  flags = NEED_REPLY
): FuzzMessage {
  const text = payload === undefined ? '' : Buffer.from(payload).toString('hex')
  return fds.length === 0 ? { request, flags, payload: text } : { request, flags, payload: text, fds }
}

function words(...values: number[]): Uint8Array {
  return new Uint8Array(Uint32Array.from(values).buffer)
}

function region(index: number): Uint8Array {
  const bytes = new Uint8Array(wire.MEMORY_REGION_SIZE)
  wire.writeMemoryRegion(new DataView(bytes.buffer), 0, {
    guestAddress: GPA[index]!,
    size: REGION_BYTES,
    userAddress: UVA[index]!,
    mmapOffset: BigInt(index) * REGION_BYTES,
  })
  return bytes
}

/** An address of the front-end for an offset in the memory file. */
function userAddress(offset: number): bigint {
  const index = offset < SECOND_REGION ? 0 : 1
  return UVA[index]! + BigInt(offset) - BigInt(index) * REGION_BYTES
}

/** Every request with values that may be honest, by number. */
function honest(request: number, random: Random, agreed: Agreed, offer: Offer): FuzzMessage {
  // A refusal of many is the end of the session: they are seldom bad.
  const bad = random.one(100)
  const queue = random.below(bad ? 40 : queuesOf(offer))
  const parts = ringParts(queue)
  // Behind a vIOMMU addresses are IOVAs: those of the memory, moved.
  const address = (offset: number): bigint => (agreed.translated ? BigInt(offset) : userAddress(offset))
  switch (request) {
    case wire.VHOST_USER_SET_FEATURES:
      return message(
        request,
        wire.u64(random.one(4) ? agreed.features ^ (1n << BigInt(VHOST_F_LOG_ALL)) : agreed.features)
      )
    case wire.VHOST_USER_SET_PROTOCOL_FEATURES:
      return message(request, wire.u64(agreed.protocolFeatures), [], wire.VHOST_USER_VERSION)
    case wire.VHOST_USER_SET_MEM_TABLE: {
      const count = 1 + random.below(2)
      const payload = Buffer.concat([words(count, 0), ...[0, 1].slice(0, count).map(region)])
      return message(
        request,
        payload,
        Array.from({ length: count }, () => memoryKind(random))
      )
    }
    case wire.VHOST_USER_ADD_MEM_REG:
      return message(request, Buffer.concat([words(0, 0), region(random.below(2))]), [memoryKind(random)])
    case wire.VHOST_USER_REM_MEM_REG:
      return message(request, Buffer.concat([words(0, 0), region(random.below(2))]))
    case wire.VHOST_USER_SET_LOG_BASE: {
      const payload = new Uint8Array(wire.LOG_DESCRIPTION_SIZE)
      const size = bad ? 131n : random.pick([49_152n, 33_000n])
      wire.writeLog(new DataView(payload.buffer), 0, { size, offset: random.pick([0n, 4096n, 8n]) })
      return message(request, payload, ['log area'])
    }
    case wire.VHOST_USER_SET_LOG_FD:
      return message(request, undefined, ['event'])
    case wire.VHOST_USER_SET_VRING_NUM:
      return message(request, words(queue, random.one(4) ? 1 << random.below(9) : RING_ENTRIES))
    case wire.VHOST_USER_SET_VRING_ADDR: {
      const payload = new Uint8Array(wire.VRING_ADDRESS_SIZE)
      wire.writeVringAddress(new DataView(payload.buffer), 0, {
        index: queue,
        flags: random.one(4) ? 1 : 0,
        descriptor: address(parts.descriptor),
        used: address(parts.device),
        available: address(parts.driver),
        log: BigInt(parts.device),
      })
      return message(request, payload)
    }
    case wire.VHOST_USER_SET_VRING_BASE:
      return message(
        request,
        words(queue, agreed.packed ? (random.one(4) ? 0x8000 : 0x8000_8000) : random.one(8) ? 65_535 : 0)
      )
    case wire.VHOST_USER_GET_VRING_BASE:
      return message(request, words(queue, random.below(2)))
    case wire.VHOST_USER_SET_VRING_KICK:
    case wire.VHOST_USER_SET_VRING_CALL:
    case wire.VHOST_USER_SET_VRING_ERR:
      return random.one(5) ? message(request, words(queue | 256, 0)) : message(request, words(queue, 0), ['event'])
    case wire.VHOST_USER_SET_VRING_ENABLE:
      return message(request, words(queue, random.one(6) ? 0 : 1))
    case wire.VHOST_USER_VRING_KICK:
      return message(request, words(queue, 0))
    case wire.VHOST_USER_SEND_RARP:
      return message(request, wire.u64(0x0100_6600_5452n))
    case wire.VHOST_USER_NET_SET_MTU:
      return message(request, wire.u64(BigInt(random.pick([68, 1500, 9000, 65_535]))))
    case wire.VHOST_USER_SET_BACKEND_REQ_FD:
      return message(request, undefined, ['channel'])
    case wire.VHOST_USER_IOTLB_MSG: {
      const payload = new Uint8Array(random.one(4) ? wire.IOTLB_MESSAGE_SIZE : wire.IOTLB_MESSAGE_PADDED_SIZE)
      const page = random.below(MEMORY_BYTES / 4096)
      const pages = random.pick([1, 1, 2, 4, SECOND_REGION / 4096])
      wire.writeIotlb(new DataView(payload.buffer), 0, {
        iova: BigInt(page * 4096),
        size: BigInt(pages * 4096),
        userAddress: userAddress(page * 4096),
        permissions: random.one(4) ? random.below(4) : 3,
        type: random.one(4) ? wire.VHOST_IOTLB_INVALIDATE : wire.VHOST_IOTLB_UPDATE,
      })
      return message(request, payload)
    }
    case wire.VHOST_USER_GET_CONFIG:
    case wire.VHOST_USER_SET_CONFIG: {
      const get = request === wire.VHOST_USER_GET_CONFIG
      const size = get ? 60 : 1
      // The write-cache switch of a disk.
      const offset = get ? 0 : offer.device === 'blk' ? 32 : random.below(12)
      return message(
        request,
        Buffer.concat([words(offset, size, random.below(2)), Buffer.alloc(size, random.below(2))])
      )
    }
    case wire.VHOST_USER_GET_INFLIGHT_FD:
    case wire.VHOST_USER_SET_INFLIGHT_FD: {
      const payload = new Uint8Array(
        random.one(2) ? wire.INFLIGHT_DESCRIPTION_SIZE : wire.INFLIGHT_DESCRIPTION_PADDED_SIZE
      )
      wire.writeInflight(new DataView(payload.buffer), 0, {
        mmapSize: request === wire.VHOST_USER_GET_INFLIGHT_FD ? 0n : 131_072n,
        mmapOffset: BigInt(random.pick([0, 0, 4096, 64])),
        numQueues: bad ? random.below(20) : 1 + random.below(queuesOf(offer)),
        queueSize: bad ? random.odd32() & 0xffff : random.one(4) ? 1 + random.below(256) : 256,
      })
      return message(request, payload, request === wire.VHOST_USER_SET_INFLIGHT_FD ? ['in-flight area'] : [])
    }
    case wire.VHOST_USER_SET_STATUS:
      return message(request, wire.u64(BigInt(random.pick([0, 1, 3, 11, 15, 128]))))
    case wire.VHOST_USER_SET_DEVICE_STATE_FD: {
      const load = random.one(2)
      return message(request, words(load ? 1 : 0, 0), [load ? 'state pipe read' : 'state pipe write'])
    }
    default:
      return message(request, undefined)
  }
}

function memoryKind(random: Random): FdKind {
  return random.one(30) ? 'shrinking memory' : random.one(12) ? 'other memory' : 'memory'
}

/** As QEMU begins, and then a life of whatever comes. */
function session(random: Random, agreed: Agreed, offer: Offer): FuzzMessage[] {
  const make = (request: number): FuzzMessage => honest(request, random, agreed, offer)
  const opening = [
    wire.VHOST_USER_GET_FEATURES,
    wire.VHOST_USER_GET_PROTOCOL_FEATURES,
    wire.VHOST_USER_SET_PROTOCOL_FEATURES,
    wire.VHOST_USER_GET_QUEUE_NUM,
    wire.VHOST_USER_GET_MAX_MEM_SLOTS,
    wire.VHOST_USER_SET_BACKEND_REQ_FD,
    wire.VHOST_USER_SET_OWNER,
    wire.VHOST_USER_SET_STATUS,
    wire.VHOST_USER_GET_CONFIG,
  ]
    .filter((request) => {
      const feature = FATAL.get(request)
      return feature === undefined || (agreed.protocolFeatures >> BigInt(feature)) & 1n
    })
    .map(make)
  const features = {
    ...make(wire.VHOST_USER_SET_FEATURES),
    payload: Buffer.from(wire.u64(agreed.features)).toString('hex'),
  }
  const messages = [...opening, features]
  const has = (bit: number): boolean => ((agreed.protocolFeatures >> BigInt(bit)) & 1n) === 1n
  if (random.one(3) && has(wire.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD))
    messages.push(make(wire.VHOST_USER_GET_INFLIGHT_FD), make(wire.VHOST_USER_SET_INFLIGHT_FD))
  if (random.one(4) && has(wire.VHOST_USER_PROTOCOL_F_LOG_SHMFD))
    messages.push(make(wire.VHOST_USER_SET_LOG_BASE), make(wire.VHOST_USER_SET_LOG_FD))
  if (random.one(2)) messages.push(make(wire.VHOST_USER_SET_MEM_TABLE))
  else messages.push(make(wire.VHOST_USER_ADD_MEM_REG), make(wire.VHOST_USER_ADD_MEM_REG))
  if (agreed.translated && !random.one(3)) {
    const payload = new Uint8Array(wire.IOTLB_MESSAGE_PADDED_SIZE)
    wire.writeIotlb(new DataView(payload.buffer), 0, {
      iova: 0n,
      size: REGION_BYTES,
      userAddress: UVA[0],
      permissions: 3,
      type: wire.VHOST_IOTLB_UPDATE,
    })
    messages.push(message(wire.VHOST_USER_IOTLB_MSG, payload))
  }
  for (let rings = random.below(6); rings > 0; rings--) messages.push(...startRing(random, agreed, offer))
  for (let steps = random.below(300); steps > 0; steps--) {
    if (random.one(12)) messages.push(...startRing(random, agreed, offer))
    else messages.push(make(anyRequest(random, agreed)))
  }
  return messages
}

function anyRequest(random: Random, agreed: Agreed): number {
  for (;;) {
    const request = 1 + random.below(LAST_REQUEST)
    const feature = FATAL.get(request)
    if (feature === undefined || (agreed.protocolFeatures >> BigInt(feature)) & 1n || random.one(100)) return request
  }
}

function queuesOf({ device }: Offer): number {
  return VICTIMS[device]
}

function startRing(random: Random, agreed: Agreed, offer: Offer): FuzzMessage[] {
  const queue = random.below(queuesOf(offer))
  return [
    wire.VHOST_USER_SET_VRING_NUM,
    wire.VHOST_USER_SET_VRING_BASE,
    wire.VHOST_USER_SET_VRING_ADDR,
    wire.VHOST_USER_SET_VRING_CALL,
    wire.VHOST_USER_SET_VRING_ERR,
    wire.VHOST_USER_SET_VRING_KICK,
    wire.VHOST_USER_SET_VRING_ENABLE,
  ].map((request) => {
    const made = honest(request, random, agreed, offer)
    const payload = Buffer.from(made.payload, 'hex')
    // All of them about one ring. Its addresses may be another one's.
    payload[0] = queue
    return { ...made, payload: payload.toString('hex') }
  })
}

/** Any requests in any order, few of them negotiated. */
function soup(random: Random, agreed: Agreed, offer: Offer): FuzzMessage[] {
  const messages: FuzzMessage[] = []
  if (!random.one(3)) messages.push(honest(wire.VHOST_USER_SET_PROTOCOL_FEATURES, random, agreed, offer))
  for (let steps = 1 + random.below(250); steps > 0; steps--)
    messages.push(honest(anyRequest(random, agreed), random, agreed, offer))
  return messages
}

// ---- and what becomes of them

/** One message changed, doubled, or gone. The framing holds. */
function mutate(random: Random, original: FuzzMessage): FuzzMessage[] {
  const payload = Buffer.from(original.payload, 'hex')
  switch (random.below(12)) {
    case 0:
      return []
    case 1:
      return [original, original]
    case 2:
      return [{ ...original, request: random.one(4) ? random.odd32() : random.below(LAST_REQUEST + 6) }]
    case 3:
      // Version and reply flag end the connection; the others mean nothing.
      return [
        { ...original, flags: random.one(20) ? random.odd32() : (original.flags ^ (8 << random.below(29))) >>> 0 },
      ]
    case 4:
      return [{ ...original, payload: payload.subarray(0, random.below(payload.length + 1)).toString('hex') }]
    case 5: {
      const more = random.one(20) ? 4096 - payload.length : 1 + random.below(40)
      return [{ ...original, payload: Buffer.concat([payload, random.fill(new Uint8Array(more))]).toString('hex') }]
    }
    case 6:
    case 7:
      if (payload.length === 0) return [original]
      payload[random.below(payload.length)]! ^= 1 << random.below(8)
      return [{ ...original, payload: payload.toString('hex') }]
    case 8:
      if (payload.length < 4) return [original]
      payload.writeUInt32LE(random.odd32(), 4 * random.below(Math.floor(payload.length / 4)))
      return [{ ...original, payload: payload.toString('hex') }]
    case 9:
      if (payload.length < 8) return [original]
      payload.writeBigUInt64LE(random.odd64(), 8 * random.below(Math.floor(payload.length / 8)))
      return [{ ...original, payload: payload.toString('hex') }]
    case 10:
      return [{ ...original, fds: otherFds(random, original.fds ?? []) }]
    default:
      return [{ ...original, cuts: cutsOf(random, 12 + payload.length) }]
  }
}

function otherFds(random: Random, fds: readonly FdKind[]): readonly FdKind[] {
  switch (random.below(4)) {
    case 0:
      return []
    case 1:
      return Array.from({ length: random.one(3) ? random.below(65) : 1 + random.below(9) }, () => random.pick(FD_KINDS))
    case 2:
      return [...fds, random.pick(FD_KINDS)]
    default:
      return fds.map(() => random.pick(FD_KINDS))
  }
}

function cutsOf(random: Random, length: number): number[] {
  const cuts = new Set<number>()
  for (let count = 1 + random.below(4); count > 0; count--) cuts.add(1 + random.below(length - 1))
  return [...cuts].sort((a, b) => a - b)
}

/** A message after which nobody knows where the next one begins. */
function unframed(random: Random, original: FuzzMessage | undefined): FuzzMessage {
  const base = original ?? { request: 1, flags: 1, payload: '' }
  return random.one(2)
    ? { ...base, size: random.odd32() }
    : {
        ...base,
        payload: Buffer.from(random.fill(new Uint8Array(random.below(600)))).toString('hex'),
        size: random.below(4200),
      }
}
