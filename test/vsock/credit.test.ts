/** Flow control of vsock, both ways: nobody has to keep more than he has said he would. */
import { setTimeout as sleep } from 'node:timers/promises'
import { expect, test } from 'vitest'
import {
  VIRTIO_VSOCK_OP_CREDIT_REQUEST,
  VIRTIO_VSOCK_OP_CREDIT_UPDATE,
  VIRTIO_VSOCK_OP_RST,
  VIRTIO_VSOCK_OP_RW,
  VIRTIO_VSOCK_OP_SHUTDOWN,
} from '../../devices/vsock/packet.ts'
import { FakeGuest, type GuestSocket, read, until } from './fake-guest.ts'

const CHUNK = 4096

/** Sends until the device's credit is used up. @param before what was sent already. Returns how much was sent in all */
async function fill(guest: FakeGuest, socket: GuestSocket, bufAlloc: number, before = 0): Promise<number> {
  let sent = before
  let forwarded = 0
  for (;;) {
    for (const packet of guest.takePending()) {
      expect(packet.op).toBe(VIRTIO_VSOCK_OP_CREDIT_UPDATE)
      forwarded = packet.fwdCnt
    }
    if (sent - forwarded + CHUNK <= bufAlloc) {
      await socket.write(Buffer.alloc(CHUNK, sent / CHUNK))
      sent += CHUNK
      continue
    }
    await sleep(20)
    if (guest.pending.length === 0) return sent
  }
}

test('a host program that does not read stops the guest, and goes on when it reads', async () => {
  await using guest = await FakeGuest.start()
  const program = await guest.listen(1)
  const socket = await guest.connect(1000, 1)
  const host = await program()
  const sent = await fill(guest, socket, 262144)
  // What the kernel keeps for a socket beside the device's buffer.
  expect(sent).toBeLessThan(2_000_000)
  const bytes = await read(host, sent)
  for (let at = 0; at < sent; at += CHUNK) expect(bytes[at]).toBe((at / CHUNK) % 256)
  // All has been passed on, and the guest is told so.
  await until(() => guest.pending.length > 0)
  expect(await fill(guest, socket, 262144, sent)).toBeGreaterThanOrEqual(sent + 262144)
})

test('a guest that sends more than it may is reset, and what it was allowed still arrives', async () => {
  await using guest = await FakeGuest.start({ options: { 'buffer-size': 8192 } })
  const program = await guest.listen(1)
  const socket = await guest.connect(1000, 1)
  const host = await program()
  const sent = await fill(guest, socket, 8192)
  for (let i = 0; i < 4; i++) await socket.write(Buffer.alloc(CHUNK))
  let packet = await guest.next()
  while (packet.op === VIRTIO_VSOCK_OP_CREDIT_UPDATE) packet = await guest.next()
  expect(packet.op).toBe(VIRTIO_VSOCK_OP_RST)
  expect(guest.device.errors['violation']).toBe(1)
  const { length } = await read(host)
  expect(length).toBeGreaterThanOrEqual(sent)
  expect(length).toBeLessThanOrEqual(sent + 8192)
})

test('a guest that sends single bytes gets no more memory than others', async () => {
  await using guest = await FakeGuest.start({ options: { 'buffer-size': 4096 } })
  const program = await guest.listen(1)
  const socket = await guest.connect(1000, 1)
  const host = await program()
  const text = Array.from({ length: 4096 }, (_, i) => String.fromCharCode(32 + (i % 90))).join('')
  await Promise.all([...text].map((letter) => socket.write(letter)))
  expect(String(await read(host, text.length))).toBe(text)
})

test('the guest gets no more than it has room for, and is asked for more once', async () => {
  await using guest = await FakeGuest.start()
  const program = await guest.listen(1)
  const socket = await guest.connect(1000, 1, { bufAlloc: 100 })
  const host = await program()
  host.write(Buffer.alloc(250, 'x'))
  expect((await guest.expect(VIRTIO_VSOCK_OP_RW)).length).toBe(100)
  await guest.expect(VIRTIO_VSOCK_OP_CREDIT_REQUEST)
  await sleep(20)
  expect(guest.pending).toEqual([])
  // The same again is no news.
  await socket.send(VIRTIO_VSOCK_OP_CREDIT_UPDATE, { fwdCnt: 0 })
  await sleep(20)
  expect(guest.pending).toEqual([])
  await socket.send(VIRTIO_VSOCK_OP_CREDIT_UPDATE, { fwdCnt: 60 })
  expect((await guest.expect(VIRTIO_VSOCK_OP_RW)).length).toBe(60)
  await guest.expect(VIRTIO_VSOCK_OP_CREDIT_REQUEST)
  await socket.send(VIRTIO_VSOCK_OP_CREDIT_UPDATE, { fwdCnt: 160, bufAlloc: 1000 })
  expect((await guest.expect(VIRTIO_VSOCK_OP_RW)).length).toBe(90)
})

