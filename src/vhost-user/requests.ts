/**
 * The requests that a session serves, one row each: payload size, fds, the protocol feature that it belongs to, and
 * what it does. A request that has no row is refused; protocol-table.ts says why.
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
  /** A reply of its own that says no; without it a refusal ends the connection. */
  readonly refusal?: Uint8Array
  /** Returns its own reply, if it has one. Fds that it takes from `message` are its own. @throws ProtocolError */
  serve(session: Session, payload: DataView, message: Message): Reply | Promise<Reply>
}

/** A payload, or one with fds, which are closed when it was sent. */
export type Reply = Uint8Array | { readonly payload: Uint8Array; readonly fds: readonly number[] } | undefined

const CONFIG_HEADER = 12

type Serve<Result> = (session: Session, payload: DataView, message: Message) => Result
type More = Pick<RequestRow, 'fds' | 'feature'>

/** A row whose effect has no reply of its own. */
function effect(payload: RequestRow['payload'], serve: Serve<void | Promise<void>>, more: More = {}): RequestRow {
  return {
    payload,
    ...more,
    serve: async (session, view, message) => {
      await serve(session, view, message)
      return undefined
    },
  }
}

function query(
  payload: RequestRow['payload'],
  serve: RequestRow['serve'],
  more: More & Pick<RequestRow, 'refusal'> = {}
): RequestRow {
  return { payload, replies: true, serve, ...more }
}

const queries: Record<number, RequestRow> = {
  [wire.VHOST_USER_GET_FEATURES]: query(0, (session) => wire.u64(session.host.features)),
  [wire.VHOST_USER_GET_PROTOCOL_FEATURES]: query(0, (session) => wire.u64(session.offeredProtocolFeatures)),
  // Queues, as crosvm takes it, which asks the device. QEMU and DPDK compare it with pairs of a network card: more than
  // the device has pass that, and are refused at the first ring that isn't there.
  [wire.VHOST_USER_GET_QUEUE_NUM]: query(0, (session) => wire.u64(BigInt(session.rings.all.length)), {
    feature: wire.VHOST_USER_PROTOCOL_F_MQ,
  }),
  [wire.VHOST_USER_GET_MAX_MEM_SLOTS]: query(0, () => wire.u64(BigInt(wire.MAX_MEM_SLOTS)), {
    feature: wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  }),
  [wire.VHOST_USER_GET_STATUS]: query(0, (session) => wire.u64(BigInt(session.negotiated.status)), {
    feature: wire.VHOST_USER_PROTOCOL_F_STATUS,
  }),
}

const features: Record<number, RequestRow> = {
  [wire.VHOST_USER_SET_FEATURES]: effect(8, (session, payload) => session.setFeatures(payload.getBigUint64(0, true))),
  [wire.VHOST_USER_SET_PROTOCOL_FEATURES]: effect(8, (session, payload) =>
    session.setProtocolFeatures(payload.getBigUint64(0, true))
  ),
  // Ownership has no meaning beyond the connection.
  [wire.VHOST_USER_SET_OWNER]: effect(0, () => {}),
  // Deprecated; the spec advises to ignore it, since front-ends send it when they mean other things.
  [wire.VHOST_USER_RESET_OWNER]: effect(0, () => {}),
  [wire.VHOST_USER_SET_STATUS]: effect(8, (session, payload) => session.setStatus(payload.getBigUint64(0, true)), {
    feature: wire.VHOST_USER_PROTOCOL_F_STATUS,
  }),
  [wire.VHOST_USER_RESET_DEVICE]: effect(0, (session) => session.resetDevice(), {
    feature: wire.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
  }),
  [wire.VHOST_USER_SET_BACKEND_REQ_FD]: effect(
    0,
    (session, _payload, message) => session.channel.attach(message.take()[0]!),
    { fds: [1, 1], feature: wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ }
  ),
}

const memory: Record<number, RequestRow> = {
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
      return session.exchange.setTable(regions, message.fds)
    },
    { fds: [0, wire.VHOST_MEMORY_BASELINE_NREGIONS] }
  ),
  [wire.VHOST_USER_ADD_MEM_REG]: effect(
    8 + wire.MEMORY_REGION_SIZE,
    (session, payload, message) => session.exchange.add(wire.readMemoryRegion(payload, 8), message.fds[0]!),
    { fds: [1, 1], feature: wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS }
  ),
  [wire.VHOST_USER_REM_MEM_REG]: effect(
    8 + wire.MEMORY_REGION_SIZE,
    (session, payload) => session.exchange.remove(wire.readMemoryRegion(payload, 8)),
    // Should carry none; some front-ends send one, which is closed with the message.
    { fds: [0, 1], feature: wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS }
  ),
  [wire.VHOST_USER_IOTLB_MSG]: query(
    [wire.IOTLB_MESSAGE_SIZE, wire.IOTLB_MESSAGE_PADDED_SIZE],
    async (session, payload) => {
      await session.exchange.translate(wire.readIotlb(payload, 0))
      return wire.u64(0n)
    },
    { refusal: wire.u64(1n) }
  ),
}

