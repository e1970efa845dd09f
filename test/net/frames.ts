/**
 * Frames that a guest leaves unfinished: the headers are right, the transport checksum is the pseudo header's sum, and
 * the frame may be longer than any MTU. And the kernel as the one that finishes them: two taps on a bridge, of which
 * the second one's reader takes nothing unfinished.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import * as net from '../../src/virtio/net.ts'
import { runInNamespace } from '../native/network.ts'

export interface FrameOptions {
  readonly name?: string
  readonly gsoType: number
  readonly gsoSize?: number
  /** Bytes behind the transport header. */
  readonly payload: number
  readonly ipv6?: boolean
  readonly udp?: boolean
  /** Ethernet types of VLAN tags, outermost first. */
  readonly vlan?: readonly number[]
  /** Bytes of IPv4 options or TCP options, a multiple of 4. */
  readonly ipOptions?: number
  readonly tcpOptions?: number
  /** IPv6 extension headers, each 8 bytes. */
  readonly extensions?: readonly number[]
  readonly tcpFlags?: number
  readonly sequence?: number
  readonly identification?: number
  /** flags and fragment offset of IPv4; default Don't Fragment. */
  readonly fragment?: number
  readonly ecn?: boolean
  /** What the payload is made of. */
  readonly seed?: number
}

export interface BuiltFrame {
  /** The frame without its virtio-net header. */
  readonly bytes: Uint8Array
  /** The twelve bytes before it. */
  readonly header: Uint8Array
  readonly l3: number
  readonly l4: number
  readonly headerLength: number
}

export const TCPV4 = { gsoType: net.VIRTIO_NET_HDR_GSO_TCPV4 }
export const TCPV6 = { gsoType: net.VIRTIO_NET_HDR_GSO_TCPV6, ipv6: true }
export const USO4 = { gsoType: net.VIRTIO_NET_HDR_GSO_UDP_L4, udp: true }
export const USO6 = { ...USO4, ipv6: true }
export const UFO4 = { gsoType: net.VIRTIO_NET_HDR_GSO_UDP, udp: true }
export const UFO6 = { ...UFO4, ipv6: true }

/** Two bytes at a time and nothing clever: the checksum as RFC 1071 says it. */
export function slowSum(bytes: ArrayLike<number>, start = 0, end = bytes.length): number {
  let sum = 0
  for (let i = start; i < end; i += 2) {
    sum += (bytes[i] as number) * 256 + (i + 1 < end ? (bytes[i + 1] as number) : 0)
    sum = (sum % 65536) + Math.floor(sum / 65536)
  }
  return sum
}

export function build(options: FrameOptions): BuiltFrame {
  const { ipv6 = false, udp = false, vlan = [], ipOptions = 0, tcpOptions = 12, extensions = [] } = options
  const l3 = 14 + 4 * vlan.length
  const l4 = l3 + (ipv6 ? 40 + 8 * extensions.length : 20 + ipOptions)
  const headerLength = l4 + (udp ? 8 : 20 + tcpOptions)
  const length = headerLength + options.payload
  const bytes = new Uint8Array(length)
  const view = new DataView(bytes.buffer)
  bytes.set([0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1])
  vlan.forEach((type, i) => {
    view.setUint16(12 + 4 * i, type)
    view.setUint16(14 + 4 * i, 0x2000 + 5 + i)
  })
  view.setUint16(l3 - 2, ipv6 ? 0x86dd : 0x0800)
  const protocol = udp ? 17 : 6
  const addresses = ipv6 ? 32 : 8
  if (ipv6) {
    view.setUint32(l3, 0x6000_0000)
    view.setUint16(l3 + 4, length - l3 - 40)
    const chain = [...extensions, protocol]
    bytes[l3 + 6] = chain[0] as number
    bytes[l3 + 7] = 64
    extensions.forEach((_, i) => {
      // Next header, length 0 = 8 bytes, and a PadN option of 4 bytes (a routing header of type 1 with nothing left).
      bytes.set([chain[i + 1] as number, 0, 1, 4], l3 + 40 + 8 * i)
      if (extensions[i] === 43) bytes.set([4, 0], l3 + 42 + 8 * i)
    })
    for (let i = 0; i < 32; i++) bytes[l3 + 8 + i] = i % 16 === 0 ? 0xfd : i * 3
  } else {
    bytes.set([0x45 + ipOptions / 4, 0], l3)
    view.setUint16(l3 + 2, length - l3)
    view.setUint16(l3 + 4, options.identification ?? 0x1234)
    view.setUint16(l3 + 6, options.fragment ?? 0x4000)
    bytes.set([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2], l3 + 8)
    bytes.fill(1, l3 + 20, l4)
    view.setUint16(l3 + 10, ~slowSum(bytes, l3, l4) & 0xffff)
  }
  view.setUint16(l4, 40_000)
  view.setUint16(l4 + 2, 5201)
  if (udp) {
    view.setUint16(l4 + 4, length - l4)
  } else {
    view.setUint32(l4 + 4, options.sequence ?? 0x1000_0000)
    view.setUint32(l4 + 8, 0x2000_0000)
    bytes.set([((20 + tcpOptions) / 4) << 4, options.tcpFlags ?? 0x18, 0x10, 0], l4 + 12)
    bytes.fill(1, l4 + 20, headerLength)
  }
  const seed = options.seed ?? 1
  for (let i = headerLength; i < length; i++) bytes[i] = (i * 31 + seed * 7 + (i >> 8)) & 0xff
  const source = l3 + (ipv6 ? 8 : 12)
  const total = length - l4
  const pseudo = [...bytes.subarray(source, source + addresses), total >> 8, total & 255, 0, protocol]
  const csumOffset = udp ? 6 : 16
  view.setUint16(l4 + csumOffset, slowSum(pseudo))

  const header = new Uint8Array(12)
  const words = new DataView(header.buffer)
  header.set([net.VIRTIO_NET_HDR_F_NEEDS_CSUM, options.gsoType | (options.ecn ? net.VIRTIO_NET_HDR_GSO_ECN : 0)])
  words.setUint16(2, options.gsoType === 0 ? 0 : headerLength, true)
  words.setUint16(4, options.gsoSize ?? 0, true)
  words.setUint16(6, l4, true)
  words.setUint16(8, csumOffset, true)
  return { bytes, header, l3, l4, headerLength }
}

