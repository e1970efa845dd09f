/**
 * Guests that send what nobody should: each packet is dropped and counted by its reason, reaches nobody, its chain comes
 * back with length 0, and the next good packet goes through.
 */
import { describe, expect, test } from 'vitest'
import { withDependents } from '../../src/frontend/net-features.ts'
import { encodeNetHeader } from '../../src/frontend/net-frames.ts'
import * as net from '../../src/virtio/net.ts'
import { BAD, longHeaders, set, TSO, TSO6 } from './bad-packets.ts'
import { build, UFO6, USO6 } from './frames.ts'
import {
  frame,
  guestsOn,
  introduce,
  KINDS,
  mac,
  type NetBackend,
  netBackend,
  passes,
  passesAtLast,
  plain,
} from './support.ts'

for (const kind of KINDS) {
  describe(kind, () => {
    const current = netBackend({ kind })
    // The decision is the same on all of them.
    if (kind === 'io_uring') single(current)
    many(current)
    odd(current)
    race(current)
  })
}

function single(current: () => NetBackend): void {
  test.each(Object.entries(BAD))('%s', (_, { why, bytes, header, without = [] }) => {
    // What reaches one that takes offloads differs from what reaches one that doesn't.
    const bare = { without: withDependents(net.VIRTIO_NET_F_GUEST_CSUM) }
    using guests = guestsOn(current(), { without }, {}, bare)
    const [a, b, c] = guests
    introduce(guests)
    for (const to of [2, undefined]) {
      const spoiled = bytes.slice()
      if (to === undefined) spoiled.set(new Uint8Array(6).fill(0xff).subarray(0, spoiled.length))
      const drops = current().dropsDuring(0, 1, () => {
        for (const indirect of [false, true]) a.send(spoiled, { header: header!, indirect })
      })
      expect(drops).toEqual({ [why]: 2 })
      plain(passes(a, b))
      plain(passes(a, c))
    }
  })
}

function many(current: () => NetBackend): void {
  test('a thousand broken packets of all kinds at once', () => {
    using guests = guestsOn(current(), { arenaBytes: 4 * 2 ** 20, queueSize: 1024 }, {}, {})
    const [a, b, c] = guests
    introduce(guests)
    const rows = Object.values(BAD).filter(({ without, bytes }) => without === undefined && bytes.length < 10_000)
    const drops = current().dropsDuring(0, 1, () => {
      for (let i = 0; i < 1000; i++) {
        const { bytes, header } = rows[i % rows.length]!
        a.net.send(bytes, { header: header!, publish: false, ...(i % 3 === 0 && { indirect: true }) })
        if (i % 250 !== 249) continue
        a.net.publish()
        a.net.sent()
      }
    })
    expect(Object.values(drops).reduce((sum, count) => sum + count, 0)).toBe(1000)
    passes(a, b)
    passes(a, c)
  })

  test('random changes of headers and frames', () => {
    // Without buffers to wait for: what is delivered is looked at below, rule by rule.
    const bare = { without: withDependents(net.VIRTIO_NET_F_GUEST_CSUM), rxBuffers: 256 }
    using guests = guestsOn(current(), {}, { rxBuffers: 256 }, bare)
    const [a, b, c] = guests
    introduce(guests)
    let state = 12345
    const random = (below: number): number => {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0
      return Math.floor((state / 2 ** 32) * below)
    }
    const base = [TSO, TSO6, { ...UFO6, gsoSize: 1480, payload: 3000 }, { ...USO6, gsoSize: 800, payload: 3000 }].map(
      build
    )
    const sent = current().counter('packets_total', 0, 1)
    const drops = current().dropsDuring(0, 1, () => {
      for (let i = 0; i < 600; i++) {
        const { bytes, header, headerLength } = base[random(base.length)]!
        const frameBytes = bytes.slice(0, random(4) === 0 ? 14 + random(bytes.length - 14) : bytes.length)
        const headerBytes = header.slice()
        // The addresses stay: where it goes is not the question.
        for (let n = random(3); n > 0; n--) headerBytes[random(12)] = random(256)
        for (let n = random(3); n > 0; n--)
          frameBytes[12 + random(Math.min(headerLength, frameBytes.length) - 12)] = random(256)
        if (random(2) === 0) frameBytes[5] = 3
        a.send(frameBytes, { header: headerBytes })
        for (const guest of [b, c]) while (guest.net.tryReceive() !== undefined);
      }
    })
    const dropped = Object.values(drops).reduce((sum, count) => sum + count, 0)
    expect(dropped).toBeGreaterThan(50)
    expect(current().counter('packets_total', 0, 1) - sent + dropped).toBe(600)
    passesAtLast(a, b)
    passesAtLast(a, c)
  })

  // The most fragments, each with the longest headers: gso_size 15 is cut to 8 after the number of segments was limited.
  test.each([8, 15])('fragments of %i bytes behind headers of 248', (gsoSize) => {
    const bare = { without: withDependents(net.VIRTIO_NET_F_GUEST_CSUM) }
    using guests = guestsOn(current(), {}, bare, {})
    const [a, b, c] = guests
    introduce(guests)
    const built = longHeaders(gsoSize * 2048 - 256, gsoSize)
    a.send(built.bytes, { header: built.header })
    expect(current().failures).toEqual([])
    while (b.net.tryReceive() !== undefined);
    passesAtLast(c, b)
    passes(b, a)
  })
}