const rings: Record<number, RequestRow> = {
  [wire.VHOST_USER_SET_VRING_NUM]: effect(8, (session, payload) =>
    session.rings.setSize(payload.getUint32(0, true), payload.getUint32(4, true))
  ),
  [wire.VHOST_USER_SET_VRING_ADDR]: effect(wire.VRING_ADDRESS_SIZE, (session, payload) =>
    session.rings.setAddress(wire.readVringAddress(payload, 0))
  ),
  [wire.VHOST_USER_SET_VRING_BASE]: effect(8, (session, payload) =>
    session.rings.setBase(payload.getUint32(0, true), payload.getUint32(4, true))
  ),
  [wire.VHOST_USER_GET_VRING_BASE]: query(8, async (session, payload) => {
    const index = payload.getUint32(0, true)
    return wire.vringState(index, await session.getVringBase(index, payload.getUint32(4, true)))
  }),
  [wire.VHOST_USER_SET_VRING_KICK]: effect(
    8,
    (session, payload, message) => session.rings.setKick(payload.getBigUint64(0, true), message.take()),
    { fds: [0, 1] }
  ),
  [wire.VHOST_USER_SET_VRING_CALL]: effect(
    8,
    (session, payload, message) => session.rings.setCall(payload.getBigUint64(0, true), message.take()),
    { fds: [0, 1] }
  ),
  [wire.VHOST_USER_SET_VRING_ERR]: effect(
    8,
    (session, payload, message) => session.rings.setErr(payload.getBigUint64(0, true), message.take()),
    { fds: [0, 1] }
  ),
  [wire.VHOST_USER_SET_VRING_ENABLE]: effect(8, (session, payload) =>
    session.rings.setEnable(payload.getUint32(0, true), payload.getUint32(4, true))
  ),
  [wire.VHOST_USER_VRING_KICK]: effect(
    8,
    (session, payload) => session.rings.kick(payload.getUint32(0, true), payload.getUint32(4, true)),
    { feature: wire.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS }
  ),
}

/** What survives: in-flight buffer, dirty log, device state. */
const survival: Record<number, RequestRow> = {
  [wire.VHOST_USER_GET_INFLIGHT_FD]: query(
    [wire.INFLIGHT_DESCRIPTION_SIZE, wire.INFLIGHT_DESCRIPTION_PADDED_SIZE],
    (session, payload) => {
      const { description, fd } = session.getInflight(wire.readInflight(payload, 0))
      // As long as the question: QEMU compares it with the size of its C structure.
      const reply = new Uint8Array(payload.byteLength)
      wire.writeInflight(new DataView(reply.buffer), 0, description)
      return { payload: reply, fds: [fd] }
    },
    { feature: wire.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD }
  ),
  [wire.VHOST_USER_SET_INFLIGHT_FD]: effect(
    [wire.INFLIGHT_DESCRIPTION_SIZE, wire.INFLIGHT_DESCRIPTION_PADDED_SIZE],
    (session, payload, message) => session.setInflight(wire.readInflight(payload, 0), message.fds[0]!),
    { fds: [1, 1], feature: wire.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD }
  ),
  // With LOG_SHMFD it has a reply, whose payload the spec leaves open: libvhost-user answers a u64, DPDK nothing, QEMU
  // takes both. It says no more than that the log is there; without a log a migration must not go on.
  [wire.VHOST_USER_SET_LOG_BASE]: query(
    wire.LOG_DESCRIPTION_SIZE,
    async (session, payload, message) => {
      await session.log.setBase(wire.readLog(payload, 0), message.fds[0]!, () => session.rings.checkLogs())
      return wire.u64(0n)
    },
    { fds: [1, 1], feature: wire.VHOST_USER_PROTOCOL_F_LOG_SHMFD }
  ),
  // The spec has no payload; who fills in the union's u64 is understood as well.
  [wire.VHOST_USER_SET_LOG_FD]: effect([0, 8], (session, _payload, message) => session.setLogFd(message.take()[0]!), {
    fds: [1, 1],
    feature: wire.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
  }),
  [wire.VHOST_USER_SET_DEVICE_STATE_FD]: query(
    8,
    (session, payload, message) => {
      session.transferState(payload.getUint32(0, true), payload.getUint32(4, true), message.take()[0]!)
      return wire.u64(BigInt(wire.VHOST_USER_DEVICE_STATE_NOFD_MASK))
    },
    {
      fds: [1, 1],
      feature: wire.VHOST_USER_PROTOCOL_F_DEVICE_STATE,
      refusal: wire.u64(BigInt(wire.VHOST_USER_DEVICE_STATE_NOFD_MASK | 1)),
    }
  ),
  [wire.VHOST_USER_CHECK_DEVICE_STATE]: query(
    0,
    async (session) => {
      await session.checkState()
      return wire.u64(0n)
    },
    { feature: wire.VHOST_USER_PROTOCOL_F_DEVICE_STATE, refusal: wire.u64(1n) }
  ),
}

const device: Record<number, RequestRow> = {
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
    { feature: wire.VHOST_USER_PROTOCOL_F_CONFIG }
  ),
  [wire.VHOST_USER_SET_CONFIG]: effect(
    [CONFIG_HEADER, CONFIG_HEADER + wire.VHOST_USER_MAX_CONFIG_SIZE],
    (session, payload) => {
      const size = payload.getUint32(4, true)
      if (CONFIG_HEADER + size !== payload.byteLength) {
        throw new ProtocolError('ERR_PROTOCOL_SIZE', `${payload.byteLength} bytes for a config write of ${size}`)
      }
      const bytes = new Uint8Array(payload.buffer, payload.byteOffset + CONFIG_HEADER, size)
      return session.setConfig(payload.getUint32(0, true), bytes, payload.getUint32(8, true))
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
}

export const REQUESTS: Readonly<Record<number, RequestRow>> = {
  ...queries,
  ...features,
  ...memory,
  ...rings,
  ...survival,
  ...device,
}
