/** Connections of vsock, from both sides: how they begin, carry bytes and end. */
import { describe, expect, test } from 'vitest'
import {
  VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE as RECEIVE,
  VIRTIO_VSOCK_SHUTDOWN_F_SEND as SEND,
  VIRTIO_VSOCK_OP_CREDIT_UPDATE,
  VIRTIO_VSOCK_OP_REQUEST,
  VIRTIO_VSOCK_OP_RESPONSE,
  VIRTIO_VSOCK_OP_RST,
  VIRTIO_VSOCK_OP_RW,
  VIRTIO_VSOCK_OP_SHUTDOWN,
} from '../../devices/vsock/packet.ts'
import { FakeGuest, GUEST_CID, HOST_CID, read, until } from './fake-guest.ts'

describe.each([{ split: false }, { split: true }])('the guest connects to a host program, %o', (settings) => {
  test('that listens on the path of the port', async () => {
    await using guest = await FakeGuest.start({ settings })
    const program = await guest.listen(1234)
    await guest.send({ op: VIRTIO_VSOCK_OP_REQUEST, srcPort: 50_000, dstPort: 1234 })
    const response = await guest.expect(VIRTIO_VSOCK_OP_RESPONSE)
    expect(response).toMatchObject({
      srcCid: HOST_CID,
      dstCid: GUEST_CID,
      srcPort: 1234,
      dstPort: 50_000,
      type: 1,
      length: 0,
      flags: 0,
      bufAlloc: 262144,
      fwdCnt: 0,
    })
    await program()
    expect(guest.device.metrics()).toMatchObject({ connections: 1, 'connections_total{from="guest"}': 1 })
  })

  test('and is refused where none listens', async () => {
    await using guest = await FakeGuest.start({ settings })
    await guest.send({ op: VIRTIO_VSOCK_OP_REQUEST, srcPort: 50_000, dstPort: 1234 })
    const reset = await guest.expect(VIRTIO_VSOCK_OP_RST)
    expect(reset).toMatchObject({ srcCid: HOST_CID, dstCid: GUEST_CID, srcPort: 1234, dstPort: 50_000, type: 1 })
    await until(() => guest.device.metrics()['connections'] === 0)
  })

  test('and bytes go both ways', async () => {
    await using guest = await FakeGuest.start({ settings })
    const program = await guest.listen(1234)
    const socket = await guest.connect(50_000, 1234)
    const host = await program()
    await socket.write('from the guest')
    await socket.write(', twice')
    expect(String(await read(host, 21))).toBe('from the guest, twice')
    host.write('from the host')
    const data = await guest.expect(VIRTIO_VSOCK_OP_RW)
    expect(String(data.payload)).toBe('from the host')
    // Every packet tells how much was passed on.
    expect(data.fwdCnt).toBe(21)
    expect(guest.device.metrics()).toMatchObject({ 'bytes_total{to="host"}': 21, 'bytes_total{to="guest"}': 13 })
  })

  test('what a host program says is cut as the buffers of the guest are', async () => {
    await using guest = await FakeGuest.start({ settings, bufferSize: 44 + 1000 })
    const program = await guest.listen(1234)
    await guest.connect(50_000, 1234)
    const host = await program()
    const bytes = Buffer.from(Array.from({ length: 2500 }, (_, i) => i % 251))
    host.write(bytes)
    const parts: Buffer[] = []
    while (Buffer.concat(parts).length < 2500) parts.push((await guest.expect(VIRTIO_VSOCK_OP_RW)).payload)
    expect(parts[0]!.length).toBe(1000)
    expect(Buffer.concat(parts).equals(bytes)).toBe(true)
  })

  test('half of it is closed by the guest, then the other by the host', async () => {
    await using guest = await FakeGuest.start({ settings })
    const program = await guest.listen(1234)
    const socket = await guest.connect(50_000, 1234)
    const host = await program()
    await socket.write('question')
    await socket.send(VIRTIO_VSOCK_OP_SHUTDOWN, { flags: SEND })
    // The host program reads to the end, and answers after it.
    expect(String(await read(host))).toBe('question')
    host.end('answer')
    expect(String((await guest.expect(VIRTIO_VSOCK_OP_RW)).payload)).toBe('answer')
    expect((await guest.expect(VIRTIO_VSOCK_OP_SHUTDOWN)).flags).toBe(SEND)
    await guest.expect(VIRTIO_VSOCK_OP_RST)
    await until(() => guest.device.metrics()['connections'] === 0)
  })

  test('half of it is closed by the host, then the other by the guest', async () => {
    await using guest = await FakeGuest.start({ settings })
    const program = await guest.listen(1234)
    const socket = await guest.connect(50_000, 1234)
    const host = await program()
    host.end('question')
    expect(String((await guest.expect(VIRTIO_VSOCK_OP_RW)).payload)).toBe('question')
    expect((await guest.expect(VIRTIO_VSOCK_OP_SHUTDOWN)).flags).toBe(SEND)
    await socket.write('answer')
    await socket.send(VIRTIO_VSOCK_OP_SHUTDOWN, { flags: SEND | RECEIVE })
    await guest.expect(VIRTIO_VSOCK_OP_RST)
    expect(String(await read(host))).toBe('answer')
    await until(() => guest.device.metrics()['connections'] === 0)
  })

  test('the guest closes it, and what it has sent still arrives', async () => {
    await using guest = await FakeGuest.start({ settings })
    const program = await guest.listen(1234)
    const socket = await guest.connect(50_000, 1234)
    const host = await program()
    const bytes = Buffer.alloc(200_000, 'x')
    for (let i = 0; i < bytes.length; i += 50_000) await socket.write(bytes.subarray(i, i + 50_000))
    await socket.send(VIRTIO_VSOCK_OP_SHUTDOWN, { flags: SEND | RECEIVE })
    let last = await guest.next()
    while (last.op === VIRTIO_VSOCK_OP_CREDIT_UPDATE) last = await guest.next()
    expect(last.op).toBe(VIRTIO_VSOCK_OP_RST)
    expect((await read(host)).length).toBe(200_000)
    await until(() => guest.device.metrics()['connections'] === 0)
  })

  test('the guest resets it', async () => {
    await using guest = await FakeGuest.start({ settings })
    const program = await guest.listen(1234)
    const socket = await guest.connect(50_000, 1234)
    const host = await program()
    await socket.send(VIRTIO_VSOCK_OP_RST)
    expect((await read(host)).length).toBe(0)
    // An RST is not answered; the connection is unknown from now on.
    await socket.write('late')
    await guest.expect(VIRTIO_VSOCK_OP_RST)
    expect(guest.pending).toEqual([])
    expect(guest.device.errors).toMatchObject({ refused: 1 })
  })

  test('the host program is gone when the guest writes', async () => {
    await using guest = await FakeGuest.start({ settings })
    const program = await guest.listen(1234)
    const socket = await guest.connect(50_000, 1234)
    const host = await program()
    host.destroy()
    expect((await guest.expect(VIRTIO_VSOCK_OP_SHUTDOWN)).flags).toBe(SEND)
    await socket.write('is anybody there')
    await guest.expect(VIRTIO_VSOCK_OP_RST)
    await until(() => guest.device.metrics()['connections'] === 0)
  })

  test('who does not receive any more gets nothing more', async () => {
    await using guest = await FakeGuest.start({ settings })
    const program = await guest.listen(1234)
    const socket = await guest.connect(50_000, 1234)
    const host = await program()
    await socket.send(VIRTIO_VSOCK_OP_SHUTDOWN, { flags: RECEIVE })
    const written = new Promise((resolve) => host.write(Buffer.alloc(1_000_000), resolve))
    await socket.write('the other half goes on')
    expect(String(await read(host, 22))).toBe('the other half goes on')
    // It is thrown away rather than left to fill the host program's socket.
    await written
    await socket.send(VIRTIO_VSOCK_OP_SHUTDOWN, { flags: SEND })
    await guest.expect(VIRTIO_VSOCK_OP_RST)
    expect(guest.pending).toEqual([])
  })
})

