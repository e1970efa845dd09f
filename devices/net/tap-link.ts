/** A tap as the link of a transmit queue: the kernel gathers each packet from guest memory, behind a header of ours. */
import type { Chain, PacketSender, QueueContext } from '../../src/device/index.ts'
import type { PacketHeader } from './header.ts'
import { HeaderSlots } from './header-slots.ts'
import { DROP_LINK_DOWN, DROP_LINK_FULL, DROP_TOO_BIG, type NetCounters } from './shared.ts'
import type { Link } from './transmit.ts'

const BATCH = 64

const EAGAIN = -11
const ENOBUFS = -105

export class TapLink implements Link {
  readonly #sender: PacketSender
  readonly #slots: HeaderSlots
  readonly #headerSize: number
  readonly #counters: NetCounters

  /** @param headerSize of the tap: 12, or 10 */
  constructor(context: QueueContext, fd: number, headerSize: number, counters: NetCounters) {
    this.#sender = context.io.packetSender(fd, BATCH)
    this.#slots = new HeaderSlots(context.io.allocate(HeaderSlots.bytes(BATCH)))
    this.#headerSize = headerSize
    this.#counters = counters
  }

  send(header: PacketHeader, chain: Chain, start: number, _length: number): void {
    const sender = this.#sender
    if (sender.count === BATCH) this.flush()
    if (this.#add(header, chain, start)) return
    this.flush()
    if (!this.#add(header, chain, start)) this.#counters.drop(DROP_TOO_BIG)
  }

  flush(): void {
    const { count } = this.#sender
    if (count === 0 || this.#sender.send() === count) return
    for (let i = 0; i < count; i++) {
      const result = this.#sender.result(i)
      if (result < 0) this.#counters.drop(result === EAGAIN || result === ENOBUFS ? DROP_LINK_FULL : DROP_LINK_DOWN)
    }
  }

  message(): void {}

  close(): void {}

  #add(header: PacketHeader, chain: Chain, start: number): boolean {
    const at = this.#slots.put(this.#sender.count, header)
    return this.#sender.add(this.#slots.buffer, at, this.#headerSize, chain, start)
  }
}
