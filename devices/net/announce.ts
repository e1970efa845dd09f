/** The frame by which a guest that moved is announced to the switches on its way (vhost-user.rst "SEND_RARP"). */

const FRAME_BYTES = 60
const ETHERTYPE_RARP = 0x8035
const HARDWARE_ETHERNET = 1
const PROTOCOL_IPV4 = 0x0800
const REVERSE_REQUEST = 3

/** RFC 903: who has this MAC asks for its IP address. Nobody answers; the sender's address is what counts. */
export function rarpFrame(mac: Uint8Array): Uint8Array {
  const frame = new Uint8Array(FRAME_BYTES)
  const view = new DataView(frame.buffer)
  frame.fill(0xff, 0, 6)
  frame.set(mac, 6)
  view.setUint16(12, ETHERTYPE_RARP)
  view.setUint16(14, HARDWARE_ETHERNET)
  view.setUint16(16, PROTOCOL_IPV4)
  view.setUint8(18, 6)
  view.setUint8(19, 4)
  view.setUint16(20, REVERSE_REQUEST)
  frame.set(mac, 22)
  frame.set(mac, 32)
  return frame
}