describe('a host program connects to the guest', () => {
  test('and is told its port, when the guest takes it', async () => {
    await using guest = await FakeGuest.start()
    const host = await guest.dial('CONNECT 52\n')
    const request = await guest.expect(VIRTIO_VSOCK_OP_REQUEST)
    expect(request).toMatchObject({ srcCid: HOST_CID, dstCid: GUEST_CID, dstPort: 52, bufAlloc: 262144, type: 1 })
    await guest.send({ op: VIRTIO_VSOCK_OP_RESPONSE, srcPort: 52, dstPort: request.srcPort })
    const line = `OK ${request.srcPort}\n`
    expect(String(await read(host, line.length))).toBe(line)
    expect(guest.device.metrics()).toMatchObject({ connections: 1, 'connections_total{from="host"}': 1 })
  })

  test('and is closed when the guest refuses', async () => {
    await using guest = await FakeGuest.start()
    const host = await guest.dial('CONNECT 52\n')
    const request = await guest.expect(VIRTIO_VSOCK_OP_REQUEST)
    await guest.send({ op: VIRTIO_VSOCK_OP_RST, srcPort: 52, dstPort: request.srcPort })
    expect(String(await read(host))).toBe('')
    await until(() => guest.device.metrics()['connections'] === 0)
  })

  test('and may send on before the guest has answered', async () => {
    await using guest = await FakeGuest.start()
    const host = await guest.dial('connect 52\r\nearly')
    host.end(' bird')
    const socket = await guest.accept()
    let text = ''
    while (text.length < 10) text += String((await guest.expect(VIRTIO_VSOCK_OP_RW)).payload)
    expect(text).toBe('early bird')
    expect((await guest.expect(VIRTIO_VSOCK_OP_SHUTDOWN)).flags).toBe(SEND)
    await socket.write('answer')
    await socket.send(VIRTIO_VSOCK_OP_SHUTDOWN, { flags: SEND | RECEIVE })
    expect(String(await read(host))).toMatch(/^OK \d+\nanswer$/)
  })

  test('as often as it likes, each on a port of its own', async () => {
    await using guest = await FakeGuest.start()
    const ports = new Set<number>()
    for (let i = 0; i < 50; i++) {
      await guest.dial('CONNECT 52\n')
      ports.add((await guest.accept()).hostPort)
    }
    expect(ports.size).toBe(50)
    expect(Math.min(...ports)).toBe(2 ** 30)
  })

  test.each([
    'CONNECT\n',
    'CONNECT x\n',
    'CONNECT 4294967295\n',
    'CONNECT 4294967296\n',
    'CONNECT -1\n',
    'HELLO 52\n',
    '\n',
    'CONNECT 52 and a lot more than a line may have',
  ])('and is closed when it says %j', async (line) => {
    await using guest = await FakeGuest.start()
    const host = await guest.dial(line)
    expect(String(await read(host))).toBe('')
    expect(guest.pending).toEqual([])
  })

  test('and is closed when it says nothing and ends', async () => {
    await using guest = await FakeGuest.start()
    const host = await guest.dial('CONN')
    host.end()
    expect(String(await read(host))).toBe('')
  })

  test('its line may come in pieces', async () => {
    await using guest = await FakeGuest.start()
    const host = await guest.dial('CONN')
    host.write('ECT 5')
    await new Promise((resolve) => setTimeout(resolve, 10))
    host.write('2\nhello')
    const socket = await guest.accept()
    expect(socket.guestPort).toBe(52)
    expect(String((await guest.expect(VIRTIO_VSOCK_OP_RW)).payload)).toBe('hello')
  })

  test('and is closed while no driver is there', async () => {
    await using guest = await FakeGuest.start()
    guest.device.enableQueue(0, false)
    const host = await guest.dial('CONNECT 52\n')
    expect(String(await read(host))).toBe('')
  })
})

