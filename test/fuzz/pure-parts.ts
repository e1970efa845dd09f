/** Programs for the small pure parts: the IOTLB and the dirty log against plain models, the wire format against itself. */
import * as wire from '../../src/vhost-user/wire.ts'
import { DirtyLog, VHOST_LOG_PAGE } from '../../src/virtio/dirty-log.ts'
import { Iotlb } from '../../src/virtio/iotlb.ts'
import { type Input, promise } from './pure-input.ts'
import { PAGE } from './pure-memory.ts'

const PAGES = 24
const backing = new SharedArrayBuffer(PAGES * PAGE)

export function iotlbProgram(input: Input): void {
  const limit = 2 + input.below(12)
  const iotlb = new Iotlb(limit)
  /** By page of the IOVA: which page of the buffer, and how it may be used. */
  const model = new Map<number, { target: number; access: number }>()
  let forgets = false
  let snapshot = iotlb.memory()
  for (let steps = 0; !input.ended && steps < 300; steps++) {
    const how = input.u8()
    const page = input.below(PAGES)
    const pages = 1 + input.below(6)
    if ((how & 3) === 0) {
      iotlb.invalidate(page * PAGE, pages * PAGE)
      for (let i = 0; i < pages; i++) model.delete(page + i)
    } else {
      const target = input.below(PAGES - 6)
      const access = 1 + ((how >> 2) % 3)
      iotlb.update({
        gpa: page * PAGE,
        size: pages * PAGE,
        hva: 2 ** 40 + target * PAGE,
        buffer: backing,
        offset: target * PAGE,
        physical: 2 ** 33 + target * PAGE,
        access,
      })
      for (let i = 0; i < pages; i++) model.set(page + i, { target: target + i, access })
    }
    // It may forget what it was told, and only for want of room.
    forgets ||= model.size > limit
    const memory = iotlb.memory()
    promise(
      memory.translated && memory.regions.length <= limit,
      `${memory.regions.length} entries, ${limit} are allowed`
    )
    let end = 0
    for (const entry of memory.regions) {
      promise(entry.gpa >= end && entry.size > 0, 'entries overlap or are out of order')
      end = entry.end
    }
    for (let at = 0; at < PAGES + 6; at++) {
      const index = memory.find(at * PAGE)
      const expected = model.get(at)
      if (index < 0) {
        promise(expected === undefined || forgets, `page ${at} is forgotten`)
        continue
      }
      const entry = memory.regions[index]!
      const target = entry.start / PAGE + (at * PAGE - entry.gpa) / PAGE
      promise(expected !== undefined, `page ${at} is there, and was invalidated`)
      promise(target === expected.target && entry.access === expected.access, `page ${at} is at ${target}`)
      promise(entry.physical + at * PAGE - entry.gpa === 2 ** 33 + target * PAGE, `the physical address of page ${at}`)
      promise(entry.hva + at * PAGE - entry.gpa === 2 ** 40 + target * PAGE, `the address of page ${at}`)
    }
    // One that was given out before must not change under its ring.
    promise(snapshot === memory || snapshot.regions !== memory.regions, 'a snapshot changed')
    snapshot = memory
  }
}

export function logProgram(input: Input): void {
  const bytes = 1 + input.below(40)
  const guarded = new Uint8Array(bytes + 8)
  const log = new DirtyLog(guarded.subarray(0, bytes))
  const model = new Set<number>()
  for (let steps = 0; !input.ended && steps < 100; steps++) {
    const how = input.u8()
    const address = input.u16() * ((how & 1) === 0 ? 1 : 64)
    const length = (how & 2) === 0 ? input.u16() : (input.u32() % 2 ** 21) * ((how & 4) === 0 ? 1 : -1)
    log.mark(address, length)
    if (length <= 0) continue
    for (let page = Math.floor(address / VHOST_LOG_PAGE); page * VHOST_LOG_PAGE < address + length; page++)
      model.add(page)
  }
  for (let page = 0; page < guarded.length * 8; page++) {
    const set = (guarded[page >> 3]! & (1 << (page & 7))) !== 0
    promise(set === (model.has(page) && page < bytes * 8), `page ${page} is ${set ? '' : 'not '}marked`)
  }
}

/** Every description of the wire format: what is read and written again is the same. */
export function wireProgram(input: Input): void {
  const kinds: readonly [number, (view: DataView, copy: DataView) => void][] = [
    [wire.MEMORY_REGION_SIZE, (a, b) => wire.writeMemoryRegion(b, 0, wire.readMemoryRegion(a, 0))],
    [wire.VRING_ADDRESS_SIZE, (a, b) => wire.writeVringAddress(b, 0, wire.readVringAddress(a, 0))],
    [wire.LOG_DESCRIPTION_SIZE, (a, b) => wire.writeLog(b, 0, wire.readLog(a, 0))],
    [wire.INFLIGHT_DESCRIPTION_SIZE, (a, b) => wire.writeInflight(b, 0, wire.readInflight(a, 0))],
    [wire.IOTLB_MESSAGE_SIZE, (a, b) => wire.writeIotlb(b, 0, wire.readIotlb(a, 0))],
  ]
  for (let steps = 0; !input.ended && steps < 20; steps++) {
    const [size, roundTrip] = kinds[input.below(kinds.length)]!
    const bytes = Uint8Array.from({ length: size }, () => input.u8())
    const copy = new Uint8Array(size)
    roundTrip(new DataView(bytes.buffer), new DataView(copy.buffer))
    promise(Buffer.compare(bytes, copy) === 0, 'a description is not written as it was read')
    promise(wire.requestName(input.u8()).length > 0, 'a request without a name')
  }
}
