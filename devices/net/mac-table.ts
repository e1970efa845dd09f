/**
 * Which port a MAC address was last seen on: what a learning switch knows. A bounded hash table in typed arrays (open
 * addressing, linear probing), so nothing is allocated after the start, whatever addresses guests make up. Knows no
 * packets and no clock.
 */

const FREE = -1

// An entry is four numbers side by side, so that a look-up touches one cache line.
const LOW = 0
const HIGH = 1
/** FREE or the port. */
const PORT = 2
/** The second when it was seen last. */
const SEEN = 3
/** Entry i starts at i << SHIFT. */
const SHIFT = 2

export interface MacTableOptions {
  /** Addresses at most. Default 4096. */
  readonly capacity?: number
  /** Addresses of one port at most, so that a guest that makes up addresses keeps no room from the others. Default 1024. */
  readonly share?: number
  /** Seconds after which an address that sent nothing is forgotten. Default 300. */
  readonly ageing?: number
  /** Keys of the hash, two 32-bit numbers: secret, or a guest chooses addresses that collide. Default: random. */
  readonly secrets?: readonly [number, number]
}

/** An address is two numbers: `high`, its first two bytes, and `low`, its last four (signed or not), both big-endian. */
export class MacTable {
  readonly #capacity: number
  readonly #share: number
  readonly #ageing: number
  readonly #secret0: number
  readonly #secret1: number
  readonly #mask: number
  readonly #entries: Int32Array
  /** Addresses per port; grows with the highest port number that learns, which is configuration. */
  #owned = new Int32Array(16)
  #size = 0
  #expiredAt = Number.NEGATIVE_INFINITY

  /** Throws a RangeError unless 1 ≤ capacity ≤ 2^20, share ≥ 1 and ageing ≥ 1. */
  constructor(options: MacTableOptions = {}) {
    const { capacity = 4096, share = 1024, ageing = 300 } = options
    const whole = (value: number, highest: number) => Number.isInteger(value) && value >= 1 && value <= highest
    if (!whole(capacity, 2 ** 20)) throw new RangeError(`capacity ${capacity} is not in 1 … ${2 ** 20}`)
    if (!whole(share, 2 ** 31)) throw new RangeError(`share ${share} is less than 1`)
    if (!whole(ageing, 2 ** 31)) throw new RangeError(`ageing ${ageing} is less than 1 second`)
    const secrets = options.secrets ?? crypto.getRandomValues(new Int32Array(2))
    this.#capacity = capacity
    this.#share = share
    this.#ageing = ageing
    this.#secret0 = (secrets[0] as number) | 0
    this.#secret1 = (secrets[1] as number) | 1
    // At most half full, so that a probe ends after two or three slots.
    const slots = 2 ** Math.ceil(Math.log2(capacity * 2))
    this.#mask = slots - 1
    this.#entries = new Int32Array(slots << SHIFT)
    for (let slot = 0; slot < slots; slot++) this.#entries[(slot << SHIFT) + PORT] = FREE
  }

  /** Addresses that it holds. Those that aged count until somebody asks for them or `expire` runs. */
  get size(): number {
    return this.#size
  }

  /**
   * An address was seen as a source on a port, ≥ 0. One that was on another port moves.
   * @param now seconds of a clock that never goes back, < 2^31; a fraction is left out
   * @returns whether the table has it on this port now. Not when it is a group address or all zero, nor when the table or
   *   the port's share is full.
   */
  learn(high: number, low: number, port: number, now: number): boolean {
    const signed = low | 0
    const at = this.#locate(high, signed)
    if (this.#entries[at + PORT] === port) {
      this.#entries[at + SEEN] = now
      return true
    }
    // The first bit on the wire: the lowest of the first byte.
    if ((high & 0x100) !== 0 || (high | signed) === 0) return false
    return this.#place(high, signed, port, now)
  }