describe('many connections', () => {
  test('at once, each with its own bytes', async () => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    const sockets = []
    const hosts = []
    for (let i = 0; i < 100; i++) {
      sockets.push(await guest.connect(1000 + i, 1))
      hosts.push(await program())
    }
    await Promise.all(sockets.map((socket, i) => socket.write(`guest ${i}`)))
    for (const [i, host] of hosts.entries()) {
      expect(String(await read(host, `guest ${i}`.length))).toBe(`guest ${i}`)
      host.write(`host ${i}`)
    }
    const got = new Map<number, string>()
    while (got.size < 100) {
      const { dstPort, payload } = await guest.expect(VIRTIO_VSOCK_OP_RW)
      got.set(dstPort, String(payload))
    }
    expect([...got].sort(([a], [b]) => a - b)).toEqual(hosts.map((_, i) => [1000 + i, `host ${i}`]))
  })

  test('are served in turn: one that has much to say does not keep the others waiting', async () => {
    await using guest = await FakeGuest.start({ buffers: 0, bufferSize: 44 + 1000 })
    const program = await guest.listen(1)
    const hosts = []
    for (let i = 0; i < 3; i++) {
      guest.give()
      await guest.connect(1000 + i, 1)
      hosts.push(await program())
    }
    hosts[0]!.write(Buffer.alloc(60_000))
    guest.give()
    await guest.expect(VIRTIO_VSOCK_OP_RW)
    for (const host of hosts.slice(1)) host.write(Buffer.alloc(10))
    // The others have something to say as soon as the device has read it.
    await new Promise((resolve) => setTimeout(resolve, 50))
    for (let i = 0; i < 4; i++) guest.give()
    const turns = []
    for (let i = 0; i < 4; i++) turns.push((await guest.expect(VIRTIO_VSOCK_OP_RW)).dstPort)
    expect(turns).toEqual(expect.arrayContaining([1000, 1001, 1002]))
  })

  test('a port is used again', async () => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    for (let i = 0; i < 20; i++) {
      const socket = await guest.connect(1000, 1)
      const host = await program()
      await socket.write(`${i}`)
      expect(String(await read(host, `${i}`.length))).toBe(`${i}`)
      await socket.send(VIRTIO_VSOCK_OP_SHUTDOWN, { flags: SEND | RECEIVE })
      await guest.expect(VIRTIO_VSOCK_OP_RST)
    }
  })

  test('a guest that was started anew, and knows nothing of a connection, opens another on its ports', async () => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    await guest.connect(1000, 1)
    const old = await program()
    const socket = await guest.connect(1000, 1)
    const host = await program()
    expect(String(await read(old))).toBe('')
    await socket.write('new')
    expect(String(await read(host, 3))).toBe('new')
  })

  test('the program that listens may be slow to accept them', async () => {
    await using guest = await FakeGuest.start()
    const program = await guest.listen(1)
    // More than the backlog of any Node server holds.
    const sockets = Array.from({ length: 700 }, (_, i) => guest.connect(1000 + i, 1))
    await Promise.all(sockets)
    for (let i = 0; i < 700; i++) await program()
    expect(guest.device.metrics()).toMatchObject({ connections: 700 })
  })
})

