/** A request queue with an engine that the test plays: what becomes of I/O that is short, fails or is cancelled. */
import { beforeEach, describe, expect, test, vi } from 'vitest'
import { BOUNCE_SIZE } from '../../devices/disk/bounce.ts'
import type * as queueModule from '../../devices/scsi/queue.ts'
import * as shared from '../../devices/scsi/shared.ts'
import type { QueueHandler } from '../../src/device/index.ts'
import { decodeSense } from '../../src/frontend/scsi.ts'
import { cdb, unmapList } from '../../src/frontend/scsi-cdb.ts'
import { Chain } from '../../src/virtio/chain.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { FakeContext, type Operation } from '../blk/fake-context.ts'

const EINTR = -4
const EIO = -5
const EAGAIN = -11
const ENOSPC = -28
const EOPNOTSUPP = -95
const EDQUOT = -122
const PUNCH = 3
const ZERO = 17
const HEADER = 51
const RESPONSE = 108

let createQueueHandler: typeof queueModule.createQueueHandler
beforeEach(async () => {
  // The bounce buffers are a module's state, as an iothread has them.
  vi.resetModules()
  createQueueHandler = (await import('../../devices/scsi/queue.ts')).createQueueHandler
})

class RequestContext extends FakeContext {
  override readonly queueIndex: number = 2
  readonly reports: shared.Report[] = []

  constructor() {
    super(0n)
  }

  override report = (message: unknown): void => {
    this.reports.push(message as shared.Report)
  }
}

class Bench {
  readonly context = new RequestContext()
  readonly state = new shared.ScsiState(2)
  readonly handler: QueueHandler
  readonly bytes: Uint8Array
  readonly #memory: GuestMemory
  #free = 0
  #head = 0

  constructor(file: Partial<shared.UnitFile> = {}, unsafe = false) {
    for (const [lun, unit] of this.state.units.entries()) {
      unit.plugIn(
        {
          fd: 40 + lun,
          size: 2 ** 20,
          blockSize: 512,
          memoryAlign: 1,
          lengthAlign: 1,
          readOnly: false,
          discard: true,
          writeback: true,
          serial: `unit${lun}`,
          ...file,
        },
        lun + 1
      )
      unit.attentions = 0
    }
    const data = { state: this.state.buffer, units: 2, unsafe }
    this.handler = createQueueHandler(this.context, data) as QueueHandler
    const buffer = new ArrayBuffer(8 << 20)
    this.bytes = new Uint8Array(buffer)
    this.#memory = new GuestMemory([{ gpa: 0, size: buffer.byteLength, hva: 1 << 30, buffer }])
  }

  get operations(): Operation[] {
    return this.context.io.operations
  }