  /** The port of an address, or -1: not known, or too long ago. */
  find(high: number, low: number, now: number): number {
    const at = this.#locate(high, low | 0)
    const port = this.#entries[at + PORT]!
    if (port === FREE || now - this.#entries[at + SEEN]! < this.#ageing) return port
    this.#remove(at)
    return FREE
  }

  /** Forgets all addresses of a port. Looks at each slot. */
  forget(port: number): void {
    if (this.#ownedBy(port) === 0) return
    for (let at = 0; at < this.#entries.length; at += 1 << SHIFT) {
      // What moves up into the slot is looked at, too. Nothing moves from ahead of the walk to behind it.
      while (this.#entries[at + PORT] === port) this.#remove(at)
    }
  }

  /** Forgets what aged. Looks at each slot: some 10 µs; `learn` does it when there is no room, once per second at most. */
  expire(now: number): void {
    this.#expiredAt = now
    const entries = this.#entries
    for (let at = 0; at < entries.length; at += 1 << SHIFT) {
      while (entries[at + PORT] !== FREE && now - entries[at + SEEN]! >= this.#ageing) this.#remove(at)
    }
  }

  #place(high: number, low: number, port: number, now: number): boolean {
    if (port >= this.#owned.length) this.#growPorts(port)
    if (!this.#hasRoom(high, low, port)) {
      if (now - this.#expiredAt < 1) return false
      this.expire(now)
      if (!this.#hasRoom(high, low, port)) return false
    }
    // Again: expiry moved entries.
    const at = this.#locate(high, low)
    const entries = this.#entries
    const owner = entries[at + PORT]!
    if (owner === FREE) this.#size++
    else this.#owned[owner]!--
    this.#owned[port]!++
    entries[at + LOW] = low
    entries[at + HIGH] = high
    entries[at + PORT] = port
    entries[at + SEEN] = now
    return true
  }

  /** A move needs no room in the table, but some of the port's share. */
  #hasRoom(high: number, low: number, port: number): boolean {
    if (this.#ownedBy(port) >= this.#share) return false
    return this.#size < this.#capacity || this.#entries[this.#locate(high, low) + PORT] !== FREE
  }

  #ownedBy(port: number): number {
    return port < this.#owned.length ? this.#owned[port]! : 0
  }

  #growPorts(port: number): void {
    const owned = new Int32Array(port * 2)
    owned.set(this.#owned)
    this.#owned = owned
  }

  /** Where the entry of an address is, or the free one where it would go. */
  #locate(high: number, low: number): number {
    const entries = this.#entries
    let slot = this.#home(high, low)
    for (;;) {
      const at = slot << SHIFT
      if (entries[at + PORT] === FREE) return at
      if (entries[at + LOW] === low && entries[at + HIGH] === high) return at
      slot = (slot + 1) & this.#mask
    }
  }

  /** Both halves are mixed with a secret before they meet, so nobody outside can make two addresses that cancel out. */
  #home(high: number, low: number): number {
    let hash = low ^ Math.imul(high ^ this.#secret0, this.#secret1)
    hash = Math.imul(hash ^ (hash >>> 16) ^ this.#secret0, 0x85ebca6b)
    hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35)
    return (hash ^ (hash >>> 16)) & this.#mask
  }

  /** Frees an entry, and moves up what a probe would no longer find behind it. */
  #remove(at: number): void {
    const entries = this.#entries
    this.#owned[entries[at + PORT]!]!--
    this.#size--
    let hole = at >> SHIFT
    let slot = hole
    for (;;) {
      slot = (slot + 1) & this.#mask
      const from = slot << SHIFT
      if (entries[from + PORT] === FREE) break
      // It stays when its home lies behind the hole: cyclically in (hole, slot].
      const home = this.#home(entries[from + HIGH]!, entries[from + LOW]!)
      if (((slot - home) & this.#mask) < ((slot - hole) & this.#mask)) continue
      const to = hole << SHIFT
      entries[to + LOW] = entries[from + LOW]!
      entries[to + HIGH] = entries[from + HIGH]!
      entries[to + PORT] = entries[from + PORT]!
      entries[to + SEEN] = entries[from + SEEN]!
      hole = slot
    }
    entries[(hole << SHIFT) + PORT] = FREE
  }
}
