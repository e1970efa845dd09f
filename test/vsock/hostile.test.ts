/** Guests that do what no driver does. Their session goes on, nobody else notices, and what it costs is bounded. */
import { setTimeout as sleep } from 'node:timers/promises'
import { describe, expect, test } from 'vitest'
import {
  HEADER_SIZE,
  VIRTIO_VSOCK_OP_CREDIT_REQUEST,
  VIRTIO_VSOCK_OP_CREDIT_UPDATE,
  VIRTIO_VSOCK_OP_REQUEST,
  VIRTIO_VSOCK_OP_RESPONSE,
  VIRTIO_VSOCK_OP_RST,
  VIRTIO_VSOCK_OP_RW,
  VIRTIO_VSOCK_OP_SHUTDOWN,
} from '../../devices/vsock/packet.ts'
import { build, FakeGuest, GUEST_CID, HOST_CID, type Packet, read, until } from './fake-guest.ts'

/** Whether the device still does its work. */
async function expectAlive(guest: FakeGuest): Promise<void> {
  const program = await guest.listen(999)
  const socket = await guest.connect(999, 999)
  const host = await program()
  await socket.write('alive')
  expect(String(await read(host, 5))).toBe('alive')
  expect(guest.device.failure).toBeUndefined()
}

const ALL_OPERATIONS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 0xffff]

describe('packets that belong to no connection', () => {
  test.each(ALL_OPERATIONS.filter((op) => op !== VIRTIO_VSOCK_OP_RST))('are refused: operation %i', async (op) => {
    await using guest = await FakeGuest.start()
    await guest.send({ op, srcPort: 7, dstPort: 8 })
    expect(await guest.expect(VIRTIO_VSOCK_OP_RST)).toMatchObject({ srcPort: 8, dstPort: 7 })
    await expectAlive(guest)
  })

  test('are not answered when they are RST', async () => {
    await using guest = await FakeGuest.start()
    await guest.send({ op: VIRTIO_VSOCK_OP_RST, srcPort: 7, dstPort: 8 })
    await expectAlive(guest)
    expect(guest.pending).toEqual([])
  })

  test.each([
    { what: 'come from another guest', fields: { srcCid: 4n } },
    { what: 'come from the host', fields: { srcCid: HOST_CID } },
    { what: 'go to another guest', fields: { dstCid: 4n } },
    { what: 'go to the guest itself', fields: { dstCid: GUEST_CID } },
    { what: 'go to the hypervisor', fields: { dstCid: 0n } },
    { what: 'have a cid of 64 bits', fields: { srcCid: 0xffff_ffff_0000_0003n } },
    { what: 'are of a sequence of packets', fields: { type: 2 } },
    { what: 'are datagrams', fields: { type: 3 } },
    { what: 'are of no type', fields: { type: 0 } },
  ])('are refused when they $what', async ({ fields }) => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    const socket = await guest.connect(1000, 1)
    const host = await program()
    // With the ports of a connection that is there.
    const sent = { op: VIRTIO_VSOCK_OP_RW, srcPort: 1000, dstPort: 1, srcCid: GUEST_CID, dstCid: HOST_CID, type: 1 }
    await guest.send({ ...sent, ...fields }, Buffer.from('foreign'))
    const { srcCid, dstCid, type }: Partial<Packet> = { ...sent, ...fields }
    expect(await guest.expect(VIRTIO_VSOCK_OP_RST)).toMatchObject({ srcCid: dstCid, dstCid: srcCid, type })
    await socket.write('own')
    expect(String(await read(host, 3))).toBe('own')
  })
})