test('a guest that asks for credit is told', async () => {
  await using guest = await FakeGuest.start()
  const program = await guest.listen(1)
  const socket = await guest.connect(1000, 1)
  const host = await program()
  await socket.write('hello')
  await read(host, 5)
  await socket.send(VIRTIO_VSOCK_OP_CREDIT_REQUEST)
  expect(await guest.expect(VIRTIO_VSOCK_OP_CREDIT_UPDATE)).toMatchObject({ bufAlloc: 262144, fwdCnt: 5 })
})

test('a guest without credit can still be told that all was passed on', async () => {
  await using guest = await FakeGuest.start({ options: { 'buffer-size': 4096 } })
  const program = await guest.listen(1)
  const socket = await guest.connect(1000, 1, { bufAlloc: 0 })
  const host = await program()
  host.write('there is no room for this')
  await guest.expect(VIRTIO_VSOCK_OP_CREDIT_REQUEST)
  await socket.write(Buffer.alloc(4096))
  expect((await guest.expect(VIRTIO_VSOCK_OP_CREDIT_UPDATE)).fwdCnt).toBe(4096)
})

test.each([
  { bufAlloc: 0xffff_ffff, fwdCnt: 0 },
  { bufAlloc: 100, fwdCnt: 0xffff_ffff },
  { bufAlloc: 0, fwdCnt: 12_345 },
])('nonsense about credit does no harm: %o', async (credit) => {
  await using guest = await FakeGuest.start()
  const program = await guest.listen(1)
  const socket = await guest.connect(1000, 1)
  const host = await program()
  await socket.send(VIRTIO_VSOCK_OP_CREDIT_UPDATE, credit)
  host.write(Buffer.alloc(200))
  for (let got = 0; got < 200; ) {
    const next = await guest.next()
    expect([VIRTIO_VSOCK_OP_RW, VIRTIO_VSOCK_OP_CREDIT_REQUEST]).toContain(next.op)
    got += next.length
    await socket.send(VIRTIO_VSOCK_OP_CREDIT_UPDATE, { fwdCnt: got })
  }
})

test('counters go over 4 GiB', async () => {
  // The device begins at 0, so only a guest can be near the end of its counter: one that says it is.
  await using guest = await FakeGuest.start()
  const program = await guest.listen(1)
  const socket = await guest.connect(1000, 1, { bufAlloc: 1000, fwdCnt: 0xffff_ff00 })
  const host = await program()
  // Sent is 0, forwarded 256 less: 256 bytes are under way, for all that the device knows.
  host.write(Buffer.alloc(2000))
  expect((await guest.expect(VIRTIO_VSOCK_OP_RW)).length).toBe(744)
  await guest.expect(VIRTIO_VSOCK_OP_CREDIT_REQUEST)
  await socket.send(VIRTIO_VSOCK_OP_CREDIT_UPDATE, { fwdCnt: 744 })
  expect((await guest.expect(VIRTIO_VSOCK_OP_RW)).length).toBe(1000)
})

test('a guest that gives no buffers holds up nothing that it sends', async () => {
  await using guest = await FakeGuest.start({ buffers: 0 })
  const program = await guest.listen(1)
  guest.give()
  const socket = await guest.connect(1000, 1)
  const host = await program()
  const bytes = Buffer.alloc(200_000, 'y')
  for (let i = 0; i < bytes.length; i += 50_000) await socket.write(bytes.subarray(i, i + 50_000))
  expect((await read(host, 200_000)).equals(bytes)).toBe(true)
  // What the host says meanwhile waits in its socket, not in the device.
  const flood = Buffer.alloc(4_000_000)
  let flushed = false
  host.write(flood, () => {
    flushed = true
  })
  await sleep(50)
  expect(flushed).toBe(false)
  // One packet says all that was to be said about credit.
  guest.give()
  expect((await guest.next()).fwdCnt).toBe(200_000)
  host.end()
  let got = 0
  for (;;) {
    guest.give(44 + 65536)
    const packet = await guest.next()
    if (packet.op === VIRTIO_VSOCK_OP_SHUTDOWN) break
    got += packet.length
    await socket.send(VIRTIO_VSOCK_OP_CREDIT_UPDATE, { fwdCnt: got })
  }
  expect(got).toBeGreaterThanOrEqual(4_000_000 - 4096)
})