function odd(current: () => NetBackend): void {
  test('flags that a driver has no business with are not passed on', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    for (const flags of [2, 4, 8, 0xfe]) {
      plain(passes(a, b, 100, { header: { flags, hdrLen: 99, gsoSize: 77, csumStart: 0xffff, csumOffset: 0xffff } }))
    }
  })

  test('num_buffers, hdr_len and gso_size of a packet without GSO do not matter', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    const packet = passes(a, b, 100, { header: { numBuffers: 0xffff, hdrLen: 0xffff, gsoSize: 0xffff } })
    plain(packet)
    expect(packet.header.numBuffers).toBe(1)
  })

  test('a checksum field in the last two bytes', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    const { header } = passes(a, b, 100, {
      header: { flags: net.VIRTIO_NET_HDR_F_NEEDS_CSUM, csumStart: 34, csumOffset: 64 },
    })
    expect(header).toMatchObject({ flags: net.VIRTIO_NET_HDR_F_NEEDS_CSUM, csumStart: 34, csumOffset: 64 })
  })

  test('hdr_len of a packet with GSO is made right', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    const built = build(TSO)
    for (const hdrLen of [0, 14, 0xffff]) {
      set(net.VIRTIO_NET_HDR_HDR_LEN, hdrLen)(built)
      a.send(built.bytes, { header: built.header })
      expect(b.gets(built.bytes).header.hdrLen).toBe(built.headerLength)
    }
  })

  test('descriptors that the device may write to, in a packet on its way out', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    const { memory } = a.session
    const bytes = frame({ from: 1, to: 2, size: 100 })
    const { gpa } = memory.allocate(4096, 64)
    memory.write(gpa, encodeNetHeader())
    memory.write(gpa + 12, bytes)
    memory.write(gpa + 1000, new Uint8Array(100).fill(0x5a))
    const readable = { address: gpa, length: 112, writable: false }
    const writable = { address: gpa + 1000, length: 100, writable: true }
    a.net.sent(a.net.sendRaw([readable, writable]))
    b.gets(bytes)
    const drops = current().dropsDuring(0, 1, () => a.net.sent(a.net.sendRaw([writable])))
    expect(drops).toEqual({ runt: 1 })
    expect(memory.read(gpa + 1000, 100).every((byte) => byte === 0x5a)).toBe(true)
    passes(a, b)
  })

  test('descriptors of no bytes', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    const { gpa } = a.session.memory.allocate(64, 64)
    const none = { address: gpa, length: 0, writable: false }
    const drops = current().dropsDuring(0, 1, () => {
      a.net.sent(a.net.sendRaw([none]))
      a.net.sent(a.net.sendRaw([none, none, none]))
    })
    expect(drops).toEqual({ runt: 2 })
    passes(a, b)
  })

  test('a frame that lies beside its own addresses in memory', () => {
    // The same bytes twice in one packet: what is copied has to be what was there.
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    const { memory } = a.session
    const { gpa } = memory.allocate(256, 64)
    const bytes = frame({ from: 1, to: 2, size: 64 })
    memory.write(gpa, encodeNetHeader())
    memory.write(gpa + 12, bytes)
    const whole = { address: gpa + 12, length: 64, writable: false }
    const packet = new Uint8Array(64 * 50)
    for (let i = 0; i < 50; i++) packet.set(bytes, 64 * i)
    a.net.sent(a.net.sendRaw([{ address: gpa, length: 12, writable: false }, ...new Array(50).fill(whole)]))
    b.gets(packet)
  })

  test('made up source addresses leave the others their places', () => {
    using guests = guestsOn(current(), { queueSize: 1024 }, {}, {})
    const [a, b, c] = guests
    introduce(guests)
    for (let i = 0; i < 6000; i++) {
      // To itself, so nobody has to take it.
      a.net.send(frame({ from: 0x10000 + i, to: 1, size: 60 }), { publish: false })
      if (i % 250 !== 249) continue
      a.net.publish()
      a.net.sent()
    }
    expect(current().ofSwitch('table_entries')).toBeLessThanOrEqual(1024 + 2)
    const floods = current().ofSwitch('floods_total')
    for (let i = 0; i < 10; i++) {
      passes(b, c)
      passes(c, b)
    }
    expect(current().ofSwitch('floods_total')).toBe(floods)
  })

  test('nobody learns a group address or none', () => {
    using guests = guestsOn(current(), {}, {}, {})
    const [a, b, c] = guests
    introduce(guests)
    const entries = current().ofSwitch('table_entries')
    for (const source of [new Uint8Array(6).fill(0xff), Uint8Array.of(1, 0, 0x5e, 0, 0, 9), new Uint8Array(6)]) {
      const bytes = frame({ from: 1, to: 2, size: 60 })
      bytes.set(source, 6)
      a.send(bytes)
      b.gets(bytes)
      const answer = frame({ from: 2, to: source, size: 60 })
      b.send(answer)
      a.gets(answer)
      c.gets(answer)
    }
    expect(current().ofSwitch('table_entries')).toBe(entries)
    expect(mac(1)).toHaveLength(6)
  })
}

