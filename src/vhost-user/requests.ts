/**
 * The requests that a session serves, one row each: payload size, fds, the protocol feature that it belongs to, and
 * what it does. A request that has no row is refused.
 */
import type { Message } from './connection.ts'
import { ProtocolError } from './errors.ts'
import type { Session } from './session.ts'
import * as wire from './wire.ts'

export interface RequestRow {
  /** Payload size in bytes: exact, or smallest and largest. */
  readonly payload: number | readonly [number, number]
  /** How many fds it carries; none when absent. */
  readonly fds?: readonly [number, number]
  /** The protocol feature without which it may not be sent. */
  readonly feature?: number
  /** It has a reply of its own, which is its answer also when the front-end set NEED_REPLY. */
  readonly replies?: true
  /** Returns its own reply, if it has one. Fds that it takes from `message` are its own. @throws ProtocolError */
  serve(session: Session, payload: DataView, message: Message): Uint8Array | undefined | Promise<Uint8Array | undefined>
}

const CONFIG_HEADER = 12

function vringState(index: number, num: number): Uint8Array {
  const bytes = new Uint8Array(8)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, index, true)
  view.setUint32(4, num, true)
  return bytes
}

/** A row whose effect has no reply of its own. */
function effect(
  payload: RequestRow['payload'],
  serve: (session: Session, payload: DataView, message: Message) => void | Promise<void>,
  more: { fds?: readonly [number, number]; feature?: number } = {}
): RequestRow {
  return {
    payload,
    ...more,
    serve: async (session, view, message) => {
      await serve(session, view, message)
      return undefined
    },
  }
}

function query(payload: RequestRow['payload'], serve: RequestRow['serve'], feature?: number): RequestRow {
  return { payload, replies: true, serve, ...(feature === undefined ? {} : { feature }) }
}

