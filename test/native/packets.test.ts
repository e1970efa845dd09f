import { ftruncateSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { native } from '../../src/native.ts'
import { answerInNamespace, Vectors, whyNoNamespace } from './network.ts'
import { allocated, EAGAIN, EBADF, EINVAL, fdOf, mapped } from './support.ts'

const EIO = 5
const EFAULT = 14
const EBADFD = 77

const PAGE = 4096
const outside = whyNoNamespace()

/** Runs a list of destination, source, bytes. @param count what the list says of itself */
function copy(pieces: readonly number[], count = pieces.length / 3): void {
  const copier = native.createCopier(16)
  if (typeof copier === 'number') throw new Error(`createCopier: ${copier}`)
  new Float64Array(copier.pieces).set([count, ...pieces])
  copier.run()
}

describe('copy', () => {
  const memory = allocated(3 * PAGE)
  const bytes = new Uint8Array(memory.buffer)

  it('copies every piece and nothing beside', () => {
    bytes.forEach((_, i) => {
      bytes[i] = i * 13 + (i >> 8)
    })
    const before = bytes.slice()
    const wanted = bytes.slice()
    const pieces: number[] = []
    // Odd places and lengths, one byte, none, and one that goes over a page's end.
    for (const [to, from, length] of [
      [0, 8001, 1],
      [3, 7003, 997],
      [1001, 6000, 0],
      [4000, 9000, 300],
    ] as const) {
      pieces.push(memory.address + to, memory.address + from, length)
      wanted.set(before.subarray(from, from + length), to)
    }
    // An empty piece may name anything; what lies behind `count` isn't looked at.
    pieces.push(0, 0, 0, 8, 8, 8)
    copy(pieces, 5)
    expect(Buffer.compare(bytes, wanted)).toBe(0)
  })

  it('of no pieces does nothing', () => {
    const before = bytes.slice()
    copy([])
    copy([memory.address, memory.address + 100, 50], 0)
    copy([memory.address, memory.address + 100, 50], -1)
    expect(Buffer.compare(bytes, before)).toBe(0)
  })

  it('forgets the pieces that it ran, and takes no more than it has room for', () => {
    const copier = native.createCopier(1)
    if (typeof copier === 'number') throw new Error(`createCopier: ${copier}`)
    const list = new Float64Array(copier.pieces)
    expect(list).toHaveLength(4)
    bytes.fill(0)
    bytes[5] = 77
    list.set([1000, memory.address + 2 * PAGE, memory.address + 5, 1])
    copier.run()
    expect([bytes[2 * PAGE], list[0]]).toEqual([77, 0])
    bytes[2 * PAGE] = 0
    copier.run()
    expect(bytes[2 * PAGE]).toBe(0)
  })

  it.each([0, -1, 1.5, 2 ** 20 + 1, 'x'])('refuses a capacity of %s', (capacity) => {
    expect(() => native.createCopier(capacity as number)).toThrow(TypeError)
  })

  it('goes on behind memory that was truncated, on either side', () => {
    for (const missing of ['source', 'destination']) {
      const fd = fdOf(native.memfd('truncated', 2 * PAGE, 0), 'memfd')
      const gone = mapped(fd, 0, 2 * PAGE)
      const there = allocated(4 * PAGE)
      const view = new Uint8Array(there.buffer).fill(9)
      new Uint8Array(gone.buffer).fill(7)
      ftruncateSync(fd, PAGE)
      const far = gone.address + PAGE + 8
      const pieces =
        missing === 'source'
          ? [there.address, far, 100, there.address + 200]
          : [far, there.address, 100, there.address + 200]
      copy([...pieces, there.address + 2 * PAGE, 50])
      expect(native.faults(gone.address)).toBe(1)
      expect(view.subarray(0, 100).every((byte) => byte === (missing === 'source' ? 0 : 9))).toBe(true)
      expect(view.subarray(200, 250).every((byte) => byte === 9)).toBe(true)
      expect(native.eventfdRead(native.faultEventFd())).toBe(1)
      native.close(fd)
    }
  })
})

describe('sendPackets and receivePackets', () => {
  const loose = native as unknown as Record<string, (...args: unknown[]) => unknown>
  const words = new Int32Array(4)

  it('refuse wrong arguments', () => {
    for (const args of [
      [0, 0, words],
      [0, 0, words, 5],
      [0, 0, words, -1],
      [0, -1, words, 1],
      [0, 0, new Float64Array(4), 1],
      ['0', 0, words, 1],
    ]) {
      expect(() => loose['sendPackets']?.(...args)).toThrow(TypeError)
    }
    for (const args of [
      [0, 0, words, 5, 1, true, words, 1],
      [0, 0, words, 1, 0, true, words, 1],
      [0, 0, words, 1, 1, 1, words, 1],
      [0, 0, words, 1, 1, true, words, 4],
      [0, 0, words, 1, 1, true, new Int32Array(0), 0],
      [0, 0, words, 1, 1, true, words],
      [0, -8, words, 1, 1, true, words, 1],
    ]) {
      expect(() => loose['receivePackets']?.(...args)).toThrow(TypeError)
    }
  })

  it('tell of an fd that is none', () => {
    const vectors = new Vectors()
    vectors.add(100)
    vectors.add(100)
    const results = Int32Array.of(1, 1)
    expect(native.sendPackets(99_999, vectors.address, results, 2)).toBe(0)
    expect([...results]).toEqual([-EBADF, -EBADF])
    expect(native.receivePackets(99_999, vectors.address, Int32Array.of(1, 1), 2, 100, false, results, 1)).toBe(0)
    expect(results[0]).toBe(-EBADF)
  })

  it('touch no fd when there is nothing to do', () => {
    const results = Int32Array.of(5, 6)
    expect(native.sendPackets(-1, 0, results, 0)).toBe(0)
    expect([...results]).toEqual([5, 6])
    expect(native.receivePackets(-1, 0, new Int32Array(0), 0, 1, true, results, 1)).toBe(0)
    expect([...results]).toEqual([0, 6])
    expect(native.receivePackets(-1, 0, Int32Array.of(1), 1, 1, true, Int32Array.of(5), 0)).toBe(0)
  })
})

/** A tap that is up, a packet socket on it, and both calls in a shape that prints. */
const SETUP = `
  const { frame, hex, Vectors } = network
  const tap = native.tapOpen('t0', false)
  native.tapSetHeaderSize(tap, 12)
  native.linkSetUp('t0', true)
  const wire = native.packetSocket('t0', true)
  const vectors = new Vectors()
  const send = (fd, counts) => {
    const packets = Int32Array.from(counts)
    return [native.sendPackets(fd, vectors.address, packets, packets.length), ...packets]
  }
  /** Puts frames of these lengths in at the wire's side; they lie in the tap's queue when it returns. */
  const inject = (...lengths) => {
    vectors.clear()
    const counts = lengths.map((length, i) => vectors.addPacket(frame(10, length, i)))
    const [sent] = send(wire, counts)
    if (sent !== lengths.length) throw new Error('injected ' + sent)
    vectors.clear()
  }
  const receive = (fd, chains, maxPacket, mergeable, maxPackets) => {
    const results = new Int32Array(maxPackets + 1).fill(-9999)
    const packets = native.receivePackets(fd, vectors.address, Int32Array.from(chains), chains.length, maxPacket, mergeable, results, maxPackets)
    return [packets, ...results.subarray(0, packets + 1)]
  }
  /** Chains of these vectors; what they hold comes back as one list per chain. */
  const chains = (...shapes) => shapes.map((shape) => shape.map((length) => vectors.add(length)))
  const counts = (made) => made.map((chain) => chain.length)
  /** Whether these chains hold the frame that was injected as number \`seed\`. */
  const holds = (made, length, seed) => hex(made.flat(), 12 + length) === hex(frame(12, length, seed))
  /** Reads frames from the wire one by one; the seeds of those that are as they were sent. */
  const arrived = (...lengths) => lengths.map((length, seed) => {
    vectors.clear()
    const [piece] = chains([2048])
    if (native.pollIn(wire, 5000) !== 1) return 'nothing'
    const [, bytes] = receive(wire, [1], 2048, false, 1)
    return bytes === 10 + length && hex(piece, bytes) === hex(frame(10, length, seed)) ? seed : bytes
  })
  const nothing = () => (vectors.clear(), chains([2048]), receive(wire, [1], 2048, false, 1))
`

describe.skipIf(outside !== undefined)('sendPackets on a tap', () => {
  const run = (source: string) => answerInNamespace(SETUP + source)

  it('sends one, many and none, in one piece or several', () => {
    const answer = run(`
      const none = send(tap, [])
      vectors.addPacket(frame(12, 60, 0))
      const one = [send(tap, [1]), arrived(60)]
      vectors.clear()
      const lengths = Array.from({ length: 64 }, (_, i) => 14 + i * 23)
      const shapes = [[], [12], [1, 11, 14], [25]]
      const many = send(tap, lengths.map((length, i) => vectors.addPacket(frame(12, length, i), ...shapes[i % 4])))
      console.log(JSON.stringify({ none, one, many, arrived: arrived(...lengths), after: nothing() }))
    `)
    const lengths = Array.from({ length: 64 }, (_, i) => 14 + i * 23)
    expect(answer).toEqual({
      none: [0],
      one: [[1, 72], [0]],
      many: [64, ...lengths.map((length) => 12 + length)],
      arrived: lengths.map((_, i) => i),
      after: [0, -EAGAIN],
    })
  })

  it('sends what it can and says of the others why not', () => {
    const answer = run(`
      import { ftruncateSync } from 'node:fs'
      const memfd = native.memfd('gone', 4096, 0)
      const gone = support.mapped(memfd, 0, 4096)
      ftruncateSync(memfd, 0)
      const shape = [vectors.addPacket(frame(12, 60, 0))]
      shape.push(vectors.addPacket(new Uint8Array(4)), 0, vectors.addPacket(frame(12, 60, 1)))
      for (let i = 0; i < 1025; i++) vectors.add(1)
      shape.push(1025)
      vectors.addForeign(gone.address, 100)
      vectors.add(0)
      shape.push(1, 1, -1, vectors.addPacket(frame(12, 1000, 2), ...Array(1011).fill(1)))
      const results = send(tap, shape)
      console.log(JSON.stringify({ results, vectors: shape.at(-1), arrived: arrived(60, 60, 1000), after: nothing(), faults: native.faults(gone.address) }))
    `)
    expect(answer).toEqual({
      // Shorter than the header, no vectors, good, too many vectors, memory that is gone, empty, nonsense, 1012 vectors.
      results: [3, 72, -EINVAL, -EINVAL, 72, -EINVAL, -EFAULT, 0, -EINVAL, 1012],
      vectors: 1012,
      arrived: [0, 1, 2],
      after: [0, -EAGAIN],
      faults: 0,
    })
  })

  it('is -EIO while the tap is down', () => {
    const answer = run(`
      native.linkSetUp('t0', false)
      const shape = [vectors.addPacket(frame(12, 60, 0)), vectors.addPacket(frame(12, 60, 0), 12)]
      const down = send(tap, shape)
      native.linkSetUp('t0', true)
      console.log(JSON.stringify([down, send(tap, shape)]))
    `)
    expect(answer).toEqual([
      [0, -EIO, -EIO],
      [2, 72, 72],
    ])
  })
})

describe.skipIf(outside !== undefined)('receivePackets from a tap', () => {
  const run = (source: string) => answerInNamespace(SETUP + source)

  it('gives each packet a chain, without mergeable', () => {
    const answer = run(`
      inject(60, 1500, 14)
      const made = chains([12, 1600], [12, 700, 900], [1612], [1612])
      const results = receive(tap, counts(made), 1612, false, 8)
      console.log(JSON.stringify([results, holds(made[0], 60, 0), holds(made[1], 1500, 1), holds(made[2], 14, 2), hex(made[3], 1612) === '00'.repeat(1612)]))
    `)
    expect(answer).toEqual([[3, 72, 1512, 26, -EAGAIN], true, true, true, true])
  })

  it('gives each packet as many chains as it needs, with mergeable', () => {
    // With the header 72 bytes, 512 bytes (a whole chain), 513 bytes (one more), 1512 and 26.
    const answer = run(`
      const lengths = [60, 500, 501, 1500, 14]
      inject(...lengths)
      const made = chains([512], [12, 500], [512], [512], [512], [100, 412], [512], [512], [512], [512], [512])
      const results = receive(tap, counts(made), 1526, true, 8)
      const used = [[0, 1], [1, 2], [2, 4], [4, 7], [7, 8]].map(([from, to], i) => holds(made.slice(from, to), lengths[i], i))
      console.log(JSON.stringify([results, used, hex(made.slice(8).flat()) === '00'.repeat(3 * 512)]))
    `)
    expect(answer).toEqual([[5, 72, 512, 513, 1512, 26, -EAGAIN], new Array(5).fill(true), true])
  })

  it('takes 64 KiB in one packet over many chains', () => {
    const answer = run(`
      native.linkSetMtu('t0', 65521)
      inject(65535, 60)
      const made = chains(...Array.from({ length: 100 }, () => [1526]))
      const results = receive(tap, counts(made), 65562, true, 8)
      console.log(JSON.stringify([results, holds(made.slice(0, 43), 65535, 0), holds(made.slice(43), 60, 1)]))
    `)
    expect(answer).toEqual([[2, 65547, 72, -EAGAIN], true, true])
  })

  it('stops when the next packet may not fit, and leaves it where it is', () => {
    const answer = run(`
      inject(60, 61, 62)
      const results = []
      let made = chains([1611])
      results.push(receive(tap, counts(made), 1612, false, 8), receive(tap, counts(made), 1612, true, 8))
      vectors.clear()
      // The second chain is too small for any packet; merged with the third it is not.
      made = chains([1612], [600], [1612])
      results.push(receive(tap, counts(made), 1612, false, 8), holds(made[0], 60, 0))
      vectors.clear()
      made = chains([600], [600], [600], [600])
      results.push(receive(tap, counts(made), 1612, true, 8), holds(made[0], 61, 1), holds(made[1], 62, 2))
      console.log(JSON.stringify(results))
    `)
    // Of four chains of 600 bytes three are one window; after one packet the last three are, after two it is too small.
    expect(answer).toEqual([[0, 0], [0, 0], [1, 72, 0], true, [2, 73, 74, 0], true, true])
  })

  it('stops at the number of packets asked for, and when chains are used up', () => {
    const answer = run(`
      inject(60, 61, 62, 63)
      const made = chains(...Array.from({ length: 8 }, () => [128]))
      const results = [receive(tap, counts(made), 128, false, 2), receive(tap, counts(made).slice(0, 1), 128, true, 8), receive(tap, counts(made), 128, true, 0)]
      results.push(receive(tap, counts(made), 128, true, 8), receive(tap, counts(made), 128, true, 8))
      console.log(JSON.stringify(results))
    `)
    expect(answer).toEqual([
      [2, 72, 73, 0],
      [1, 74, 0],
      [0, 0],
      [1, 75, -EAGAIN],
      [0, -EAGAIN],
    ])
  })

  it('takes 1024 vectors and no more', () => {
    const answer = run(`
      inject(1500, 1500, 1500)
      const results = []
      let made = chains(Array(1025).fill(2))
      results.push(receive(tap, counts(made), 1612, false, 8), receive(tap, counts(made), 1612, true, 8))
      vectors.clear()
      made = chains(...Array(1024).fill([2]), [1612])
      results.push(receive(tap, counts(made), 2049, true, 8))
      vectors.clear()
      made = chains(Array(1024).fill(2), Array(1024).fill(2))
      results.push(receive(tap, counts(made), 1612, false, 8), holds(made[0], 1500, 0), holds(made[1], 1500, 1))
      vectors.clear()
      made = chains(...Array(1024).fill([2]))
      results.push(receive(tap, counts(made), 2048, true, 8), holds(made, 1500, 2))
      console.log(JSON.stringify(results))
    `)
    expect(answer).toEqual([[0, 0], [0, 0], [0, 0], [2, 1512, 1512, 0], true, true, [1, 1512, 0], true])
  })

  it('cuts a packet off that is longer than its window', () => {
    const answer = run(`
      inject(1500, 60)
      const made = chains([100], [100])
      const results = receive(tap, counts(made), 100, false, 8)
      console.log(JSON.stringify([results, holds([made[0]], 88, 0), holds(made[1], 60, 1)]))
    `)
    expect(answer).toEqual([[2, 100, 72, 0], true, true])
  })

  it('says why the kernel has nothing', () => {
    const answer = run(`
      import { ftruncateSync, openSync } from 'node:fs'
      const made = chains([2048])
      const idle = receive(tap, counts(made), 2048, true, 1)
      const unattached = receive(openSync('/dev/net/tun', 'r+'), counts(made), 2048, true, 1)
      const memfd = native.memfd('gone', 4096, 0)
      const gone = support.mapped(memfd, 0, 4096)
      ftruncateSync(memfd, 0)
      inject(60, 61)
      vectors.addForeign(gone.address, 2048)
      const missing = receive(tap, [1], 2048, true, 4)
      vectors.clear()
      const rest = [receive(tap, counts([chains([2048])]), 2048, true, 1), native.faults(gone.address)]
      const second = native.tapOpen('m0', true)
      const queue = native.tapOpen('m0', true)
      ip('link del m0')
      console.log(JSON.stringify({ idle, unattached, missing, rest, deleted: receive(queue, counts(made), 2048, true, 1) }))
    `)
    expect(answer).toEqual({
      idle: [0, -EAGAIN],
      unattached: [0, -EBADFD],
      // The kernel has thrown that packet away.
      missing: [0, -EFAULT],
      rest: [[1, 73, 0], 0],
      deleted: [0, -EBADFD],
    })
  })
})
