/**
 * A thread of a hostile guest: as long as it may, it changes words in the memory of the rings, between values that are good
 * and bad in their place, so that whoever reads twice reads two things.
 */
import { parentPort, workerData } from 'node:worker_threads'
import { Random } from './random.ts'
import { FIRST_BYTES, RING_STRIDE } from './ring-content.ts'

/** What the main thread tells this one. */
export interface Flipping {
  /** As i32: [0] 0 = end, 1 = wait, 2 = flip; [1] thousands of flips; [2] 1 = it has the memory. */
  readonly control: SharedArrayBuffer
  readonly seed: number
}

const { control, seed } = workerData as Flipping
const state = new Int32Array(control)
const random = new Random(seed)
let memory: Uint32Array | undefined
let inflight: Uint32Array | undefined

/** Addresses, lengths and flags that a descriptor may have; none names the page that nobody may write to. */
const VALUES = [
  0,
  1,
  2,
  3,
  4,
  8,
  16,
  64,
  512,
  4096,
  16_384,
  20_000,
  FIRST_BYTES - 8,
  0xffff_ffff,
  0x8000_0000,
  0x8080_0000,
]
const FLAGS = [0, 1, 2, 3, 4, 6, 0x80, 0x8000, 0x82, 0x8002, 0x83]

parentPort?.on('message', (message: { memory: SharedArrayBuffer; inflight: SharedArrayBuffer | undefined }) => {
  memory = new Uint32Array(message.memory)
  inflight = message.inflight === undefined ? undefined : new Uint32Array(message.inflight)
  // ORDER: the main thread waits for it.
  Atomics.store(state, 2, 1)
  Atomics.notify(state, 2)
})
setImmediate(step)

function step(): void {
  // ORDER: pairs with the main thread's store; what it says may be late.
  const wish = Atomics.load(state, 0)
  if (wish === 0) process.exit()
  if (wish === 2 && memory !== undefined) for (let i = 0; i < 1000; i++) flip(memory)
  if (wish === 2) Atomics.add(state, 1, 1)
  else Atomics.wait(state, 0, 1, 5)
  setImmediate(step)
}

function flip(words: Uint32Array): void {
  if (inflight !== undefined && random.one(16)) {
    inflight[random.below(inflight.length)]! ^= 1 << random.below(32)
    return
  }
  const ring = random.below(16) * (RING_STRIDE / 4)
  switch (random.below(4)) {
    case 0: {
      // A descriptor, of the ring or of a table.
      const at = ring + (random.one(2) ? 0 : 3072) + 4 * random.below(32)
      const field = random.below(4)
      if (field === 1) words[at + 1] = random.one(8) ? 0x10_0000 : 0
      else if (field === 3)
        words[at + 3] = random.one(2)
          ? random.pick(FLAGS) | (random.below(32) << 16)
          : (random.pick(FLAGS) << 16) | random.below(32)
      else words[at + field] = random.pick(VALUES)
      break
    }
    case 1:
      // avail.idx and what is near it; the driver's event structure.
      words[ring + 1024 + random.below(20)] = random.next()
      break
    case 2:
      // Headers of requests, packets and commands.
      words[ring + 4096 + random.below(256)] = random.pick(VALUES)
      break
    default:
      // The used ring, which is the device's.
      words[ring + 2048 + random.below(20)] = random.next()
  }
}
