/**
 * virtio-vsock in a real guest: its kernel's sockets reach programs of the host and are reached by them, with checksums, half-closed,
 * many at once, slow readers and ports where nobody is. One boot.
 */
import { createHash, randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { createConnection, createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Guest, startGuest, startVirtiod, type VirtiodProcess, vhostUserArgs } from 'virtiod/testing'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { guestTools, vsockTools, whyNoGuest } from '../setup/prerequisites.ts'
import { read } from '../vsock/fake-guest.ts'

const MIB = 1 << 20
const sha = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex')

describe.skipIf(whyNoGuest([...guestTools, ...vsockTools]) !== undefined)('a guest with a vsock', () => {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-vsock-guest-'))
  const path = join(directory, 'vm.vsock')
  const servers: Server[] = []
  let daemon: VirtiodProcess
  let guest: Guest

  /** A host program that does `serve` with each connection from the guest. */
  async function listen(port: number, serve: (socket: Socket) => unknown): Promise<void> {
    const server = createServer({ allowHalfOpen: true }, (socket) => {
      socket.on('error', () => {})
      void serve(socket)
    })
    servers.push(server)
    await new Promise<void>((resolve) => server.listen(`${path}_${port}`, resolve))
  }

  /** A host program that connects to a port of the guest; undefined when it is refused. */
  async function connect(port: number): Promise<Socket | undefined> {
    const socket = createConnection({ path, allowHalfOpen: true }).on('error', () => {})
    socket.write(`CONNECT ${port}\n`)
    let line = ''
    while (!line.endsWith('\n')) {
      const letter = await readByte(socket)
      if (letter === '') return undefined
      line += letter
    }
    expect(line).toMatch(/^OK \d+\n$/)
    return socket
  }

  /** Starts a socat that listens in the guest. */
  async function serveInGuest(port: number, what: string): Promise<void> {
    await guest.sh(`socat VSOCK-LISTEN:${port},fork,backlog=64 '${what}' > /dev/null 2>&1 &`)
    for (;;) {
      const socket = await connect(port)
      if (socket === undefined) {
        await sleep(50)
        continue
      }
      socket.destroy()
      return
    }
  }

  beforeAll(async () => {
    const socket = join(directory, 'vsock')
    daemon = await startVirtiod(['vsock', '--socket-path', socket, '--guest-cid', '42', '--uds-path', path])
    guest = await startGuest({
      qemuArgs: vhostUserArgs(socket, 'vhost-user-vsock-pci'),
      tools: ['socat'],
      modules: ['vmw_vsock_virtio_transport'],
    })
  }, 60_000)

  afterAll(async () => {
    await guest?.kill()
    await daemon?.stop('SIGKILL')
    for (const server of servers) server.close()
    rmSync(directory, { recursive: true })
  })

  test('sends a file to the host', async () => {
    const received = new Promise<Buffer>((resolve) => void listen(1000, async (socket) => resolve(await read(socket))))
    const sum = await guest.sh(`dd if=/dev/urandom of=/tmp/file bs=1M count=8 2> /dev/null
      socat -u FILE:/tmp/file VSOCK-CONNECT:2:1000
      sha256sum < /tmp/file`)
    const bytes = await received
    expect(bytes.length).toBe(8 * MIB)
    expect(`${sha(bytes)}  -`).toBe(sum)
  })

  test('fetches a file from the host', async () => {
    const bytes = randomBytes(8 * MIB)
    await listen(1001, (socket) => socket.end(bytes))
    expect(await guest.sh('socat -u VSOCK-CONNECT:2:1001 STDOUT | sha256sum')).toBe(`${sha(bytes)}  -`)
  })

  test('is answered after it has said all: each side closes its half', async () => {
    await listen(1002, async (socket) => socket.end(sha(await read(socket))))
    // -t: how long socat waits for the answer after its own half is closed.
    expect(await guest.sh('echo question | socat -t 20 STDIO VSOCK-CONNECT:2:1002')).toBe(
      sha(Buffer.from('question\n'))
    )
  })

  test('is refused where nobody listens, at once', async () => {
    const { exitCode, output } = await guest.run('socat -u VSOCK-CONNECT:2:4000 STDOUT 2>&1')
    expect(exitCode).toBe(1)
    expect(output).toContain('Connection reset by peer')
  })

  test('can not reach other guests', async () => {
    const { exitCode, output } = await guest.run('socat -u VSOCK-CONNECT:43:1000 STDOUT 2>&1')
    expect(exitCode).toBe(1)
    expect(output).toMatch(/No such device|Connection reset by peer|Network is unreachable/)
  })

  test('is reached by programs of the host, several at once', async () => {
    await serveInGuest(2000, 'EXEC:sha256sum')
    const files = Array.from({ length: 8 }, (_, i) => randomBytes(i * 100_000 + 1))
    const sums = await Promise.all(
      files.map(async (bytes) => {
        const socket = await connect(2000)
        socket?.end(bytes)
        return String(await read(socket!))
      })
    )
    expect(sums).toEqual(files.map((bytes) => `${sha(bytes)}  -\n`))
  })

  test('is told to a program of the host when it does not listen', async () => {
    expect(await connect(2999)).toBeUndefined()
  })

  test('waits for a program of the host that reads slowly, and loses nothing', async () => {
    const result = new Promise<string>(
      (resolve) =>
        void listen(1003, async (socket) => {
          const hash = createHash('sha256')
          for (let total = 0; ; ) {
            const part = await read(socket, 1)
            if (part.length === 0) break
            hash.update(part)
            total += part.length
            // At first as if it were stuck.
            if (total < MIB) await sleep(5)
          }
          resolve(hash.digest('hex'))
        })
    )
    await guest.sh('socat -u FILE:/tmp/file VSOCK-CONNECT:2:1003')
    expect(`${await result}  -`).toBe(await guest.sh('sha256sum < /tmp/file'))
  })

  test('that reads slowly keeps the program of the host waiting, and gets all', async () => {
    await serveInGuest(2001, 'SYSTEM:sleep 1; exec sha256sum')
    const bytes = randomBytes(8 * MIB)
    const socket = await connect(2001)
    socket!.end(bytes)
    expect(String(await read(socket!))).toBe(`${sha(bytes)}  -\n`)
  })

  test('goes on after it was stopped for a while', async () => {
    await serveInGuest(2002, 'EXEC:cat')
    const socket = await connect(2002)
    socket!.write('before')
    expect(String(await read(socket!, 6))).toBe('before')
    await guest.qmp('stop')
    socket!.write('while')
    await guest.qmp('cont')
    expect(String(await read(socket!, 5))).toBe('while')
    socket!.end('after')
    expect(String(await read(socket!))).toBe('after')
  })

  test('ends, and its connections with it', async () => {
    const socket = await connect(2002)
    await guest.kill()
    expect(String(await read(socket!))).toBe('')
    expect(await connect(2002)).toBeUndefined()
  })
})

async function readByte(socket: Socket): Promise<string> {
  for (;;) {
    const byte = socket.read(1) as Buffer | null
    if (byte !== null) return String(byte)
    if (socket.readableEnded || socket.destroyed) return ''
    await new Promise<void>((resolve) => {
      const go = (): void => {
        socket.off('readable', go).off('end', go).off('close', go)
        resolve()
      }
      socket.on('readable', go).on('end', go).on('close', go)
    })
  }
}
