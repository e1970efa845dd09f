/**
 * Which miss of a ring behind a vIOMMU the front-end was told of, so that it hears of each one once. A ring has at most
 * one miss: it goes on only when that was answered.
 */
import type { Vring } from '../virtio/vring.ts'

/** How long an answer may take before a kick makes us ask again, in microseconds. */
const PATIENCE = 1_000_000

export class MissReport {
  /** What was told, -1 = nothing. */
  #address = -1
  #access = 0
  #toldAt = 0

  /**
   * After the ring looked for chains or wrote to itself: whether its miss has to be told. One that is still there after
   * an update is told again only when it has changed: QEMU answers a miss of write access with a read-only entry where
   * that is what the guest allows, and would do so as fast as it is asked. @param now in microseconds
   */
  due(vring: Vring, now: number): boolean {
    const { missAddress } = vring
    if (missAddress < 0) {
      this.#address = -1
      return false
    }
    const { missAccess } = vring
    if (missAddress === this.#address && missAccess === this.#access) return false
    this.#address = missAddress
    this.#access = missAccess
    this.#toldAt = now
    return true
  }

  /**
   * An invalidation took this range: what was told of it may have been answered, and be gone before it was used. A miss
   * elsewhere is still to be answered; told twice, it would be answered a second time when the driver may have ended
   * the mapping, which the IOMMU then reports as a fault.
   */
  forgetRange(address: number, size: number): void {
    if (this.#address >= address && this.#address < address + size) this.forget()
  }

  /**
   * The driver kicked, which is its way to say that things have changed: a front-end that couldn't answer doesn't do it
   * later by itself. Not while an answer may be on its way: see `forgetRange`.
   */
  kicked(now: number): void {
    if (now - this.#toldAt > PATIENCE) this.forget()
  }

  /** The next miss is told whatever it is: all memory is another one. */
  forget(): void {
    this.#address = -1
  }
}
