/**
 * The front-end's drivers against the back-end's rings, of both formats, on plain buffers: every chain once, and its
 * bytes.
 */
import { describe, expect, test } from 'vitest'
import type { VirtqueueDriver } from '../../src/frontend/driver.ts'
import { PACKED_BASE, PackedDriver, packedRingBytes } from '../../src/frontend/packed-driver.ts'
import { SplitDriver, splitRingBytes } from '../../src/frontend/split-driver.ts'
import type { Chain } from '../../src/virtio/chain.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { PackedRing } from '../../src/virtio/packed-ring.ts'
import { SplitRing } from '../../src/virtio/split-ring.ts'
import type { Vring } from '../../src/virtio/vring.ts'

const GPA = 0x10_0000
const SIZE = 2 ** 20

interface Setup {
  readonly packed: boolean
  readonly size: number
  readonly eventIdx: boolean
  readonly inOrder: boolean
}

function make({ packed, size, eventIdx, inOrder }: Setup): {
  driver: VirtqueueDriver
  ring: Vring
  bytes: Uint8Array
  kicked: () => boolean
} {
  const buffer = new SharedArrayBuffer(SIZE)
  const [first = 0, second = 0, third = 0] = Object.values(packed ? packedRingBytes(size) : splitRingBytes(size))
  const driverAt = Math.ceil(first / 64) * 64
  const deviceAt = driverAt + Math.ceil(second / 64) * 64
  expect(deviceAt + third).toBeLessThan(SIZE / 2)
  let kicks = 0
  const kick = (): void => void kicks++
  const area = (offset: number): { buffer: SharedArrayBuffer; offset: number } => ({ buffer, offset })
  const common = { size, eventIdx, inOrder, kick }
  const driver = packed
    ? new PackedDriver({
        ...common,
        areas: { descriptors: area(0), driverEvent: area(driverAt), deviceEvent: area(deviceAt) },
      })
    : new SplitDriver({
        ...common,
        areas: { descriptors: area(0), available: area(driverAt), used: area(deviceAt) },
      })
  const memory = new GuestMemory([{ gpa: GPA, buffer, size: SIZE, hva: 0 }])
  const config = {
    size,
    descriptor: GPA,
    driver: GPA + driverAt,
    device: GPA + deviceAt,
    base: packed ? PACKED_BASE : 0,
    eventIdx,
    indirect: true,
    packed,
    inOrder,
  }
  const ring = packed ? new PackedRing(memory, config) : new SplitRing(memory, config)
  const kicked = (): boolean => {
    const before = kicks
    kicks = 0
    return before > 0
  }
  return { driver, ring, bytes: new Uint8Array(buffer), kicked }
}

const setups: Setup[] = []
for (const packed of [false, true]) {
  for (const size of packed ? [1, 2, 3, 7, 16, 100] : [1, 2, 4, 16, 128]) {
    for (const eventIdx of [false, true]) {
      for (const inOrder of [false, true]) setups.push({ packed, size, eventIdx, inOrder })
    }
  }
}

describe.each(setups)('packed $packed, $size entries, EVENT_IDX $eventIdx, IN_ORDER $inOrder', (setup) => {
  test('chains go to the device and back, and nobody sleeps through one', () => {
    const { driver, ring, bytes, kicked } = make(setup)
    const { size } = setup
    let seed = size + 1
    const draw = (limit: number): number => {
      seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fff_ffff
      return (seed >>> 8) % limit
    }
    const flying = new Map<number, { length: number; written: number }>()
    /** Chains in the order in which the device sees them. */
    const issued: number[] = []
    let popped = 0
    const held: { chain: Chain; handle: number }[] = []
    let completed = 0
    let driverSleeps = false
    let deviceSleeps = !ring.rearm()
    for (let step = 0; step < 1500; step++) {
      // The driver: some chains of up to three descriptors, sometimes in a table.
      for (let i = draw(4); i > 0; i--) {
        const segments = Array.from({ length: 1 + draw(3) }, (_, n) => ({
          address: GPA + SIZE / 2 + draw(4096),
          length: 1 + draw(2000),
          writable: n > 0,
        }))
        const at = SIZE - 64 * (1 + (issued.length % 1024))
        const table = { gpa: GPA + at, bytes: bytes.subarray(at, at + 64) }
        const chain = driver.build(segments, draw(3) === 0 ? table : undefined)
        if (chain < 0) continue
        driver.issue(chain)
        issued.push(chain)
        flying.set(chain, { length: segments.reduce((sum, one) => sum + one.length, 0), written: -1 })
      }
      driver.publish()
      if (kicked()) deviceSleeps = false
      // The device: it pops all, gives some back in any order, and goes to sleep when nothing is left.
      while (!deviceSleeps) {
        for (let chain = ring.pop(); chain !== undefined; chain = ring.pop()) {
          const handle = issued[popped++] as number
          expect(chain.readable + chain.writable).toBe(flying.get(handle)?.length)
          held.push({ chain, handle })
        }
        expect(ring.error).toBeUndefined()
        deviceSleeps = !ring.rearm()
      }
      for (let i = draw(held.length + 1); i > 0; i--) {
        const [{ chain, handle }] = held.splice(draw(held.length), 1) as [(typeof held)[number]]
        const written = draw(chain.writable + 1)
        ;(flying.get(handle) as { written: number }).written = written
        ring.push(chain, written, written)
      }
      if (ring.publish()) driverSleeps = false
      // The driver: it reads what was used, and sleeps when nothing is left.
      if (driverSleeps) {
        expect(driver.hasUsed()).toBe(false)
        continue
      }
      do {
        const pending = driver.pending()
        let count = 0
        for (let chain = driver.pop(); chain >= 0; chain = driver.pop()) {
          if (setup.inOrder) expect(chain).toBe(issued[completed])
          expect(driver.written).toBe(flying.get(chain)?.written)
          flying.delete(chain)
          driver.release(chain)
          completed++
          count++
        }
        expect(count).toBe(pending)
      } while (driver.enableCalls())
      driverSleeps = true
    }
    expect(completed).toBeGreaterThan(120)
    expect(driver.inFlight).toBe(flying.size)
  })
})
