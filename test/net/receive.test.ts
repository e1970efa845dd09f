import { describe, expect, test } from 'vitest'
import type { Segment } from '../../src/frontend/driver.ts'
import { UNTOUCHED } from '../../src/frontend/net.ts'
import * as net from '../../src/virtio/net.ts'
import { eventually } from '../vhost-user/backend.ts'
import { frame, type Guest, guestsOn, KINDS, type NetBackend, netBackend, passes, plain } from './support.ts'

const NOT_MERGEABLE = { without: [net.VIRTIO_NET_F_MRG_RXBUF] }
const MIB = 2 ** 20

for (const kind of KINDS) {
  describe(kind, () => {
    const current = netBackend({ kind })
    slow(current)
    badBuffers(current)
  })
}

/** Buffers of `lengths` bytes as one chain each, from fresh memory. */
function buffers(guest: Guest, lengths: readonly number[]): Segment[] {
  return lengths.map((length) => {
    const { gpa } = guest.session.memory.allocate(Math.max(length, 1), 64)
    return { address: gpa, length, writable: true }
  })
}

function slow(current: () => NetBackend): void {
  test('without buffers packets wait, and come in order', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0, queueSize: 1024 })
    const [a, b] = guests
    const sent = Array.from({ length: 300 }, (_, i) => frame({ from: 1, size: 60 + (i % 20) * 150 }))
    const starved = current().metrics().get('net_rx_starved_total{device="net1",queue="0"}') ?? 0
    for (const bytes of sent) a.send(bytes)
    expect(b.net.tryReceive()).toBeUndefined()
    for (const segment of buffers(b, new Array<number>(600).fill(2000))) b.net.post([segment])
    for (const bytes of sent) plain(b.gets(bytes))
    expect((current().metrics().get('net_rx_starved_total{device="net1",queue="0"}') ?? 0) - starved).toBeGreaterThan(0)
  })

  test('buffers one at a time', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0, mode: 'irq' })
    const [a, b] = guests
    const sent = Array.from({ length: 40 }, (_, i) => frame({ from: 1, size: i % 4 === 0 ? 3000 : 100 }))
    for (const bytes of sent) a.send(bytes)
    for (const bytes of sent) {
      for (const segment of buffers(b, bytes.length > 2000 ? [2000, 2000] : [2000])) b.net.post([segment])
      b.gets(bytes)
    }
  })

  test('small ones behind a large one that waits for more buffers stay behind it', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0 })
    const [a, b] = guests
    const large = frame({ from: 1, size: 9014 })
    const small = frame({ from: 1, size: 60 })
    for (const segment of buffers(b, [2000, 2000])) b.net.post([segment])
    a.send(large)
    a.send(small)
    expect(b.net.tryReceive()).toBeUndefined()
    for (const segment of buffers(b, [2000, 2000, 2000])) b.net.post([segment])
    expect(b.gets(large).buffers).toBe(5)
    for (const segment of buffers(b, [100])) b.net.post([segment])
    b.gets(small)
  })

  test.each([
    ['packets', 60, 2000],
    ['bytes', 65549, 60],
  ])('beyond the bound of %s they are dropped and counted, and the others go on', (_, size, count) => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0, queueSize: 1024 }, {})
    const [a, b, c] = guests
    // The sleeper is known by what it sent.
    for (const guest of guests) {
      const bytes = frame({ from: guest.number, size: 60 })
      guest.send(bytes)
      for (const other of [a, c]) if (other !== guest) other.gets(bytes)
    }
    for (let i = 0; i < 2; i++) b.net.post(buffers(b, [2000]))
    for (let i = 0; i < 2; i++) b.net.receive()
    const portDrops = current().ofSwitch('port_drops_total', 'port="net1"')
    const sent: Uint8Array[] = []
    const drops = current().dropsDuring(1, 0, () => {
      for (let i = 0; i < count; i++) {
        const bytes = frame({ from: 1, to: 2, size })
        a.send(bytes)
        sent.push(bytes)
        if (i % 10 === 0) {
          passes(a, c)
          passes(c, a)
        }
      }
    })
    const waiting = count - (drops['no_buffers'] ?? 0)
    expect(drops).toEqual({ no_buffers: count - waiting })
    expect(waiting).toBeGreaterThan(10)
    expect(waiting).toBeLessThan(count - 10)
    expect(waiting * size).toBeLessThan(2 * MIB)
    expect(current().ofSwitch('port_drops_total', 'port="net1"') - portDrops).toBe(count - waiting)
    // The oldest have waited, and nothing comes behind them.
    const each = Math.ceil((size + 12) / 65562)
    for (let i = 0; i < waiting; i++) {
      const mark = b.session.memory.mark()
      for (const segment of buffers(b, new Array<number>(each).fill(65562))) b.net.post([segment])
      b.gets(sent[i]!)
      b.session.memory.reset(mark)
    }
    for (const segment of buffers(b, [2000])) b.net.post([segment])
    passes(c, b)
  })
}

