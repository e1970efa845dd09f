/**
 * A program that plays driver and engine for one ring: descriptors, offers, pops, completions in any order, crashes with an
 * in-flight region, another memory, a log. It keeps a model of what the ring owes, and compares after every step.
 */
import type { Chain } from '../../src/virtio/chain.ts'
import { DirtyLog } from '../../src/virtio/dirty-log.ts'
import { inflightSize, PackedInflight, SplitInflight } from '../../src/virtio/inflight.ts'
import { Iotlb } from '../../src/virtio/iotlb.ts'
import { GuestMemory, IOTLB_READ, IOTLB_WRITE } from '../../src/virtio/memory.ts'
import { PackedRing, packedRingSizes } from '../../src/virtio/packed-ring.ts'
import { SplitRing, splitRingSizes } from '../../src/virtio/split-ring.ts'
import type { Vring, VringConfig } from '../../src/virtio/vring.ts'
import { type Input, promise } from './pure-input.ts'
import { PAGE, ProgramMemory, type Range } from './pure-memory.ts'

const NEXT = 1
const WRITE = 2
const INDIRECT = 4

/** A chain as it was when it was popped. */
interface Taken {
  readonly head: number
  readonly slots: number
  /** Its segments as text; undefined when they are in a table, which may have changed since. */
  readonly segments: string | undefined
  complete: boolean
  used: boolean
}

const space = new ProgramMemory()
const region = new SharedArrayBuffer(PAGE)
const regionBytes = Buffer.from(region)
const ZEROES = Buffer.alloc(PAGE)

export class RingProgram {
  readonly #input: Input
  readonly #packed: boolean
  readonly #tracked: boolean
  readonly #translated: boolean
  readonly #config: VringConfig
  readonly #owned: readonly Range[]
  #ring: Vring
  readonly #iotlb = new Iotlb(16)
  /** In the order of their pops: not yet published. */
  #taken: Taken[] = []
  #popped: Chain[] = []
  #lastPopped: Chain | undefined
  /** The driver or the memory did something after which nobody knows what the ring should say. */
  #wild = false
  // The driver's position. Split: avail.idx. Packed: where the next descriptor goes, and how many are its own.
  #next: number
  #wrap = 1
  #free: number
  /** Chains that were offered and not popped: descriptors that each takes. Packed only. */
  #offered: { id: number; slots: number }[] = []

  constructor(input: Input, packed: boolean) {
    this.#input = input
    this.#packed = packed
    space.clear()
    regionBytes.fill(0)
    const size = packed ? 1 + input.below(16) : 1 << input.below(5)
    const flags = input.u8()
    this.#tracked = (flags & 8) !== 0
    this.#translated = (flags & 16) !== 0 && (flags & 32) !== 0
    const sizes = packed ? packedRingSizes(size) : splitRingSizes(size, (flags & 1) !== 0)
    const where = input.u8()
    const descriptor = PAGE + 16 * (where & 15)
    const driver = (where & 16) === 0 ? descriptor + sizes.descriptor : 2 ** 32
    const device = (where & 32) === 0 ? 2 ** 32 - PAGE + 64 : 2 ** 32 + PAGE / 2
    const start = input.u16()
    // With no relation between where it pops and where it uses, now and then.
    const odd = packed && (flags & 0xc0) === 0xc0
    const base = !packed ? start : odd ? ((start << 16) | (input.u16() % size)) >>> 0 : this.#packedBase(size, start)
    if (odd) this.#wild = true
    this.#config = {
      size,
      descriptor,
      driver,
      device,
      base,
      eventIdx: (flags & 1) !== 0,
      indirect: (flags & 2) !== 0,
      packed,
      inOrder: (flags & 4) !== 0,
    }
    this.#next = packed ? start % size : start
    this.#free = size
    if (packed) this.#wrap = (start >>> 15) & 1
    else {
      space.view.setUint16(space.at(driver) + 2, start, true)
      space.view.setUint16(space.at(device) + 2, start, true)
    }
    // What never was used looks used already: the driver's laps begin with what the last one left.
    if (packed) this.#layOut(size, start % size, this.#wrap)
    this.#owned = [range(device, sizes.device), ...(packed ? [range(descriptor, sizes.descriptor)] : [])]
    space.accept()
    if (this.#translated) this.#translateRing()
    this.#ring = this.#makeRing(base)
  }

