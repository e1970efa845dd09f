/**
 * The chains of a ring that are in flight: to find out whether one of them still uses a range that the IOTLB is to
 * forget, and which one is the oldest. Kept only behind a vIOMMU, and for devices that may hang.
 */
import type { Chain } from '../device/index.ts'

export class InFlightChains {
  /** By head: chains are pooled, so what was popped once tells by `inFlight` whether it is. */
  readonly #chains: (Chain | undefined)[]

  constructor(size: number) {
    this.#chains = new Array<Chain | undefined>(size).fill(undefined)
  }

  popped(chain: Chain): void {
    this.#chains[chain.head] = chain
  }

  /** The one that was popped first. */
  get oldest(): Chain | undefined {
    let oldest: Chain | undefined
    for (const chain of this.#chains)
      if (chain?.inFlight === true && (oldest === undefined || chain.poppedAt < oldest.poppedAt)) oldest = chain
    return oldest
  }

  /** Whether a buffer of a chain in flight lies in [address, address + size). */
  use(address: number, size: number): boolean {
    for (const chain of this.#chains) if (chain?.inFlight === true && uses(chain, address, address + size)) return true
    return false
  }
}

function uses(chain: Chain, start: number, end: number): boolean {
  for (let segment = 0; segment < chain.count; segment++) {
    const at = chain.regions[chain.region[segment]!]!.gpa + chain.offset[segment]!
    if (at < end && at + chain.length[segment]! > start) return true
  }
  return false
}
