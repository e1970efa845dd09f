/** Packets of virtio-vsock (virtio 1.3 §5.10.6): constants, and the header as fields. */
import type { ChainReader, ChainWriter } from '../../src/device/index.ts'

export const VIRTIO_ID_VSOCK = 19
export const VIRTIO_VSOCK_F_STREAM = 0

/** The host's context id. */
export const VMADDR_CID_HOST = 2n

export const VIRTIO_VSOCK_TYPE_STREAM = 1

export const VIRTIO_VSOCK_OP_REQUEST = 1
export const VIRTIO_VSOCK_OP_RESPONSE = 2
export const VIRTIO_VSOCK_OP_RST = 3
export const VIRTIO_VSOCK_OP_SHUTDOWN = 4
export const VIRTIO_VSOCK_OP_RW = 5
export const VIRTIO_VSOCK_OP_CREDIT_UPDATE = 6
export const VIRTIO_VSOCK_OP_CREDIT_REQUEST = 7

/** Flags of a SHUTDOWN: its sender will receive no more, will send no more. */
export const VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE = 1
export const VIRTIO_VSOCK_SHUTDOWN_F_SEND = 2

/** What an event buffer says (§5.10.6.7): all connections are gone. */
export const VIRTIO_VSOCK_EVENT_TRANSPORT_RESET = 0

export const HEADER_SIZE = 44

const SRC_CID = 0
const DST_CID = 8
const SRC_PORT = 16
const DST_PORT = 20
const LEN = 24
const TYPE = 28
const OP = 30
const FLAGS = 32
const BUF_ALLOC = 36
const FWD_CNT = 40

/** `struct virtio_vsock_hdr`, used again for each packet. */
export class Header {
  srcCid = 0n
  dstCid = 0n
  srcPort = 0
  dstPort = 0
  /** Bytes of payload behind it. */
  length = 0
  type = 0
  op = 0
  flags = 0
  bufAlloc = 0
  fwdCnt = 0
  readonly #bytes = new Uint8Array(HEADER_SIZE)
  readonly #view = new DataView(this.#bytes.buffer)

  /** There are at least {@link HEADER_SIZE} bytes. */
  read(reader: ChainReader): void {
    const view = this.#view
    reader.into(this.#bytes)
    this.srcCid = view.getBigUint64(SRC_CID, true)
    this.dstCid = view.getBigUint64(DST_CID, true)
    this.srcPort = view.getUint32(SRC_PORT, true)
    this.dstPort = view.getUint32(DST_PORT, true)
    this.length = view.getUint32(LEN, true)
    this.type = view.getUint16(TYPE, true)
    this.op = view.getUint16(OP, true)
    this.flags = view.getUint32(FLAGS, true)
    this.bufAlloc = view.getUint32(BUF_ALLOC, true)
    this.fwdCnt = view.getUint32(FWD_CNT, true)
  }

  write(writer: ChainWriter): void {
    const view = this.#view
    view.setBigUint64(SRC_CID, this.srcCid, true)
    view.setBigUint64(DST_CID, this.dstCid, true)
    view.setUint32(SRC_PORT, this.srcPort, true)
    view.setUint32(DST_PORT, this.dstPort, true)
    view.setUint32(LEN, this.length, true)
    view.setUint16(TYPE, this.type, true)
    view.setUint16(OP, this.op, true)
    view.setUint32(FLAGS, this.flags, true)
    view.setUint32(BUF_ALLOC, this.bufAlloc, true)
    view.setUint32(FWD_CNT, this.fwdCnt, true)
    writer.bytes(this.#bytes)
  }
}