function race(current: () => NetBackend): void {
  test.each([
    ['passed on', []],
    ['finished', withDependents(net.VIRTIO_NET_F_GUEST_CSUM)],
  ])('headers that change after they were published, packets %s', async (_, without) => {
    const { Worker } = await import('node:worker_threads')
    using guests = guestsOn(current(), {}, { without, rxBuffers: 128 })
    const [a, b] = guests
    introduce(guests)
    const { memory } = a.session
    const built = build({ ...TSO, payload: 3000 })
    const { gpa, offset, region } = memory.allocate(8192, 64)
    memory.write(gpa, built.header)
    memory.write(gpa + 12, built.bytes)
    const stop = new Int32Array(new SharedArrayBuffer(8))
    // Its own thread, so that it writes while the daemon reads.
    const worker = new Worker(
      `const { workerData: { buffer, offset, stop } } = require('node:worker_threads')
      const bytes = new Uint8Array(buffer, offset, 90)
      const good = bytes.slice()
      Atomics.store(stop, 1, 1)
      for (let i = 0; Atomics.load(stop, 0) === 0; i++) {
        const at = [0, 1, 4, 5, 6, 7, 8, 9, 24, 26, 29, 35, 58][i % 13]
        bytes[at] = i >>> 4
        for (let k = 0; k < 20; k++);
        bytes[at] = good[at]
      }`,
      { eval: true, workerData: { buffer: region.buffer, offset, stop } }
    )
    try {
      while (Atomics.load(stop, 1) === 0) await new Promise((resolve) => setTimeout(resolve, 1))
      const packet = { address: gpa, length: 12 + built.bytes.length, writable: false }
      for (let i = 0; i < 1500; i++) {
        a.net.sent(a.net.sendRaw([packet]))
        // The driver checks every header against what it negotiated.
        while (b.net.tryReceive() !== undefined);
      }
    } finally {
      Atomics.store(stop, 0, 1)
      await worker.terminate()
    }
    passesAtLast(a, b)
  })
}
