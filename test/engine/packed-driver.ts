/**
 * The driver side of a packed virtqueue (virtio 1.3 §2.8) with the methods of the split one of test/virtio, as far as
 * tests of the engine need them. Chains are described in a table of the driver's own; the buffer id is the head's index
 * there.
 */
import { type Descriptor, NEXT, type RingLayout, type UsedElement } from '../virtio/mock-driver.ts'

const AVAIL = 1 << 7
const USED = 1 << 15

export class PackedDriver {
  readonly size: number
  readonly view: DataView
  readonly #layout: RingLayout
  readonly #halves: Uint16Array
  readonly #table: Descriptor[] = []
  /** By id: slots of the chain in flight. */
  readonly #slots = new Map<number, number>()
  #avail: number
  #availWrap: number
  #used: number
  #usedWrap: number

  /** @param base as SET_VRING_BASE */
  constructor(buffer: SharedArrayBuffer | ArrayBuffer, layout: RingLayout, base: number) {
    this.size = layout.size
    this.view = new DataView(buffer)
    this.#layout = layout
    this.#halves = new Uint16Array(buffer)
    this.#avail = base & 0x7fff
    this.#availWrap = (base >>> 15) & 1
    this.#used = (base >>> 16) & 0x7fff
    this.#usedWrap = base >>> 31
  }

  descriptor(index: number, descriptor: Descriptor): void {
    this.#table[index] = descriptor
  }

  /** Makes chains available, the first descriptor of each last. */
  offer(...heads: number[]): void {
    for (const head of heads) this.#offer(head)
  }

  #offer(head: number): void {
    const chain = this.#chain(head)
    this.#slots.set(head, chain.length)
    const first = this.#avail
    let firstFlags = 0
    chain.forEach((descriptor, i) => {
      const more = i < chain.length - 1 ? NEXT : 0
      const wrap = this.#availWrap === 1 ? AVAIL : USED
      const flags = ((descriptor.flags ?? 0) & ~NEXT) | more | wrap
      const at = this.#layout.descriptor + this.#avail * 16
      this.view.setBigUint64(at, BigInt(descriptor.gpa), true)
      this.view.setUint32(at + 8, descriptor.length, true)
      this.view.setUint16(at + 12, head, true)
      if (i === 0) firstFlags = flags
      else this.view.setUint16(at + 14, flags, true)
      this.#avail++
      if (this.#avail === this.size) {
        this.#avail = 0
        this.#availWrap ^= 1
      }
    })
    Atomics.store(this.#halves, this.#flagsAt(first), firstFlags)
  }

  /** The used chains since the last time. */
  takeUsed(): UsedElement[] {
    const taken: UsedElement[] = []
    for (;;) {
      const flags = Atomics.load(this.#halves, this.#flagsAt(this.#used))
      const used = this.#usedWrap === 1 ? AVAIL | USED : 0
      if ((flags & (AVAIL | USED)) !== used) return taken
      const at = this.#layout.descriptor + this.#used * 16
      const id = this.view.getUint16(at + 12, true)
      const slots = this.#slots.get(id)
      // Laid out anew, or never offered.
      if (slots === undefined) return taken
      taken.push({ id, length: this.view.getUint32(at + 8, true) })
      this.#slots.delete(id)
      this.#used += slots
      if (this.#used >= this.size) {
        this.#used -= this.size
        this.#usedWrap ^= 1
      }
    }
  }

  /** What the ring's base is when nothing is in flight. */
  get base(): number {
    return (this.#avail | (this.#availWrap << 15) | (this.#used << 16) | (this.#usedWrap << 31)) >>> 0
  }

  #flagsAt(index: number): number {
    return (this.#layout.descriptor + index * 16 + 14) / 2
  }

  #chain(head: number): Descriptor[] {
    const chain: Descriptor[] = []
    for (let index: number | undefined = head; index !== undefined; ) {
      const descriptor: Descriptor = this.#table[index]!
      chain.push(descriptor)
      index = ((descriptor.flags ?? 0) & NEXT) === 0 ? undefined : descriptor.next
    }
    return chain
  }
}