describe('malformed packets', () => {
  test.each([0, 1, 43])('of %i bytes are dropped', async (length) => {
    await using guest = await FakeGuest.start()
    if (length > 0) await guest.raw(Buffer.alloc(length, 0xff))
    else await guest.device.request(1, [], 64)
    expect(guest.device.errors['malformed']).toBe(1)
    await expectAlive(guest)
  })

  test.each([1, 100, 0xffff_ffff])('that say they have %i bytes more end their connection', async (more) => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    const socket = await guest.connect(1000, 1)
    const host = await program()
    await socket.write('four', { length: Math.min(0xffff_ffff, 4 + more) })
    await guest.expect(VIRTIO_VSOCK_OP_RST)
    expect(guest.device.errors['violation']).toBe(1)
    // A stream with a hole would be worse than its end.
    expect(String(await read(host))).toBe('')
    await expectAlive(guest)
  })

  test('that say they have less are cut', async () => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    const socket = await guest.connect(1000, 1)
    const host = await program()
    await socket.write('hello, world', { length: 5 })
    await socket.write('!')
    expect(String(await read(host, 6))).toBe('hello!')
  })

  test('with payload where none belongs', async () => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    const socket = await guest.connect(1000, 1)
    await program()
    for (const op of [VIRTIO_VSOCK_OP_CREDIT_UPDATE, VIRTIO_VSOCK_OP_CREDIT_REQUEST, VIRTIO_VSOCK_OP_SHUTDOWN])
      await socket.send(op, {}, Buffer.alloc(1000))
    await guest.expect(VIRTIO_VSOCK_OP_CREDIT_UPDATE)
    expect(guest.device.metrics()['bytes_total{to="host"}']).toBe(0)
  })

  test('random bytes', async () => {
    await using guest = await FakeGuest.start()
    // A small generator, so that a failure can be seen again.
    let seed = 1
    const random = () => {
      seed = (Math.imul(seed, 1103515245) + 12345) >>> 0
      return seed >>> 16
    }
    for (let i = 0; i < 2000; i++) {
      const bytes = Buffer.from(Array.from({ length: HEADER_SIZE + (random() % 20) }, random))
      // Most of them get as far as the operation.
      if (random() % 8 > 0) {
        bytes.writeBigUInt64LE(GUEST_CID, 0)
        bytes.writeBigUInt64LE(HOST_CID, 8)
        bytes.writeUInt16LE(1, 28)
      }
      if (random() % 2 > 0) bytes.writeUInt16LE(random() % 9, 30)
      for (const at of [16, 20]) bytes.writeUInt32LE(random() % 4, at)
      await guest.raw(bytes)
    }
    guest.takePending()
    await until(() => guest.device.metrics()['connections'] === 0)
    guest.takePending()
    await expectAlive(guest)
  })
})

describe('packets at the wrong time end their connection:', () => {
  test.each([VIRTIO_VSOCK_OP_RESPONSE, 0, 8, 0xffff])('operation %i, when it is open', async (op) => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    const socket = await guest.connect(1000, 1)
    const host = await program()
    await socket.send(op)
    await guest.expect(VIRTIO_VSOCK_OP_RST)
    expect(String(await read(host))).toBe('')
  })

  test.each([VIRTIO_VSOCK_OP_RW, 0])(
    'operation %i, when the host program has asked and nobody answered',
    async (op) => {
      await using guest = await FakeGuest.start()
      const host = await guest.dial('CONNECT 52\n')
      const { srcPort } = await guest.expect(VIRTIO_VSOCK_OP_REQUEST)
      await guest.send({ op, srcPort: 52, dstPort: srcPort }, Buffer.from('x'))
      await guest.expect(VIRTIO_VSOCK_OP_RST)
      expect(String(await read(host))).toBe('')
    }
  )

  test('data, before the host program was reached', async () => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    void guest.send({ op: VIRTIO_VSOCK_OP_REQUEST, srcPort: 1000, dstPort: 1 })
    await guest.send({ op: VIRTIO_VSOCK_OP_RW, srcPort: 1000, dstPort: 1 }, Buffer.from('x'))
    await guest.expect(VIRTIO_VSOCK_OP_RST)
    expect(String(await read(await program()))).toBe('')
    await until(() => guest.device.metrics()['connections'] === 0)
    expect(guest.pending).toEqual([])
  })

  test('data, after the guest has said that there is no more', async () => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    const socket = await guest.connect(1000, 1)
    const host = await program()
    await socket.write('all')
    await socket.send(VIRTIO_VSOCK_OP_SHUTDOWN, { flags: 2 })
    await socket.write('more')
    await guest.expect(VIRTIO_VSOCK_OP_RST)
    expect(String(await read(host))).toBe('all')
  })
})

