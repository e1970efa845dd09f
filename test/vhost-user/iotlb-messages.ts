/** Payloads of IOTLB_MSG. */
import * as wire from '../../src/vhost-user/wire.ts'

export function iotlb(fields: Partial<wire.IotlbMessage>, bytes = wire.IOTLB_MESSAGE_PADDED_SIZE): Uint8Array {
  const payload = new Uint8Array(bytes)
  const all = { iova: 0n, size: 0n, userAddress: 0n, permissions: 3, type: wire.VHOST_IOTLB_UPDATE, ...fields }
  wire.writeIotlb(new DataView(payload.buffer), 0, all)
  return payload
}

export function update(iova: bigint, size: bigint, userAddress: bigint, permissions = 3): Uint8Array {
  return iotlb({ iova, size, userAddress, permissions })
}

export function invalidate(iova: bigint, size: bigint): Uint8Array {
  return iotlb({ iova, size, type: wire.VHOST_IOTLB_INVALIDATE })
}
