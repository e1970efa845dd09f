/** A host for devices that are only looked at: no locks, no probing of files, no taps. It works beside a running daemon. */
import { fstatSync, openSync } from 'node:fs'
import type { DeviceHost, FileInfo, NetworkHost } from '../device/index.ts'

const ignore = (): void => {}
const succeed = (): number => 0

/** Every tap and bridge is there and takes everything; none is touched. */
const noNetwork: NetworkHost = {
  // Fds that can be closed.
  openTap: () => openSync('/dev/null', 'r+'),
  tapInfo: () => ({
    name: 'tap',
    vnetHeader: true,
    multiQueue: true,
    attached: true,
    tun: false,
    packetInfo: false,
    headerSize: 12,
  }),
  setTapHeaderSize: succeed,
  setTapOffloads: succeed,
  setTapQueue: succeed,
  setNonblocking: succeed,
  link: () => ({ index: 1, up: true, mtu: 1500, mac: new Uint8Array(6), bridge: true, master: 1 }),
  setLinkUp: succeed,
  setLinkMtu: succeed,
  discardPackets: succeed,
  addToBridge: succeed,
  writePacket: succeed,
}

/** What a device sees of a host that only looks: no locks, no probing of the file, no taps. */
export const observer: DeviceHost = {
  name: '',
  daemon: {},
  signal: new AbortController().signal,
  network: noNetwork,
  send: ignore,
  log: { debug: ignore, info: ignore, warn: ignore, error: ignore },
  fileInfo: (fd): FileInfo => {
    const stat = fstatSync(fd)
    const kind = stat.isFile() ? 'file' : stat.isBlockDevice() ? 'block' : 'other'
    // The size of a block device is not fstat's to tell, and no argument of QEMU depends on it.
    const size = kind === 'block' ? 2 ** 40 : stat.size
    return { kind, size, blockSize: 512, directMemoryAlign: 512, directOffsetAlign: 512 }
  },
  lockFile: () => true,
  fallocate: () => 0,
  configChanged: ignore,
  handover: { keep: ignore, forget: ignore, take: () => undefined },
}
