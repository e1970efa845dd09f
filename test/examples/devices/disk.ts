/** Requests to a disk under test, in words. */
import { VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT } from 'virtiod/device/virtio-blk'
import type { TestDevice } from 'virtiod/testing'

export class TestDisk {
  readonly #device: TestDevice

  constructor(device: TestDevice) {
    this.#device = device
  }

  /** In bytes. */
  get size(): number {
    return Number(Buffer.from(this.#device.config).readBigUInt64LE(0)) * 512
  }

  /** @throws an Error when its status is not OK */
  async read(offset: number, length: number): Promise<Buffer> {
    const { bytes } = await this.#device.request(0, [header(VIRTIO_BLK_T_IN, offset)], length + 1)
    checkStatus(bytes)
    return Buffer.from(bytes.subarray(0, length))
  }

  async write(offset: number, bytes: Uint8Array): Promise<void> {
    checkStatus((await this.#device.request(0, [header(VIRTIO_BLK_T_OUT, offset), bytes], 1)).bytes)
  }

  /** DISCARD (11) or WRITE_ZEROES (13) of one range. */
  async zero(type: number, offset: number, length: number): Promise<void> {
    const range = header(length / 512, 0)
    new DataView(range.buffer).setBigUint64(0, BigInt(offset / 512), true)
    new DataView(range.buffer).setUint32(8, length / 512, true)
    checkStatus((await this.#device.request(0, [header(type, 0), range], 1)).bytes)
  }

  async flush(): Promise<void> {
    checkStatus((await this.#device.request(0, [header(VIRTIO_BLK_T_FLUSH, 0)], 1)).bytes)
  }
}

function checkStatus(bytes: Uint8Array): void {
  const status = bytes.at(-1)
  if (status !== 0) throw new Error(`status ${status}`)
}

function header(type: number, offset: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(16)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, type, true)
  view.setBigUint64(8, BigInt(offset / 512), true)
  return bytes
}