  /** A command in flight. @param misalign bytes to move the data off its page */
  send(
    command: Uint8Array,
    out: Uint8Array = new Uint8Array(0),
    inLength = 0,
    { misalign = 0, tag = 1, lun = 0 } = {}
  ): Chain {
    const chain = new Chain(this.#head++)
    chain.begin(this.#memory)
    const header = new Uint8Array(HEADER)
    header.set([1, 0, 0, lun, 0, 0, 0, 0, tag])
    header.set(command, 19)
    const place = (length: number, skew: number): number => {
      const gpa = this.#free + skew
      this.#free = Math.ceil((gpa + length) / 4096) * 4096
      return gpa
    }
    const add = (content: Uint8Array, skew = 0): void => {
      const gpa = place(content.length, skew)
      this.bytes.set(content, gpa)
      chain.append(this.#memory, gpa, content.length, false)
    }
    add(header)
    if (out.length > 0) add(out, misalign)
    chain.append(this.#memory, place(RESPONSE, 0), RESPONSE, true)
    if (inLength > 0) chain.append(this.#memory, place(inLength, misalign), inLength, true)
    chain.inFlight = true
    this.handler.handle!(chain)
    return chain
  }

  /** Ends the oldest operation. @param result all of it when left out */
  end(result?: number): Operation {
    const operation = this.operations.shift()
    if (operation === undefined) throw new Error('no operation is under way')
    this.handler.completed!(operation.chain, result ?? operation.length)
    return operation
  }

  endAll(): number {
    let count = 0
    for (; this.operations.length > 0; count++) this.end()
    return count
  }

  /** What a chain was answered with. */
  answer(chain: Chain) {
    const completion = this.context.completions.find(({ head }) => head === chain.head)
    if (completion === undefined) return undefined
    const at = chain.offset[chain.readableCount]!
    const view = new DataView(this.bytes.buffer, at, RESPONSE)
    const { key, code, information } = decodeSense(this.bytes.subarray(at + 12, at + 12 + view.getUint32(0, true)))
    const { written, operation, bytes } = completion
    return {
      response: view.getUint8(11),
      status: view.getUint8(10),
      residual: view.getUint32(4, true),
      key,
      code,
      information,
      written,
      operation,
      bytes,
    }
  }

  /** The data that a chain was given. */
  data(chain: Chain): Uint8Array {
    const last = chain.count - 1
    return this.bytes.slice(chain.offset[last]!, chain.offset[last]! + chain.length[last]!)
  }

  settle(order: Omit<shared.Settle, 'kind' | 'id'>): shared.Settled {
    this.handler.message!({ kind: 'settle', id: 5, ...order } satisfies shared.Settle)
    return this.context.reports.at(-1) as shared.Settled
  }
}

const fill = (length: number, seed = 1) => Uint8Array.from({ length }, (_, i) => (i * 7 + seed) & 0xff)
const good = { response: 0, status: 0, residual: 0, key: -1 }
const failed = (key: number, code: number, information = -1) => ({ response: 0, status: 2, key, code, information })

describe('reads', () => {
  test('one operation, behind the response', () => {
    const bench = new Bench()
    const chain = bench.send(cdb.read10(8, 8), undefined, 4096)
    expect(bench.operations).toMatchObject([{ kind: 'read', offset: 4096, start: RESPONSE, length: 4096 }])
    bench.end()
    const counted = { written: RESPONSE + 4096, operation: shared.READ, bytes: 4096 }
    expect(bench.answer(chain)).toMatchObject({ ...good, ...counted })
    expect(bench.context.errors).toEqual([])
  })

  test('short, interrupted and again', () => {
    const bench = new Bench()
    const chain = bench.send(cdb.read10(0, 8), undefined, 4096)
    bench.end(100)
    bench.end(EINTR)
    bench.end(EAGAIN)
    expect(bench.end()).toMatchObject({ offset: 100, start: RESPONSE + 100, length: 3996 })
    expect(bench.answer(chain)).toMatchObject(good)
  })

  test('large ones go step by step', () => {
    const bench = new Bench({ size: 2 ** 30 })
    bench.send(cdb.read16(0, 6000), undefined, 6000 * 512)
    expect([bench.end().length, bench.end().length, bench.end().length]).toEqual([2 ** 20, 2 ** 20, 974_848])
  })

  test('errors name the block, and tell what came before', () => {
    const bench = new Bench()
    const chain = bench.send(cdb.read10(100, 8), undefined, 4096)
    bench.end(1024)
    bench.end(EIO)
    const expected = { ...failed(3, 0x1100, 102), residual: 4096 - 1024, written: RESPONSE + 1024, bytes: 0 }
    expect(bench.answer(chain)).toMatchObject(expected)
    expect(bench.context.errors).toEqual([shared.IO])
  })

  test('the end of the file inside the capacity', () => {
    const bench = new Bench()
    const chain = bench.send(cdb.read10(100, 8), undefined, 4096)
    bench.end(0)
    expect(bench.answer(chain)).toMatchObject(failed(3, 0x1100, 100))
    expect(bench.context.errors).toEqual([shared.END_OF_FILE])
  })

  test('FUA flushes first', () => {
    const bench = new Bench()
    const chain = bench.send(cdb.read10(0, 1, 8), undefined, 512)
    expect(bench.end()).toMatchObject({ kind: 'fdatasync' })
    expect(bench.end()).toMatchObject({ kind: 'read' })
    expect(bench.answer(chain)).toMatchObject(good)
    const bad = bench.send(cdb.read10(0, 1, 8), undefined, 512)
    bench.end(EIO)
    expect(bench.answer(bad)).toMatchObject(failed(3, 0x1100, 0))
    // The next one of the same chain doesn't.
    const unsafe = new Bench({}, true)
    unsafe.send(cdb.read10(0, 1, 8), undefined, 512)
    expect(unsafe.operations).toMatchObject([{ kind: 'read' }])
  })
})

describe('writes', () => {
  test.each([
    ['with a write cache', { writeback: true }, 0, false],
    ['without one', { writeback: false }, 0, true],
    ['with FUA', { writeback: true }, 8, true],
  ])('%s', (_, file, flags, dsync) => {
    const bench = new Bench(file)
    const chain = bench.send(cdb.write10(8, 2, flags), fill(1024))
    const operation = bench.end()
    expect(operation).toMatchObject({ kind: 'write', offset: 4096, start: HEADER, length: 1024, dsync })
    expect(operation.bytes).toEqual(fill(1024))
    expect(bench.answer(chain)).toMatchObject({ ...good, written: RESPONSE, operation: shared.WRITE, bytes: 1024 })
  })

  test('nothing is durable with --cache unsafe', () => {
    const bench = new Bench({ writeback: false }, true)
    bench.send(cdb.write10(8, 2, 8), fill(1024))
    expect(bench.end()).toMatchObject({ dsync: false })
    const flush = bench.send(cdb.synchronize10())
    expect(bench.answer(flush)).toMatchObject(good)
  })

  test.each([
    ['EIO', EIO, failed(3, 0x0c00, 102), shared.IO],
    ['ENOSPC', ENOSPC, failed(7, 0x2707), shared.NO_SPACE],
    ['EDQUOT', EDQUOT, failed(7, 0x2707), shared.NO_SPACE],
  ])('%s', (_, result, expected, error) => {
    const bench = new Bench()
    const chain = bench.send(cdb.write10(100, 8), fill(4096))
    bench.end(1024)
    bench.end(result)
    expect(bench.answer(chain)).toMatchObject({ ...expected, residual: 4096, written: RESPONSE })
    expect(bench.context.errors).toEqual([error])
  })

  test('a flush that fails', () => {
    const bench = new Bench()
    const chain = bench.send(cdb.synchronize16())
    bench.end(EIO)
    expect(bench.answer(chain)).toMatchObject(failed(3, 0x0c00, 0))
  })

  test('WRITE AND VERIFY reads back, and compares', () => {
    const bench = new Bench()
    const chain = bench.send(cdb.writeVerify10(8, 2, 2), fill(1024))
    expect(bench.end()).toMatchObject({ kind: 'write', dsync: true })
    const read = bench.operations[0]!
    expect(read).toMatchObject({ kind: 'readBuffer', offset: 4096, length: 1024 })
    read.buffer!.bytes.set(fill(1024))
    bench.end(600)
    const rest = bench.operations[0]!
    expect(rest).toMatchObject({ offset: 4696, length: 424 })
    rest.buffer!.bytes.set(fill(1024).subarray(600, 1000))
    rest.buffer!.bytes[400] = 0xee
    bench.end()
    expect(bench.answer(chain)).toMatchObject(failed(0xe, 0x1d00, 1000))
    expect(bench.context.errors).toEqual([shared.MISCOMPARED])
  })
})

describe('direct I/O', () => {
  const direct = { memoryAlign: 512, lengthAlign: 512 }

  test('what is aligned goes straight', () => {
    const bench = new Bench(direct)
    bench.send(cdb.read10(0, 8), undefined, 4096)
    expect(bench.end()).toMatchObject({ kind: 'read' })
  })

  test('what is not goes through a buffer, in pieces', () => {
    const bench = new Bench(direct)
    const length = BOUNCE_SIZE + 512
    const read = bench.send(cdb.read10(0, length / 512), undefined, length, { misalign: 1 })
    const first = bench.operations[0]!
    first.buffer!.bytes.set(fill(BOUNCE_SIZE))
    expect(bench.end()).toMatchObject({ kind: 'readBuffer', offset: 0, length: BOUNCE_SIZE })
    bench.operations[0]!.buffer!.bytes.set(fill(512, 3))
    expect(bench.end()).toMatchObject({ kind: 'readBuffer', offset: BOUNCE_SIZE, length: 512 })
    expect(bench.answer(read)).toMatchObject(good)
    expect(Buffer.compare(bench.data(read), Buffer.concat([fill(BOUNCE_SIZE), fill(512, 3)]))).toBe(0)
    const write = bench.send(cdb.write10(0, 2), fill(1024, 5), 0, { misalign: 1 })
    expect(bench.end()).toMatchObject({ kind: 'writeBuffer', bytes: fill(1024, 5) })
    expect(bench.answer(write)).toMatchObject(good)
  })

  test('requests that find no buffer wait their turn', () => {
    const bench = new Bench(direct)
    const chains = Array.from({ length: 20 }, () => bench.send(cdb.read10(0, 1), undefined, 512, { misalign: 4 }))
    expect(bench.operations).toHaveLength(16)
    expect(bench.endAll()).toBe(20)
    for (const chain of chains) expect(bench.answer(chain)).toMatchObject(good)
  })
})

describe('UNMAP and WRITE SAME', () => {
  const list = unmapList([
    { lba: 0, blocks: 8 },
    { lba: 100, blocks: 0 },
    { lba: 16, blocks: 8 },
  ])

  test('UNMAP punches holes, one range after the other', () => {
    const bench = new Bench()
    const chain = bench.send(cdb.unmap(list.length), list)
    expect(bench.end(0)).toMatchObject({ kind: 'fallocate', mode: PUNCH, offset: 0, length: 4096 })
    expect(bench.end(EINTR)).toMatchObject({ offset: 8192 })
    expect(bench.end(0)).toMatchObject({ kind: 'fallocate', mode: PUNCH, offset: 8192, length: 4096 })
    expect(bench.answer(chain)).toMatchObject({ ...good, operation: shared.UNMAP })
  })

  test('UNMAP writes nothing where there can be no hole, and is durable where writes are', () => {
    const bench = new Bench({ writeback: false })
    const chain = bench.send(cdb.unmap(list.length), list)
    bench.end(EOPNOTSUPP)
    bench.end(EOPNOTSUPP)
    expect(bench.end(0)).toMatchObject({ kind: 'fdatasync' })
    expect(bench.answer(chain)).toMatchObject(good)
  })

  test('zeroes by the cheapest way that the file system has', () => {
    const bench = new Bench({ writeback: false })
    const chain = bench.send(cdb.writeSame16(0, 8, 8), new Uint8Array(512))
    expect(bench.end(EOPNOTSUPP)).toMatchObject({ kind: 'fallocate', mode: PUNCH })
    expect(bench.end(EOPNOTSUPP)).toMatchObject({ kind: 'fallocate', mode: ZERO })
    expect(bench.end(1000)).toMatchObject({ kind: 'writeBuffer', offset: 0, length: 4096 })
    expect(bench.end()).toMatchObject({ kind: 'writeBuffer', offset: 1000, length: 3096, bytes: new Uint8Array(3096) })
    expect(bench.end(0)).toMatchObject({ kind: 'fdatasync' })
    expect(bench.answer(chain)).toMatchObject({ ...good, operation: shared.WRITE_SAME })
  })

  test('without UNMAP no hole is made', () => {
    const bench = new Bench()
    bench.send(cdb.writeSame10(0, 8), new Uint8Array(512))
    expect(bench.end(0)).toMatchObject({ mode: ZERO })
  })

  test('a pattern goes on where a short write ended', () => {
    const bench = new Bench()
    const block = fill(512)
    const chain = bench.send(cdb.writeSame16(8, 600, 8), block)
    const total = 600 * 512
    const file = new Uint8Array(total)
    for (let at = 0; at < total; ) {
      const operation = bench.operations[0]!
      expect(operation).toMatchObject({ kind: 'writeBuffer', offset: 4096 + at })
      const result = Math.min(operation.length, 100_001)
      file.set(operation.bytes!.subarray(0, result), at)
      at += result
      bench.end(result)
    }
    expect(bench.answer(chain)).toMatchObject(good)
    for (let i = 0; i < 600; i++) expect(Buffer.compare(file.subarray(i * 512, (i + 1) * 512), block)).toBe(0)
  })

  test('no space, an error, nothing written', () => {
    const bench = new Bench()
    const full = bench.send(cdb.unmap(list.length), list)
    bench.end(ENOSPC)
    expect(bench.answer(full)).toMatchObject({ ...failed(7, 0x2707), residual: list.length })
    const error = bench.send(cdb.writeSame10(8, 8), new Uint8Array(512))
    bench.end(EIO)
    expect(bench.answer(error)).toMatchObject(failed(3, 0x0c00, 8))
    const nothing = bench.send(cdb.writeSame10(8, 8), fill(512))
    bench.end(0)
    expect(bench.answer(nothing)).toMatchObject(failed(3, 0x0c00, 8))
  })
})

describe('unit attentions', () => {
  test('the first command hears of it, but not those that must not', () => {
    const bench = new Bench()
    bench.state.units[0]!.raise(0x2a09)
    for (const command of [cdb.inquiry(), cdb.reportLuns()])
      expect(bench.answer(bench.send(command, undefined, 4096))).toMatchObject({ status: 0 })
    expect(bench.answer(bench.send(cdb.read10(0, 1), undefined, 512))).toMatchObject(failed(6, 0x2a09))
    expect(bench.context.errors).toEqual([])
    bench.state.units[0]!.raise(0x2903)
    const asked = bench.send(cdb.requestSense(), undefined, 18)
    expect(decodeSense(bench.data(asked))).toMatchObject({ key: 6, code: 0x2903 })
    expect(bench.answer(bench.send(cdb.testUnitReady()))).toMatchObject(good)
  })

  test('an unknown command hears of it as well', () => {
    const bench = new Bench()
    bench.state.units[0]!.raise(0x2900)
    expect(bench.answer(bench.send(Uint8Array.of(0xff, 0, 0, 0, 0, 0)))).toMatchObject(failed(6, 0x2900))
    expect(bench.answer(bench.send(Uint8Array.of(0xff, 0, 0, 0, 0, 0)))).toMatchObject(failed(5, 0x2000))
  })
})

describe('tasks', () => {
  test('those that match are counted; those to cancel end with the next step', () => {
    const bench = new Bench()
    const chains = [1, 2, 3].map((tag) =>
      bench.send(cdb.read10(0, 8), undefined, 4096, { tag, lun: tag === 3 ? 1 : 0 })
    )
    const found = (order: Omit<shared.Settle, 'kind' | 'id'>) => bench.settle(order).tasks
    expect(found({ lun: -1 })).toBe(3)
    expect(found({ lun: 0 })).toBe(2)
    expect(found({ lun: 0, tag: { low: 2, high: 0 } })).toBe(1)
    expect(found({ lun: 1, tag: { low: 2, high: 0 } })).toBe(0)
    expect(found({ lun: 0, tag: { low: 2, high: 1 } })).toBe(0)
    expect(found({ lun: 0, tag: { low: 2, high: 0 }, cancel: 2 })).toBe(1)
    expect(bench.settle({ lun: 0 })).toMatchObject({ id: 5, tasks: 2, taken: 3 })
    bench.end()
    bench.end(100)
    expect(bench.answer(chains[0]!)).toMatchObject(good)
    expect(bench.answer(chains[1]!)).toMatchObject({ response: 2, residual: 4096, written: RESPONSE, bytes: 0 })
    expect(bench.context.errors).toEqual([shared.ABORTED])
    expect(found({ lun: 0 })).toBe(0)
  })

  test('one that waits for a buffer ends when it gets one, and gives it on', () => {
    const bench = new Bench({ memoryAlign: 512, lengthAlign: 512 })
    const chains = Array.from({ length: 18 }, (_, i) =>
      bench.send(cdb.read10(0, 1), undefined, 512, { misalign: 4, tag: i + 1 })
    )
    expect(bench.settle({ lun: 0, tag: { low: 17, high: 0 }, cancel: 4 }).tasks).toBe(1)
    expect(bench.endAll()).toBe(17)
    expect(chains.map((chain) => bench.answer(chain)?.response)).toEqual([...new Array<number>(16).fill(0), 4, 0])
  })

  test('a cancelled request leaves nothing to the next of its head', () => {
    const bench = new Bench()
    const chain = bench.send(cdb.read10(0, 8, 8), undefined, 4096)
    bench.settle({ lun: 0, cancel: 2 })
    bench.end(0)
    expect(bench.answer(chain)).toMatchObject({ response: 2 })
    bench.context.completions.length = 0
    chain.inFlight = true
    bench.handler.handle!(chain)
    expect(bench.end(0)).toMatchObject({ kind: 'fdatasync' })
    bench.end()
    expect(bench.answer(chain)).toMatchObject(good)
  })

  test('a unit that was pulled out is closed when nothing uses it, and opened anew', () => {
    const bench = new Bench()
    const chain = bench.send(cdb.read10(0, 1), undefined, 512)
    expect(bench.context.io.open).toEqual([40])
    bench.state.units[0]!.pullOut()
    expect(bench.settle({ lun: 0, detach: true }).tasks).toBe(1)
    expect(bench.answer(bench.send(cdb.read10(0, 1), undefined, 512))).toMatchObject(failed(5, 0x2500))
    expect(bench.context.io.open).toEqual([40])
    bench.end()
    expect(bench.answer(chain)).toMatchObject(good)
    expect(bench.settle({ lun: 0, detach: true }).tasks).toBe(0)
    expect(bench.context.io.open).toEqual([])
    const unit = { size: 4096, blockSize: 512, memoryAlign: 1, lengthAlign: 1, readOnly: true, discard: false }
    bench.state.units[0]!.plugIn({ fd: 77, writeback: true, serial: 'x', ...unit }, 9)
    bench.state.units[0]!.attentions = 0
    bench.send(cdb.read10(0, 1), undefined, 512)
    expect(bench.context.io.open).toEqual([77])
    bench.end()
    bench.handler.close!()
    expect(bench.context.io.open).toEqual([])
    expect(bench.context.reports.map(({ kind }) => kind)).toEqual(['alive', 'settled', 'settled', 'gone'])
  })

  test('close gives back what abandoned requests have', () => {
    const file = { memoryAlign: 512, lengthAlign: 512 }
    const bench = new Bench(file)
    for (let i = 0; i < 18; i++) bench.send(cdb.read10(0, 1), undefined, 512, { misalign: 4 })
    bench.handler.close!()
    const other = new Bench(file)
    for (let i = 0; i < 16; i++) other.send(cdb.read10(0, 1), undefined, 512, { misalign: 4 })
    expect(other.operations).toHaveLength(16)
  })
})
