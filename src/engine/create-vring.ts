/** The ring of a started queue, by the format that was negotiated, and with what records its chains in flight. */
import { inflightSize, PackedInflight, SplitInflight } from '../virtio/inflight.ts'
import type { GuestMemory } from '../virtio/memory.ts'
import { PackedRing } from '../virtio/packed-ring.ts'
import { SplitRing } from '../virtio/split-ring.ts'
import type { Vring } from '../virtio/vring.ts'
import type { StartQueue } from './messages.ts'

/** @throws an error of virtio/inflight.ts when the in-flight buffer is another ring's or of another version */
export function createVring(memory: GuestMemory, { vring, inflight }: Pick<StartQueue, 'vring' | 'inflight'>): Vring {
  const { size, packed } = vring
  const bytes = inflight && new Uint8Array(inflight.buffer, inflight.offset, inflightSize(size, packed))
  if (packed) return new PackedRing(memory, vring, bytes && new PackedInflight(bytes, size))
  return new SplitRing(memory, vring, bytes && new SplitInflight(bytes, size))
}
