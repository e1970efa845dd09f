/** A vsock is handed over to a new process: its socket is never away, and the guest hears of the connections that ended. */
import { existsSync } from 'node:fs'
import { createConnection, createServer, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { connect, type FrontEnd, type PendingRequest, runVirtiod } from 'virtiod/testing'
import { expect, test } from 'vitest'
import {
  HEADER_SIZE,
  VIRTIO_VSOCK_OP_REQUEST,
  VIRTIO_VSOCK_OP_RESPONSE,
  VIRTIO_VSOCK_OP_RST,
} from '../../devices/vsock/packet.ts'
import { directory, Serving } from '../daemon-socket/serving.ts'
import { build, read } from './fake-guest.ts'

const RX = 0
const TX = 1
const EVENT = 2
const args = ['vsock', '--socket-path', 'v.sock', '--guest-cid', '3', '--uds-path', 'vm.vsock']

/** The next packet: its operation and ports. Others go on meanwhile. */
async function next(front: FrontEnd): Promise<{ op: number; srcPort: number; dstPort: number }> {
  const bytes = Buffer.from(await reply(front, front.submit(RX, [], HEADER_SIZE + 100)))
  return { op: bytes.readUInt16LE(30), srcPort: bytes.readUInt32LE(16), dstPort: bytes.readUInt32LE(20) }
}

async function reply(front: FrontEnd, request: PendingRequest): Promise<Uint8Array> {
  for (const end = performance.now() + 10_000; request.reply === undefined; front.poll()) {
    if (performance.now() > end) throw new Error('nothing came')
    await sleep(1)
  }
  return request.reply.bytes
}

function dial(serving: Serving): Socket {
  const socket = createConnection({ path: serving.path('vm.vsock'), allowHalfOpen: true }).on('error', () => {})
  socket.write('CONNECT 52\n')
  return socket
}

test('connections end on both sides, and new ones begin', { timeout: 60_000 }, async () => {
  using serving = new Serving(directory(), { args })
  using front = connect(serving.path('v.sock'), { queues: 3 })
  const sockets: Socket[] = []
  const server = createServer((socket) => sockets.push(socket.on('error', () => {})))
  await new Promise<void>((resolve) => server.listen(serving.path('vm.vsock_1'), resolve))
  const event = front.submit(EVENT, [], 4)

  front.request(TX, build({ op: VIRTIO_VSOCK_OP_REQUEST, srcPort: 1000, dstPort: 1 }))
  expect(await next(front)).toEqual({ op: VIRTIO_VSOCK_OP_RESPONSE, srcPort: 1, dstPort: 1000 })
  const host = dial(serving)
  const { op, srcPort } = await next(front)
  expect(op).toBe(VIRTIO_VSOCK_OP_REQUEST)
  front.request(TX, build({ op: VIRTIO_VSOCK_OP_RESPONSE, srcPort: 52, dstPort: srcPort }))
  const line = `OK ${srcPort}\n`
  expect(String(await read(host, line.length))).toBe(line)

  const old = serving.pid
  serving.handOverDuring(() => front.poll())
  expect(serving.pid).not.toBe(old)

  // The programs of the host see the end of it, the guest is told.
  expect(String(await read(host))).toBe('')
  expect(String(await read(sockets[0]!))).toBe('')
  expect(await next(front)).toEqual({ op: VIRTIO_VSOCK_OP_RST, srcPort: 1, dstPort: 1000 })
  expect(await next(front)).toEqual({ op: VIRTIO_VSOCK_OP_RST, srcPort, dstPort: 52 })
  expect(await reply(front, event)).toEqual(new Uint8Array(4))

  front.request(TX, build({ op: VIRTIO_VSOCK_OP_REQUEST, srcPort: 1000, dstPort: 1 }))
  expect(await next(front)).toEqual({ op: VIRTIO_VSOCK_OP_RESPONSE, srcPort: 1, dstPort: 1000 })
  dial(serving)
  expect((await next(front)).op).toBe(VIRTIO_VSOCK_OP_REQUEST)

  serving.stop()
  server.close()
  expect(existsSync(serving.path('vm.vsock'))).toBe(false)
})

test('without a driver', { timeout: 60_000 }, async () => {
  using serving = new Serving(directory(), { args })
  serving.handOverDuring(() => undefined)
  expect(String(await read(dial(serving)))).toBe('')
  using front = connect(serving.path('v.sock'), { queues: 2 })
  dial(serving)
  expect((await next(front)).op).toBe(VIRTIO_VSOCK_OP_REQUEST)
})

test('a second daemon does not take the socket of the first', { timeout: 60_000 }, async () => {
  using serving = new Serving(directory(), { args })
  const second = runVirtiod(args, { cwd: serving.directory })
  expect(second).toMatchObject({ code: 2, stderr: expect.stringContaining('another process listens on') })
  using front = connect(serving.path('v.sock'), { queues: 2 })
  dial(serving)
  expect((await next(front)).op).toBe(VIRTIO_VSOCK_OP_REQUEST)
})