test('rings that were stopped: what is known to nobody any more ends, the rest goes on', async () => {
  await using guest = await FakeGuest.start()
  const program = await guest.listen(1)
  const kept = await guest.connect(1000, 1)
  const keptHost = await program()
  const lost = await guest.connect(1001, 1)
  const lostHost = await program()
  guest.device.enableQueue(0, false)
  keptHost.write('meanwhile')
  guest.device.enableQueue(0, true)
  const asked = []
  while (asked.length < 2) {
    const next = await guest.next()
    if (next.op !== VIRTIO_VSOCK_OP_RW) asked.push(next.dstPort)
  }
  expect(asked.sort()).toEqual([1000, 1001])
  await lost.send(VIRTIO_VSOCK_OP_RST)
  expect(String(await read(lostHost))).toBe('')
  await kept.write('still here')
  expect(String(await read(keptHost, 10))).toBe('still here')
})

test('the driver goes: its connections end, with all that it has sent', async () => {
  await using guest = await FakeGuest.start()
  const program = await guest.listen(1)
  const socket = await guest.connect(1000, 1)
  const host = await program()
  const bytes = Buffer.alloc(250_000, 'x')
  for (let i = 0; i < bytes.length; i += 50_000) await socket.write(bytes.subarray(i, i + 50_000))
  await guest.device.reset()
  expect((await read(host)).length).toBe(250_000)
  await until(() => guest.device.metrics()['connections'] === 0)
  // The next driver finds a device without a past.
  guest.forget()
  await guest.connect(1000, 1)
})

test('the last packet of a connection takes the last buffer: the refusal behind it gets the next one', async () => {
  await using guest = await FakeGuest.start({ buffers: 0 })
  const program = await guest.listen(1)
  guest.give()
  const socket = await guest.connect(1000, 1)
  const host = await program()
  await socket.send(VIRTIO_VSOCK_OP_SHUTDOWN, { flags: SEND })
  await read(host)
  guest.give()
  host.end()
  await guest.expect(VIRTIO_VSOCK_OP_SHUTDOWN)
  guest.give()
  await guest.expect(VIRTIO_VSOCK_OP_RST)
})