export const REQUESTS: Readonly<Record<number, RequestRow>> = {
  [wire.VHOST_USER_GET_FEATURES]: query(0, (session) => wire.u64(session.host.features)),
  [wire.VHOST_USER_SET_FEATURES]: effect(8, (session, payload) => session.setFeatures(payload.getBigUint64(0, true))),
  // Ownership has no meaning beyond the connection.
  [wire.VHOST_USER_SET_OWNER]: effect(0, () => {}),
  // Deprecated; the spec advises to ignore it, since front-ends send it when they mean other things.
  [wire.VHOST_USER_RESET_OWNER]: effect(0, () => {}),
  [wire.VHOST_USER_GET_PROTOCOL_FEATURES]: query(0, (session) => wire.u64(session.offeredProtocolFeatures)),
  [wire.VHOST_USER_SET_PROTOCOL_FEATURES]: effect(8, (session, payload) =>
    session.setProtocolFeatures(payload.getBigUint64(0, true))
  ),
  // Queues, as crosvm takes it, which asks the device. QEMU and DPDK compare it with pairs of a network card: more than the
  // device has pass that, and are refused at the first ring that isn't there.
  [wire.VHOST_USER_GET_QUEUE_NUM]: query(
    0,
    (session) => wire.u64(BigInt(session.rings.length)),
    wire.VHOST_USER_PROTOCOL_F_MQ
  ),

  [wire.VHOST_USER_SET_MEM_TABLE]: effect(
    [8, 8 + wire.VHOST_MEMORY_BASELINE_NREGIONS * wire.MEMORY_REGION_SIZE],
    (session, payload, message) => {
      const count = payload.getUint32(0, true)
      if (payload.byteLength !== 8 + count * wire.MEMORY_REGION_SIZE) {
        throw new ProtocolError('ERR_PROTOCOL_SIZE', `${payload.byteLength} bytes for ${count} regions`)
      }
      if (message.fdCount !== count)
        throw new ProtocolError('ERR_PROTOCOL_FDS', `${message.fdCount} file descriptors for ${count} regions`)
      const regions = Array.from({ length: count }, (_, i) =>
        wire.readMemoryRegion(payload, 8 + i * wire.MEMORY_REGION_SIZE)
      )
      return session.setMemoryTable(regions, message.fds)
    },
    { fds: [0, wire.VHOST_MEMORY_BASELINE_NREGIONS] }
  ),
  [wire.VHOST_USER_GET_MAX_MEM_SLOTS]: query(
    0,
    (session) => wire.u64(BigInt(session.maxMemorySlots)),
    wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
  ),
  [wire.VHOST_USER_ADD_MEM_REG]: effect(
    8 + wire.MEMORY_REGION_SIZE,
    (session, payload, message) => session.addMemoryRegion(wire.readMemoryRegion(payload, 8), message.fds[0]!),
    { fds: [1, 1], feature: wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS }
  ),
  [wire.VHOST_USER_REM_MEM_REG]: effect(
    8 + wire.MEMORY_REGION_SIZE,
    (session, payload) => {
      const region = wire.readMemoryRegion(payload, 8)
      return session.removeMemoryRegion(region.guestAddress, region.userAddress, region.size)
    },
    // Should carry none; some front-ends send one, which is closed with the message.
    { fds: [0, 1], feature: wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS }
  ),

  [wire.VHOST_USER_SET_VRING_NUM]: effect(8, (session, payload) =>
    session.setVringNum(payload.getUint32(0, true), payload.getUint32(4, true))
  ),
  [wire.VHOST_USER_SET_VRING_ADDR]: effect(wire.VRING_ADDRESS_SIZE, (session, payload) =>
    session.setVringAddress(wire.readVringAddress(payload, 0))
  ),
  [wire.VHOST_USER_SET_VRING_BASE]: effect(8, (session, payload) =>
    session.setVringBase(payload.getUint32(0, true), payload.getUint32(4, true))
  ),
  [wire.VHOST_USER_GET_VRING_BASE]: query(8, async (session, payload) => {
    const index = payload.getUint32(0, true)
    return vringState(index, await session.getVringBase(index))
  }),
  [wire.VHOST_USER_SET_VRING_KICK]: effect(
    8,
    (session, payload, message) => session.setVringKick(payload.getBigUint64(0, true), message.take()),
    { fds: [0, 1] }
  ),
  [wire.VHOST_USER_SET_VRING_CALL]: effect(
    8,
    (session, payload, message) => session.setVringCall(payload.getBigUint64(0, true), message.take()),
    { fds: [0, 1] }
  ),
  [wire.VHOST_USER_SET_VRING_ERR]: effect(
    8,
    (session, payload, message) => session.setVringErr(payload.getBigUint64(0, true), message.take()),
    { fds: [0, 1] }
  ),
  [wire.VHOST_USER_SET_VRING_ENABLE]: effect(8, (session, payload) =>
    session.setVringEnable(payload.getUint32(0, true), payload.getUint32(4, true))
  ),

  [wire.VHOST_USER_SET_BACKEND_REQ_FD]: effect(
    0,
    (session, _payload, message) => session.setBackendChannel(message.take()[0]!),
    {
      fds: [1, 1],
      feature: wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    }
  ),
  [wire.VHOST_USER_GET_CONFIG]: query(
    [CONFIG_HEADER, CONFIG_HEADER + wire.VHOST_USER_MAX_CONFIG_SIZE],
    (session, payload) => {
      const offset = payload.getUint32(0, true)
      const size = payload.getUint32(4, true)
      const bytes = CONFIG_HEADER + size === payload.byteLength ? session.getConfig(offset, size) : undefined
      // vhost-user.rst GET_CONFIG: a zero-length payload says that it failed.
      if (bytes === undefined) return new Uint8Array(0)
      const reply = new Uint8Array(payload.byteLength)
      reply.set(new Uint8Array(payload.buffer, payload.byteOffset, CONFIG_HEADER))
      reply.set(bytes, CONFIG_HEADER)
      return reply
    },
    wire.VHOST_USER_PROTOCOL_F_CONFIG
  ),
  [wire.VHOST_USER_SET_CONFIG]: effect(
    [CONFIG_HEADER, CONFIG_HEADER + wire.VHOST_USER_MAX_CONFIG_SIZE],
    (session, payload) => {
      const size = payload.getUint32(4, true)
      if (CONFIG_HEADER + size !== payload.byteLength) {
        throw new ProtocolError('ERR_PROTOCOL_SIZE', `${payload.byteLength} bytes for a config write of ${size}`)
      }
      session.setConfig(
        payload.getUint32(0, true),
        new Uint8Array(payload.buffer, payload.byteOffset + CONFIG_HEADER, size)
      )
    },
    { feature: wire.VHOST_USER_PROTOCOL_F_CONFIG }
  ),
  [wire.VHOST_USER_SEND_RARP]: effect(
    8,
    (session, payload) =>
      session.announce(new Uint8Array(payload.buffer.slice(payload.byteOffset, payload.byteOffset + 6))),
    { feature: wire.VHOST_USER_PROTOCOL_F_RARP }
  ),
  [wire.VHOST_USER_NET_SET_MTU]: effect(8, (session, payload) => session.setMtu(payload.getBigUint64(0, true)), {
    feature: wire.VHOST_USER_PROTOCOL_F_MTU,
  }),
  [wire.VHOST_USER_RESET_DEVICE]: effect(0, (session) => session.resetDevice(), {
    feature: wire.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
  }),
}
