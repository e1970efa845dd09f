/**
 * What a device's control half can do to taps and network links: the system calls, nothing decided. Every function
 * returns -errno when the kernel refuses.
 */

export interface TapInfo {
  readonly name: string
  /** It has virtio-net headers before its packets (IFF_VNET_HDR). */
  readonly vnetHeader: boolean
  readonly multiQueue: boolean
  /** This queue takes part; see `NetworkHost.setTapQueue`. */
  readonly attached: boolean
  /** It is no tap but a tun, without Ethernet headers. */
  readonly tun: boolean
  /** It has the packet-information header of four bytes. */
  readonly packetInfo: boolean
  /** Bytes of the virtio-net header. */
  readonly headerSize: number
}

export interface LinkInfo {
  readonly index: number
  readonly up: boolean
  /** Bytes of payload behind the Ethernet header. */
  readonly mtu: number
  readonly mac: Uint8Array
  readonly bridge: boolean
  /** The index of the bridge that it is on, 0 = none. */
  readonly master: number
}

export interface NetworkHost {
  /**
   * Opens a queue of a tap with virtio-net headers, and creates the tap when there is none of that name. Returns a non-blocking fd
   * that the caller owns.
   */
  openTap(name: string, multiQueue: boolean): number
  /** Of an open tap. */
  tapInfo(fd: number): TapInfo | number
  setTapHeaderSize(fd: number, size: number): number
  /** @param offloads TUN_F_* of what the reader of the tap can take unfinished */
  setTapOffloads(fd: number, offloads: number): number
  /** A queue of a multi-queue tap that is detached gets no packets. */
  setTapQueue(fd: number, attached: boolean): number
  setNonblocking(fd: number): number
  link(name: string): LinkInfo | number
  setLinkUp(name: string, up: boolean): number
  setLinkMtu(name: string, mtu: number): number
  addToBridge(bridge: string, name: string): number
  /** Throws away what waits in a tap's queue, within reason. Returns how many packets. */
  discardPackets(fd: number): number
  /** Writes one packet to a tap, from the control thread. */
  writePacket(fd: number, packet: Uint8Array): number
}