/** Posts a chain as it is, which the driver would not. */
function post(guest: Guest, segments: readonly Segment[]): number {
  const { driver } = guest.net.rx()
  for (const { address, length } of segments)
    guest.session.memory.write(address, new Uint8Array(length).fill(UNTOUCHED))
  const chain = driver.build(segments)
  driver.issue(chain)
  driver.publish()
  return chain
}

/** Waits for used chains: head and length of each. */
function used(guest: Guest, count: number): [number, number][] {
  const queue = guest.net.rx()
  return Array.from({ length: count }, () => {
    if (!queue.wait(5000)) throw new Error('no chain came back')
    const chain = queue.driver.pop()
    const { written } = queue.driver
    queue.driver.release(chain)
    return [chain, written] as [number, number]
  })
}

function badBuffers(current: () => NetBackend): void {
  test.each([
    ['of no bytes', [[0, true]]],
    [
      'of no bytes in three pieces',
      [
        [0, true],
        [0, true],
        [0, true],
      ],
    ],
    ['of one byte', [[1, true]]],
    ['of a header less one', [[11, true]]],
    ['of a header and no more', [[12, true]]],
    ['that is not writable', [[2000, false]]],
    [
      'of which only the header is writable',
      [
        [2000, false],
        [12, true],
      ],
    ],
  ] as [string, [number, boolean][]][])('a buffer %s comes back empty, and the next one is used', (_, shape) => {
    for (const options of [{}, NOT_MERGEABLE]) {
      using guests = guestsOn(current(), {}, { ...options, rxBuffers: 0 })
      const [a, b] = guests
      const bytes = frame({ from: 1, size: 100 })
      const drops = current().dropsDuring(1, 0, () => {
        const bad = post(
          b,
          buffers(
            b,
            shape.map(([length]) => length)
          ).map((s, i) => ({ ...s, writable: shape[i]![1] }))
        )
        const good = post(b, buffers(b, [2000]))
        a.send(bytes)
        expect(used(b, 2)).toEqual([
          [bad, 0],
          [good, 112],
        ])
      })
      expect(drops).toEqual({ bad_buffer: 1 })
    }
  })

  test('a ring full of bad buffers', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0, queueSize: 256 }, {})
    const [a, b, c] = guests
    const heads: number[] = []
    for (let i = 0; i < 256; i++) heads.push(post(b, buffers(b, [4])))
    const bytes = frame({ from: 1, size: 100 })
    a.send(bytes)
    c.gets(bytes)
    expect(used(b, 256)).toEqual(heads.map((head) => [head, 0]))
    const good = post(b, buffers(b, [2000]))
    expect(used(b, 1)).toEqual([[good, 112]])
  })

  test('a bad buffer between good ones of one packet', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0 })
    const [a, b] = guests
    const small = post(b, buffers(b, [500]))
    const bad = post(
      b,
      buffers(b, [500]).map((segment) => ({ ...segment, writable: false }))
    )
    const large = post(b, buffers(b, [2000]))
    a.send(frame({ from: 1, size: 1000 }))
    expect(used(b, 3)).toEqual([
      [small, 0],
      [bad, 0],
      [large, 1012],
    ])
  })

  test('a packet that is too large for its buffer is dropped, and the buffer stays', () => {
    using guests = guestsOn(current(), {}, { ...NOT_MERGEABLE, rxBuffers: 0 })
    const [a, b] = guests
    const drops = current().dropsDuring(1, 0, () => {
      const chain = post(b, buffers(b, [100]))
      a.send(frame({ from: 1, size: 89 }))
      a.send(frame({ from: 1, size: 1514 }))
      a.send(frame({ from: 1, size: 88 }))
      expect(used(b, 1)).toEqual([[chain, 100]])
    })
    expect(drops).toEqual({ too_big: 2 })
  })

  test('a packet that is larger than the whole ring is dropped', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 8, queueSize: 8, rxBufferSize: 500 })
    const [a, b] = guests
    const drops = current().dropsDuring(1, 0, () => {
      a.send(frame({ from: 1, size: 4000 }))
      for (let i = 0; i < 3; i++) passes(a, b, 3988)
    })
    expect(drops).toEqual({ too_big: 1 })
  })

  test('buffers that lie over one another', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0 }, {})
    const [a, b, c] = guests
    const { gpa } = b.session.memory.allocate(8192, 64)
    const heads = Array.from({ length: 64 }, (_, i) =>
      post(b, [{ address: gpa + i * 16, length: 200, writable: true }])
    )
    const bytes = frame({ from: 1, size: 3000 })
    a.send(bytes)
    c.gets(bytes)
    // 3012 bytes in buffers of 200.
    expect(used(b, 16).map(([head]) => head)).toEqual(heads.slice(0, 16))
  })

  test('a buffer in a thousand pieces', () => {
    for (const options of [{}, NOT_MERGEABLE]) {
      using guests = guestsOn(current(), { queueSize: 1024 }, { ...options, rxBuffers: 0, queueSize: 1024 })
      const [a, b] = guests
      const { gpa } = b.session.memory.allocate(8192, 64)
      const piece = (i: number): Segment => ({ address: gpa + i * 5, length: 2, writable: true })
      for (let round = 0; round < 3; round++) {
        b.net.post(Array.from({ length: 1000 }, (_, i) => piece(i)))
        const bytes = frame({ from: 1, size: 1514 })
        // From as many, none of which begins where one of those does.
        a.send(bytes, { cuts: [...new Array<number>(500).fill(3), 1526 - 1500] })
        expect(b.gets(bytes).buffers).toBe(1)
      }
    }
  })

  test('a buffer that is the receive ring itself', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0 }, {})
    const [a, b, c] = guests
    const [descriptors] = b.net.rx().ring
    const { driver } = b.net.rx()
    driver.issue(driver.build([{ address: descriptors.gpa, length: 2000, writable: true }]))
    driver.publish()
    for (let i = 0; i < 20; i++) passes(a, c)
    for (let i = 0; i < 20; i++) {
      const bytes = frame({ from: 1, size: 1500 })
      a.send(bytes)
      c.gets(bytes)
    }
  })

  test.each(['a head out of range', 'an index that ran away', 'an address that is nowhere'])(
    'a receive ring with %s breaks alone',
    (how) => {
      using guests = guestsOn(current(), {}, { rxBuffers: 0 }, {})
      const [a, b, c] = guests
      const { split: driver } = b.net.rx()
      if (how === 'a head out of range') driver.issueRaw(999)
      else if (how === 'an address that is nowhere')
        driver.issue(driver.build([{ address: 2 ** 40, length: 2000, writable: true }]))
      if (how === 'an index that ran away') driver.publishRaw(driver.availableIndex + 1000)
      else driver.publish()
      for (let i = 0; i < 3; i++) {
        const bytes = frame({ from: 1, size: 100 })
        a.send(bytes)
        c.gets(bytes)
      }
      expect(eventually(() => b.net.rx().broken())).toBe(true)
      // Its other ring goes on.
      const bytes = frame({ from: 2, size: 100 })
      b.send(bytes)
      a.gets(bytes)
      c.gets(bytes)
    }
  )
}