describe('floods', () => {
  test('of connections: as many as are allowed', async () => {
    await using guest = await FakeGuest.start({ options: { 'max-connections': 10 } })
    await guest.listen(1)
    for (let i = 0; i < 10; i++) await guest.connect(1000 + i, 1)
    for (let i = 10; i < 50; i++) {
      await guest.send({ op: VIRTIO_VSOCK_OP_REQUEST, srcPort: 1000 + i, dstPort: 1 })
      await guest.expect(VIRTIO_VSOCK_OP_RST)
    }
    // The host's programs count as well.
    expect(String(await read(await guest.dial('CONNECT 1\n')))).toBe('')
    expect(guest.device.metrics()['connections']).toBe(10)
    await guest.send({ op: VIRTIO_VSOCK_OP_RST, srcPort: 1000, dstPort: 1 })
    await until(() => guest.device.metrics()['connections'] === 9)
    await guest.connect(2000, 1)
  })

  test('of connections that are closed at once, to a program that reads nothing of them', async () => {
    await using guest = await FakeGuest.start({ options: { 'max-connections': 10 } })
    await guest.listen(1)
    let refused = 0
    for (let i = 0; i < 50; i++) {
      const packet = await guest
        .send({ op: VIRTIO_VSOCK_OP_REQUEST, srcPort: 1000 + i, dstPort: 1 })
        .then(() => guest.next())
      if (packet.op === VIRTIO_VSOCK_OP_RST) {
        refused++
        continue
      }
      // More than the kernel takes from us for somebody who doesn't read.
      let sent = 0
      while (sent < 500_000) {
        await guest.send({ op: VIRTIO_VSOCK_OP_RW, srcPort: 1000 + i, dstPort: 1 }, Buffer.alloc(50_000))
        sent += 50_000
        await sleep(0)
        if (guest.takePending().some(({ op }) => op === VIRTIO_VSOCK_OP_RST)) break
      }
      await guest.send({ op: VIRTIO_VSOCK_OP_RST, srcPort: 1000 + i, dstPort: 1 })
    }
    // Over for the guest, but what it has sent is still kept for the program: it counts.
    expect(refused).toBe(40)
    expect(guest.device.metrics()['connections']).toBe(10)
  })

  test('of requests for nobody, by a guest that takes no answer: what waits is bounded', async () => {
    await using guest = await FakeGuest.start({ buffers: 0 })
    for (let i = 0; i < 3000; i++) await guest.send({ op: VIRTIO_VSOCK_OP_RW, srcPort: i, dstPort: 1 })
    let answers = 0
    for (let i = 0; i < 1100; i++) guest.give()
    await sleep(100)
    for (const { op } of guest.takePending()) if (op === VIRTIO_VSOCK_OP_RST) answers++
    expect(answers).toBe(1024)
    await expectAlive(guest)
  })

  test('of requests for credit: one answer for all that came before it', async () => {
    await using guest = await FakeGuest.start({ buffers: 0 })
    await guest.listen(1)
    guest.give()
    const socket = await guest.connect(1000, 1)
    for (let i = 0; i < 1000; i++) await socket.send(VIRTIO_VSOCK_OP_CREDIT_REQUEST)
    for (let i = 0; i < 10; i++) guest.give()
    await guest.expect(VIRTIO_VSOCK_OP_CREDIT_UPDATE)
    await sleep(20)
    expect(guest.pending).toEqual([])
  })
})

describe('buffers', () => {
  test.each([1, 43, 44])('of %i bytes come back empty, and larger ones are used', async (length) => {
    await using guest = await FakeGuest.start({ buffers: 0 })
    for (let i = 0; i < 100; i++) guest.give(length)
    guest.give(45)
    await guest.send({ op: VIRTIO_VSOCK_OP_RW, srcPort: 1, dstPort: 1 })
    await guest.expect(VIRTIO_VSOCK_OP_RST)
    expect(guest.device.errors['malformed']).toBe(100)
  })

  test('with room for one byte', async () => {
    await using guest = await FakeGuest.start({ bufferSize: HEADER_SIZE + 1, buffers: 4 })
    const program = await guest.listen(1)
    await guest.connect(1000, 1)
    const host = await program()
    host.write('abc')
    for (const letter of 'abc') expect(String((await guest.expect(VIRTIO_VSOCK_OP_RW)).payload)).toBe(letter)
  })

  test('that come when what they were wanted for is over', async () => {
    await using guest = await FakeGuest.start({ buffers: 0 })
    const program = await guest.listen(1)
    guest.give()
    const socket = await guest.connect(1000, 1)
    const host = await program()
    host.write('nobody will read this')
    await sleep(20)
    await socket.send(VIRTIO_VSOCK_OP_RST)
    guest.give()
    guest.give()
    await sleep(20)
    expect(guest.pending).toEqual([])
    await guest.connect(1001, 1)
  })
})

test.each([1, 3])('an event buffer of %i bytes comes back empty', async (length) => {
  await using guest = await FakeGuest.start()
  const given = guest.device.give(2, length)
  await guest.device.loadState(Buffer.from('{"connections":[]}'))
  expect(await given).toHaveLength(0)
  expect(guest.device.errors['malformed']).toBe(1)
  await expectAlive(guest)
})

test('header fields are where the specification has them', () => {
  const fields = { srcCid: 1n, dstCid: 2n, srcPort: 3, dstPort: 4, length: 5, type: 6, op: 7, flags: 8, bufAlloc: 9 }
  expect(build({ ...fields, fwdCnt: 10 }).toString('hex')).toBe(
    '010000000000000002000000000000000300000004000000050000000600070008000000090000000a000000'
  )
})
