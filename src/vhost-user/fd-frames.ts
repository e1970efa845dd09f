/**
 * How a message of fd-channel.ts is cut into frames of bounded size. Pure, and without the addon: who can't load that
 * can still say so.
 *
 * Frame: u32 bytes of payload, u32 flags, u32 number of fds, payload. The fds come with the frame's first byte.
 */

export const HEADER_SIZE = 12
/** More frames of this message follow. */
export const FLAG_MORE = 1
export const MAX_FRAME_BYTES = 65536
export const MAX_FRAME_FDS = 64

export interface Frame {
  readonly bytes: Uint8Array
  readonly fds: readonly number[]
}

/** @param body becomes JSON */
export function framesOf(body: unknown, fds: readonly number[] = []): Frame[] {
  const payload = Buffer.from(JSON.stringify(body))
  const count = Math.max(Math.ceil(payload.length / MAX_FRAME_BYTES), Math.ceil(fds.length / MAX_FRAME_FDS), 1)
  return Array.from({ length: count }, (_, i) => {
    const piece = payload.subarray(i * MAX_FRAME_BYTES, (i + 1) * MAX_FRAME_BYTES)
    const passed = fds.slice(i * MAX_FRAME_FDS, (i + 1) * MAX_FRAME_FDS)
    const bytes = new Uint8Array(HEADER_SIZE + piece.length)
    const view = new DataView(bytes.buffer)
    view.setUint32(0, piece.length, true)
    view.setUint32(4, i < count - 1 ? FLAG_MORE : 0, true)
    view.setUint32(8, passed.length, true)
    bytes.set(piece, HEADER_SIZE)
    return { bytes, fds: passed }
  })
}