  run(): void {
    for (let steps = 0; !this.#input.ended && steps < 400; steps++) {
      this.#step(this.#input.below(22))
      if (!this.#wild && !this.#translated) this.#checkBase()
      if (this.#ring.error !== undefined && this.#input.below(4) !== 0) return
    }
  }

  #step(operation: number): void {
    switch (operation) {
      case 0:
      case 1:
      case 2:
      case 3:
        return this.#offer()
      case 4:
      case 5:
      case 6:
        return this.#pop()
      case 7:
      case 8:
        return this.#push()
      case 9:
      case 10:
        return this.#device('publish', () => this.#publish())
      case 11:
        return this.#unpop()
      case 12:
        return this.#device('suppress', () => this.#ring.suppress())
      case 13:
        return this.#device('rearm', () => void this.#ring.rearm())
      case 14:
        return this.#otherMemory()
      case 15:
        return this.#log()
      case 16:
        return this.#crash()
      case 17:
        return this.#scribble()
      case 18:
        return this.#stopAndStart()
      case 19:
      case 20:
        return this.#askForCalls()
      default:
        return this.#table()
    }
  }

  // ---- the driver

  /** A chain of one to four descriptors, of which one may be hostile. */
  #offer(): void {
    const count = 1 + this.#input.below(4)
    if (this.#packed) this.#offerPacked(Math.min(count, this.#free))
    else this.#offerSplit(count)
    space.accept()
  }

  #offerSplit(count: number): void {
    const { size, descriptor, driver } = this.#config
    const first = this.#input.u8() % (size + 1)
    for (let i = 0; i < Math.min(count, size); i++) {
      const index = (first + i) % size
      const at = space.at(descriptor) + 16 * index
      const more = i + 1 < count
      this.#describe(at, i, more)
      const flags = space.view.getUint16(at + 12, true)
      space.view.setUint16(at + 12, flags, true)
      space.view.setUint16(at + 14, (first + i + 1) % (size + (this.#input.below(16) === 0 ? 3 : 0)), true)
    }
    if (first === size || this.#taken.some(({ head }) => head === first)) this.#wild = true
    // Another one that the ring has not seen yet may have it.
    const ahead = (this.#next - this.#availBase()) & 0xffff
    for (let i = 1; i <= Math.min(ahead, size); i++) {
      if (space.view.getUint16(space.at(driver) + 4 + 2 * ((this.#next - i) & (size - 1)), true) === first)
        this.#wild = true
    }
    if (ahead + this.#taken.length >= size) this.#wild = true
    space.view.setUint16(space.at(driver) + 4 + 2 * (this.#next & (size - 1)), first, true)
    this.#next = (this.#next + 1) & 0xffff
    space.view.setUint16(space.at(driver) + 2, this.#next, true)
  }

  #offerPacked(count: number): void {
    if (count === 0) return
    const { size, descriptor } = this.#config
    const busy = new Set([...this.#taken.map(({ head }) => head), ...this.#offered.map(({ id }) => id)])
    let id = this.#input.below(size + 1)
    if (id === size) this.#wild = true
    else while (busy.has(id)) id = (id + 1) % size
    this.#offered.push({ id, slots: count })
    this.#free -= count
    for (let i = 0; i < count; i++) {
      const at = space.at(descriptor) + 16 * this.#next
      this.#describe(at, i, i + 1 < count)
      const flags = space.view.getUint16(at + 12, true) & ~0x8080
      // The chain ends elsewhere than it was meant to.
      if ((flags & NEXT) !== (i + 1 < count ? NEXT : 0)) this.#wild = true
      space.view.setUint16(at + 12, id, true)
      space.view.setUint16(at + 14, flags | (this.#wrap === 1 ? 0x80 : 0x8000), true)
      if (++this.#next === size) {
        this.#next = 0
        this.#wrap ^= 1
      }
    }
  }

  /** Address, length and flags (at 12, as split rings have them). */
  #describe(at: number, position: number, more: boolean): void {
    const how = this.#input.u8()
    const { view } = space
    const places = [0, 512, PAGE + 768, 2 ** 32 - PAGE + 512, 2 ** 32 + 256, PAGE - 8, 2 ** 32 - 16, 768]
    let address = places[how & 7]!
    let length = 1 + ((how >> 3) & 7) * 8
    let flags = (more ? NEXT : 0) | (position > 0 && (how & 64) !== 0 ? WRITE : 0)
    if ((how & 128) !== 0) {
      const odd = this.#input.u8()
      if ((odd & 7) === 0) address = this.#input.u32() * 2 ** (odd >> 3)
      if ((odd & 7) === 1) length = this.#input.u32()
      if ((odd & 7) === 2) length = 0
      if ((odd & 7) === 3) flags ^= this.#input.u8() & 7
      if ((odd & 7) === 4) {
        flags = (flags & ~NEXT) | INDIRECT
        address = 16 * (odd >> 3)
        length = 16 * (1 + this.#input.below(5))
      }
      if ((odd & 7) === 5) flags |= WRITE
      if ((odd & 7) === 6) length = PAGE + 16
    }
    view.setBigUint64(at, BigInt(address), true)
    view.setUint32(at + 8, length, true)
    view.setUint16(at + 12, flags, true)
    view.setUint16(at + 14, 0, true)
  }

  /** When the driver wants to be called: flags, and used_event or an offset, near where the device is or anywhere. */
  #askForCalls(): void {
    const { size, driver, eventIdx } = this.#config
    const value = this.#input.u16()
    const flags = this.#input.below(4)
    const at = space.at(driver)
    if (this.#packed) space.view.setUint32(at, value | (flags << 16), true)
    else {
      space.view.setUint16(at, flags & 1, true)
      if (eventIdx) space.view.setUint16(at + 4 + 2 * size, flags > 1 ? value : this.#next - flags, true)
    }
    space.accept()
  }

  /** Entries of an indirect table, near address 0, where `#describe` points. */
  #table(): void {
    const count = 1 + this.#input.below(4)
    const start = space.at(0) + 16 * this.#input.below(32)
    for (let i = 0; i < count; i++) {
      const at = start + 16 * i
      this.#describe(at, i, i + 1 < count)
      const flags = space.view.getUint16(at + 12, true)
      if (this.#packed) {
        space.view.setUint16(at + 12, 0, true)
        space.view.setUint16(at + 14, flags, true)
      } else space.view.setUint16(at + 14, i + 1, true)
    }
    space.accept()
  }

  /** Any bytes anywhere in the ring's parts, the tables, or the in-flight region. */
  #scribble(): void {
    const { descriptor, driver, device } = this.#config
    const where = this.#input.below(5)
    const value = this.#input.u32()
    const offset = this.#input.u8() * 2
    this.#wild = true
    if (where === 4) {
      if (offset < this.#regionSize) new DataView(region).setUint16(offset, value, true)
    } else space.view.setUint16(space.at([descriptor, driver, device, 0][where]!) + offset, value, true)
    space.accept()
  }

  // ---- the device

  /** Runs something of the ring, and looks where it wrote. */
  #device(what: string, action: () => void): void {
    if (what !== 'unpop') this.#lastPopped = undefined
    action()
    const everywhere = [{ start: 0, end: 16 * PAGE }]
    space.check(this.#translated ? everywhere : this.#owned, what)
    const behind = this.#regionSize
    promise(regionBytes.compare(ZEROES, behind, PAGE, behind) === 0, `${what} wrote behind the in-flight region`)
    const { missAddress } = this.#ring
    promise(missAddress === -1 || this.#translated, `${what}: a miss without a vIOMMU`)
    promise(missAddress >= -1 && Number.isSafeInteger(missAddress), `${what}: a miss at ${missAddress}`)
    if (missAddress >= 0) {
      promise(!this.#ring.hasAvail(), 'a ring that waits for a translation has chains')
      promise(this.#ring.missAccess > 0 && this.#ring.missAccess < 4, `a miss of access ${this.#ring.missAccess}`)
    }
    if (this.#ring.error !== undefined) this.#wild = true
  }

  #pop(): void {
    let chain: Chain | undefined
    const had = this.#ring.hasAvail()
    const expected = this.#expected()
    this.#device('pop', () => {
      chain = this.#ring.pop()
    })
    if (chain === undefined) {
      promise(
        !had || this.#ring.error !== undefined || this.#ring.missAddress >= 0,
        'hasAvail, and nothing is popped although the ring is whole'
      )
      promise(this.#wild || this.#translated || expected === undefined, 'an offered chain was not popped')
      return
    }
    this.#checkChain(chain)
    promise(this.#popped.length < this.#config.size, 'more chains are in flight than the ring has entries')
    promise(!this.#popped.some(({ head }) => head === chain?.head), `head ${chain.head} is in flight twice`)
    const held = this.#taken.some(({ head, used }) => head === chain?.head && !used)
    promise(!held || this.#ring.recovering, `head ${chain.head} is popped again before its turn to be used has come`)
    promise(this.#wild || this.#translated || expected === chain.head, `head ${chain.head} in place of ${expected}`)
    this.#popped.push(chain)
    this.#lastPopped = chain
    const slots = this.#packed ? (this.#offered.shift()?.slots ?? 1) : 1
    this.#taken.push({ head: chain.head, slots, segments: this.#segments(chain), complete: false, used: false })
  }

  /** The head that an obedient driver offered next. */
  #expected(): number | undefined {
    if (this.#wild) return undefined
    if (this.#packed) return this.#offered[0]?.id
    const { driver, size } = this.#config
    const base = this.#ring.base
    if (base === this.#next) return undefined
    return space.view.getUint16(space.at(driver) + 4 + 2 * (base & (size - 1)), true)
  }

  #push(): void {
    if (this.#popped.length === 0) return
    const index = this.#input.below(this.#popped.length)
    const [chain] = this.#popped.splice(index, 1)
    const written = (this.#input.u8() & 1) === 0 ? chain!.writable : this.#input.u32()
    this.#device('push', () => this.#ring.push(chain!, written, chain!.writable))
    const mine = this.#taken.find(({ head, complete }) => head === chain!.head && !complete)
    promise(mine !== undefined, 'the model lost a chain')
    mine.complete = true
    this.#settleUsed()
  }

  /** With IN_ORDER a completion waits for those before it. */
  #settleUsed(): void {
    for (const one of this.#taken) {
      if (one.complete) one.used = true
      else if (this.#config.inOrder) return
    }
  }

  #publish(): void {
    const { device } = this.#config
    const at = space.at(device) + 2
    const before = space.view.getUint16(at, true)
    this.#ring.publish()
    const used = this.#taken.filter((one) => one.used)
    if (!this.#wild && !this.#translated && !this.#packed) {
      const now = space.view.getUint16(at, true)
      promise(
        ((now - before) & 0xffff) === used.length,
        `used.idx went from ${before} to ${now}, ${used.length} are used`
      )
    }
    if (this.#wild || !this.#translated) for (const { slots } of used) this.#free += slots
    this.#taken = this.#taken.filter((one) => !one.used)
  }

  #unpop(): void {
    const chain = this.#lastPopped
    if (chain === undefined || this.#popped.at(-1) !== chain) return
    this.#lastPopped = undefined
    this.#device('unpop', () => this.#ring.unpop(chain))
    this.#popped.pop()
    const mine = this.#taken.pop()
    if (this.#packed && mine !== undefined) this.#offered.unshift({ id: mine.head, slots: mine.slots })
  }

  #log(): void {
    const how = this.#input.u8()
    const bits = new Uint8Array(how & 63)
    this.#ring.setLog((how & 128) === 0 ? new DirtyLog(bits) : undefined, (how & 64) === 0 ? -1 : this.#input.u32())
  }

  #otherMemory(): void {
    const how = this.#input.u8()
    this.#lastPopped = undefined
    if (this.#translated) {
      const page = this.#input.below(8)
      const gpa = page < 4 ? page * PAGE : 2 ** 32 + (page - 6) * PAGE
      if ((how & 3) === 0) this.#iotlb.invalidate(gpa, PAGE * (1 + this.#input.below(3)))
      else {
        const miss = this.#ring.missAddress
        if (miss >= 0)
          this.#translate(Math.floor(miss / PAGE) * PAGE, (how >> 2) & 3, (how & 64) === 0 ? 3 : 1 + (how & 1))
        else this.#translate(gpa, (how >> 2) & 3, 1 + ((how >> 4) % 3))
      }
      this.#device('setMemory', () => this.#ring.setMemory(this.#iotlb.memory()))
      return
    }
    // Without one region, or another object of the same ones.
    const left = space.regions.filter((_, i) => (how & 7) !== i)
    this.#device('setMemory', () => this.#ring.setMemory(new GuestMemory(left)))
    if (left.length < space.regions.length) this.#wild = true
  }

  #translate(iova: number, target: number, access: number): void {
    const there = space.regions[target]!
    this.#iotlb.update({ ...there, gpa: iova, physical: there.gpa, access })
  }

  #translateRing(): void {
    for (const [i, { gpa }] of space.regions.entries()) {
      if (this.#input.below(3) > 0) this.#translate(gpa, i, IOTLB_READ | IOTLB_WRITE)
    }
  }

  /** The process dies; the next one goes on with the same memory and in-flight region. */
  #crash(): void {
    if (!this.#tracked) return
    this.#lastPopped = undefined
    const owed = this.#taken
    const free = this.#free
    this.#ring = this.#makeRing(this.#input.u8() % 2 === 0 ? this.#config.base : this.#ring.base)
    this.#popped = []
    this.#taken = []
    if (this.#ring.error !== undefined) {
      promise(this.#wild, `an in-flight region that nobody scribbled on is refused: ${this.#ring.error.message}`)
      return
    }
    if (this.#wild || this.#translated) {
      this.#wild = true
      return
    }
    const back: Taken[] = []
    while (this.#ring.recovering) {
      let chain: Chain | undefined
      this.#device('pop of a recovered chain', () => {
        chain = this.#ring.pop()
      })
      // Its descriptors in a split ring, or its table, may have become bad ones.
      if (chain === undefined) {
        promise(this.#ring.error !== undefined, 'a recovered chain is not popped')
        return
      }
      this.#checkChain(chain)
      this.#popped.push(chain)
      const before = owed[back.length]
      const segments = this.#segments(chain)
      promise(before?.head === chain.head, `recovered head ${chain.head} in place of ${before?.head}`)
      if (this.#packed && before.segments !== undefined && segments !== undefined) {
        promise(before.segments === segments, `recovered ${segments}, it was ${before.segments}`)
      }
      back.push({ ...before, complete: false, used: false })
    }
    promise(back.length === owed.length, `${back.length} chains were recovered of ${owed.length}`)
    this.#taken = back
    this.#free = free
    this.#checkBase()
  }

  /** GET_VRING_BASE and a start from what it said. */
  #stopAndStart(): void {
    if (this.#tracked || this.#ring.error !== undefined) return
    while (this.#popped.length > 0) this.#push()
    this.#device('publish', () => this.#publish())
    if (this.#translated || this.#wild) return
    promise(this.#taken.length === 0, 'all were completed, and not all are used')
    const { base } = this.#ring
    this.#ring = this.#makeRing(base)
    promise(this.#ring.error === undefined, `the base ${base} that a drained ring said is refused`)
    promise(this.#ring.base === base, `started at ${base}, it says ${this.#ring.base}`)
  }

  // ---- what must hold

  #checkChain(chain: Chain): void {
    const { regions } = chain
    let readable = 0
    let writable = 0
    promise(chain.inFlight && chain.readableCount <= chain.count, 'the counts of a chain')
    for (let i = 0; i < chain.count; i++) {
      const where = regions[chain.region[i]!]
      const offset = chain.offset[i]!
      const length = chain.length[i]!
      promise(where !== undefined, 'a segment in no region')
      promise(length > 0 && Number.isInteger(offset) && offset >= 0, `a segment of ${length} bytes at ${offset}`)
      promise(offset + length <= where.size, 'a segment reaches beyond its region')
      const access = i < chain.readableCount ? IOTLB_READ : IOTLB_WRITE
      promise((where.access & access) !== 0, 'a segment may not be used in that direction')
      if (i < chain.readableCount) readable += length
      else writable += length
    }
    promise(chain.count === 0 || chain.first === regions[chain.region[0]!], 'the first region')
    promise(readable === chain.readable && writable === chain.writable, 'the sums of a chain')
    promise(readable + writable < 2 ** 32, 'the length of a chain')
    // Devices read headers so; it must be safe at any place.
    if (readable > 0) chain.readU8(readable - 1)
    if (readable >= 8) chain.readU64(readable - 8)
  }

  #checkBase(): void {
    const { size } = this.#config
    const { base } = this.#ring
    if (!this.#packed) {
      promise(Number.isInteger(base) && base >= 0 && base <= 0xffff, `base ${base}`)
      return
    }
    const avail = base & 0x7fff
    const usedIndex = (base >>> 16) & 0x7fff
    promise(avail < size && usedIndex < size, `base 0x${base.toString(16)}`)
    const offered = this.#offered.reduce((sum, { slots }) => sum + slots, 0)
    const position = avail + (((base >>> 15) & 1) === this.#wrap ? 0 : size)
    promise((position + offered) % (2 * size) === this.#next, `avail position ${avail}, the driver's is ${this.#next}`)
  }

  /** Split: the next avail index, by the ring's own word. */
  #availBase(): number {
    return this.#ring.base
  }

  #segments(chain: Chain): string | undefined {
    const parts: string[] = []
    for (let i = 0; i < chain.count; i++) {
      const where = chain.regions[chain.region[i]!]!
      parts.push(`${i < chain.readableCount ? 'r' : 'w'}${where.gpa + chain.offset[i]!}+${chain.length[i]}`)
    }
    // A chain of a table says nothing about where the table is: near 0, as its segments are not.
    return this.#config.indirect ? undefined : parts.join(' ')
  }

  // ---- making rings

  get #regionSize(): number {
    return this.#tracked ? inflightSize(this.#config.size, this.#packed) : 0
  }

  #makeRing(base: number): Vring {
    const config = { ...this.#config, base }
    const memory = this.#translated ? this.#iotlb.memory() : space.memory
    const bytes = this.#tracked ? new Uint8Array(region, 0, inflightSize(config.size, this.#packed)) : undefined
    const ring = this.#packed
      ? new PackedRing(memory, config, bytes && new PackedInflight(bytes, config.size))
      : new SplitRing(memory, config, bytes && new SplitInflight(bytes, config.size))
    space.check(this.#translated ? [{ start: 0, end: 16 * PAGE }] : this.#owned, 'the start of a ring')
    return ring
  }

  #packedBase(size: number, start: number): number {
    const half = (start % size) | (start & 0x8000)
    return (half | (half << 16)) >>> 0
  }

  #layOut(size: number, index: number, wrap: number): void {
    const at = space.at(this.#config.descriptor)
    for (let i = 0; i < size; i++) {
      // Behind the position it is the last lap, before it this one; used by the device in both.
      const lap = i >= index ? wrap ^ 1 : wrap
      space.view.setUint16(at + 16 * i + 14, lap === 1 ? 0x8080 : 0, true)
    }
  }
}

function range(gpa: number, length: number): Range {
  const start = space.at(gpa)
  return { start, end: start + length }
}