export interface Finished {
  /** A system error when the kernel refused the frame. */
  readonly refused?: string
  /** What came out at the other tap, header first, in hexadecimal. */
  readonly packets: readonly string[]
}

/**
 * What the kernel makes of frames that `module` exports as `name`, a function that returns BuiltFrames. It runs in the
 * child, since frames are too long for a command line.
 */
export function finishedByKernel(module: string, name: string): Finished[] {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-kernel-'))
  const file = join(directory, 'out.json')
  const run = runInNamespace(`
    import { existsSync, readSync, writeFileSync, writeSync } from 'node:fs'
    import { ${name} as frames } from ${JSON.stringify(module)}
    // A bridge that looks at IP headers, as netfilter has it do by default, drops more than the taps do.
    for (const file of ['bridge-nf-call-iptables', 'bridge-nf-call-ip6tables'].map((name) => '/proc/sys/net/bridge/' + name)) {
      if (existsSync(file)) writeFileSync(file, '0')
    }
    ip('link add br0 type bridge')
    ip('link set br0 up')
    const [a, b] = ['ta', 'tb'].map((name) => {
      const fd = native.tapOpen(name, false)
      for (const result of [fd, native.tapSetHeaderSize(fd, 12), native.tapSetOffload(fd, 0),
        native.linkSetMtu(name, 65521), native.linkSetUp(name, true), native.bridgeAdd('br0', name)]) {
        if (result < 0) throw new Error(name + ': ' + result)
      }
      return fd
    })
    const packet = Buffer.alloc(70000)
    const marker = Buffer.concat([Buffer.alloc(12), Buffer.from(network.frame(0, 60, 1))])
    const results = frames().map(({ header, bytes }) => {
      const packets = []
      let refused
      try {
        writeSync(a, Buffer.concat([header, bytes]))
      } catch (error) {
        refused = error.code
      }
      writeSync(a, marker)
      for (;;) {
        let length = 0
        try {
          length = readSync(b, packet)
        } catch (error) {
          if (error.code !== 'EAGAIN') throw error
          Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1)
          continue
        }
        if (packet.readUInt16BE(24) === 0x88b5) break
        // The kernel's own packets have other source addresses.
        if (packet.compare(bytes, 6, 12, 18, 24) === 0) packets.push(packet.toString('hex', 0, length))
      }
      return { refused, packets }
    })
    writeFileSync(${JSON.stringify(file)}, JSON.stringify(results))`)
  try {
    if (run.status !== 0) throw new Error(`${run.status ?? run.signal}: ${run.stderr}`)
    return JSON.parse(readFileSync(file, 'utf8')) as Finished[]
  } finally {
    rmSync(directory, { recursive: true })
  }
}
