/**
 * The chains of a ring that use translated memory, to find out whether one of them still uses a range that the IOTLB is
 * to forget. Kept only behind a vIOMMU.
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
