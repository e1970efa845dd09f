/**
 * Runs the whole surface of the addon once or more, for the sanitizers to watch (asan.sh); what it returns is asserted in the
 * other tests. A plain script: no test runner under the preload. Prints "exercised" at the end.
 */
import { ftruncateSync, mkdtempSync, openSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import { native } from '../../src/native.ts'
import { Vectors } from './network.ts'
import { allocated, fdOf, haveUring, mapped, OP, SQE_LINK, SQE_SKIP_SUCCESS, TestRing, until } from './support.ts'

const collect = (globalThis as unknown as { gc: () => void }).gc
const directory = mkdtempSync(join(tmpdir(), 'virtiod-asan-'))

function descriptors(): void {
  const out = new Float64Array(8)
  const fd = openSync(join(directory, 'file'), 'w+')
  native.fdInfo(fd, out)
  native.fdInfo(-1, out)
  native.lockFile(fd, true)
  native.fallocate(fd, 0, 0, 65_536)
  native.setNonblock(fd, true)
  native.close(fdOf(native.dup(fd), 'dup'))
  native.close(fd)
  const event = fdOf(native.eventfd(1), 'eventfd')
  native.eventfdWrite(event, 2 ** 53 - 1)
  native.eventfdRead(event)
  native.pollIn(event, 0)
  native.close(event)
  native.memfd('x'.repeat(1000), 1, 0)
  const sealed = fdOf(native.memfd('sealed', 4096, 0), 'memfd')
  for (const seals of [0, 1 | 2 | 4, 8, 2 ** 30, 2 ** 31 - 1]) native.sealFile(sealed, seals)
  native.close(sealed)
  native.sealFile(-1, 1)
  native.gettid()
  native.setThreadName('ünïcödé-näme-löng')
  native.setAffinity(Int32Array.from({ length: 8192 }, (_, i) => i))
  const loose = native as unknown as Record<string, (...args: unknown[]) => unknown>
  const odd = [
    undefined,
    null,
    -1,
    2 ** 60,
    Number.NaN,
    'text',
    {},
    new Uint8Array(0),
    new Int32Array(0),
    new Float64Array(8),
  ]
  // Every function with wrong arguments of every kind; closing or blocking ones aside.
  for (const name of Object.keys(native)) {
    if (name === 'close' || name === 'pollIn' || name === 'ringSetup') continue
    for (let i = 0; i < 200; i++) {
      try {
        loose[name]?.(...Array.from({ length: i % 8 }, (_, j) => odd[(i * 7 + j * 3) % odd.length]))
      } catch (error) {
        if (!(error instanceof TypeError)) throw error
      }
    }
  }
}

function sockets(): void {
  const path = join(directory, 'socket')
  const listener = fdOf(native.listenUnix(path, 0o600), 'listenUnix')
  const client = fdOf(native.connectUnix(path), 'connectUnix')
  const server = fdOf(native.accept(listener), 'accept')
  native.peerCred(server, new Int32Array(3))
  native.socketKind(listener)
  native.socketKind(server)
  native.listenUnix(''.padEnd(107, 'x'), 0o600)
  native.listenUnix(''.padEnd(108, 'x'), 0o600)
  rmSync(''.padEnd(107, 'x'), { force: true })
  for (const count of [0, 1, 8, 253]) {
    for (const room of [0, 1, 8, 300]) {
      const event = fdOf(native.eventfd(0), 'eventfd')
      native.sendMessage(client, new Uint8Array(16), 4, 12, new Int32Array(253).fill(event), count, false)
      const fds = new Int32Array(2 + room)
      native.recvMessage(server, new Uint8Array(16), 8, 8, fds)
      for (let i = 0; i < (fds[0] ?? 0); i++) native.close(fds[2 + i] ?? -1)
      native.recvMessage(server, new Uint8Array(64), 0, 64, fds)
      native.close(event)
    }
  }
  // To nobody, to a name that is too long, to an abstract one, and to a socket of the wrong kind.
  for (const to of [
    '',
    '@',
    '@nobody',
    path,
    join(directory, 'nowhere'),
    'x'.repeat(107),
    `@${'x'.repeat(200)}`,
    'a\0b',
  ]) {
    for (const length of [0, 1, 4096, 300_000]) native.sendDatagram(to, new Uint8Array(length))
  }
  native.shutdown(client)
  for (const fd of [listener, client, server]) native.close(fd)
  rmSync(path)
}

function memory(): void {
  const fd = fdOf(native.memfd('asan', 65_536, 0), 'memfd')
  for (let i = 0; i < 50; i++) {
    const { address, buffer } = mapped(fd, 4096, 8192)
    new Uint8Array(buffer).fill(1)
    native.adviseRandom(address)
    native.adviseRandom(address + 1)
    if (i % 2 === 0) native.release(address)
    native.faults(address)
    new Uint8Array(allocated(100).buffer).fill(2)
  }
  const { address, buffer } = mapped(fd, 0, 65_536)
  ftruncateSync(fd, 0)
  if (new Uint8Array(buffer)[40_000] !== 0 || native.faults(address) !== 1)
    throw new Error('the guard did not catch it')
  native.eventfdRead(native.faultEventFd())
  native.close(fd)
  native.release(1)
}

function packets(): void {
  // An eventfd takes and gives eight bytes at a time, as a tap does packets; the arrays are as long as they must be.
  const event = fdOf(native.eventfd(0), 'eventfd')
  const vectors = new Vectors()
  for (const shape of [
    [],
    [8],
    [4, 4],
    [1, 1, 6],
    [8, 8, 8],
    Array<number>(1024).fill(8),
    Array<number>(1025).fill(8),
  ]) {
    for (const chainCount of [0, 1, 2, 5]) {
      vectors.clear()
      for (let i = 0; i < chainCount; i++) for (const length of shape) vectors.add(length).fill(1)
      const chains = new Int32Array(chainCount).fill(shape.length)
      for (const mergeable of [false, true]) {
        for (const maxPackets of [0, 1, 4]) {
          native.sendPackets(event, vectors.address, chains.slice(), chainCount)
          const results = new Int32Array(maxPackets + 1)
          native.receivePackets(event, vectors.address, chains, chainCount, 8, mergeable, results, maxPackets)
          native.receivePackets(event, vectors.address, chains, chainCount, 20, mergeable, results, maxPackets)
        }
      }
    }
  }
  native.close(event)
  const fd = fdOf(native.memfd('asan', 8192, 0), 'memfd')
  const gone = mapped(fd, 0, 8192)
  ftruncateSync(fd, 4096)
  const { address } = allocated(8192)
  const copier = native.createCopier(3)
  if (typeof copier === 'number') throw new Error(`createCopier: ${copier}`)
  const list = new Float64Array(copier.pieces)
  list.set([3, address, address + 4096, 4096, address + 1, gone.address + 4000, 4000, 0, 0, 0])
  copier.run()
  if (native.faults(gone.address) !== 1) throw new Error('the guard did not catch it')
  copier.run()
  native.eventfdRead(native.faultEventFd())
  native.close(fd)
}

/** Nothing that would change this machine's network: names that are no tap's, and links that there are not. */
function links(): void {
  for (const name of ['', 'lo:1', 'x'.repeat(15), 'x'.repeat(16), 'x'.repeat(1000), 'lo\0', 'ünïcödé']) {
    native.linkInfo(name, new Int32Array(11))
    native.linkSetUp(name, true)
    native.linkSetMtu(name, 1500)
    native.bridgeAdd(name, name)
    native.bridgeAdd('lo', name)
    native.packetSocket(name, true)
  }
  native.linkInfo('lo', new Int32Array(11))
  for (const name of ['lo', 'a/b', 'x'.repeat(16)]) native.tapOpen(name, true)
  const socket = native.packetSocket('lo', true)
  if (socket >= 0) native.close(socket)
  const tun = openSync('/dev/null', 'r+')
  for (const fd of [-1, tun]) {
    native.tapInfo(fd, new Int32Array(3))
    native.tapSetHeaderSize(fd, 12)
    native.tapSetOffload(fd, 2 ** 32 - 1)
    native.tapSetQueue(fd, false)
  }
  native.close(tun)
}

function ring(emulate: boolean): void {
  const ring = new TestRing(emulate)
  const memory = allocated(65_536)
  const fd = openSync(join(directory, 'ring'), 'w+')
  const event = fdOf(native.eventfd(0), 'eventfd')
  const words = new DataView(memory.buffer)
  words.setBigUint64(0, BigInt(memory.address), true)
  words.setBigUint64(8, 100n, true)
  for (let i = 0; i < 200; i++) {
    const common = { fd, address: memory.address + 4096, data: i }
    ring.push({ ...common, op: OP.WRITE, length: 4096, flags: i % 3 === 0 ? SQE_LINK : 0 })
    ring.push({ ...common, op: OP.READ, length: 8192, flags: SQE_SKIP_SUCCESS })
    ring.push({ ...common, op: OP.READV, address: memory.address, length: 1 })
    ring.push({ ...common, op: OP.FSYNC, extra: 1 })
    ring.push({ op: OP.POLL_ADD, data: 1000 + (i % 5), fd: event, length: i % 2, extra: 1 })
    ring.push({ op: (i * 11) % 256 === 9 ? OP.NOP : OP.FALLOCATE, data: 5, fd, address: 4096 })
    ring.push({ op: i % 2 === 0 ? OP.POLL_REMOVE : OP.ASYNC_CANCEL, data: 6, address: 1000 + (i % 4) })
    native.eventfdWrite(event, 1)
    ring.enter(8, i % 4, 1000)
    if (i % 3 === 0) ring.reap()
  }
  for (let i = 0; i < 20; i++) {
    ring.enter(8, 0)
    ring.reap()
  }
  ring.native.registerFile(0, fd)
  ring.native.registerFile(0, -1)
  ring.enter(0, 1, 1000)
  if (Math.random() < 0.5) ring.close()
  ring.enter(0, 0)
  native.close(fd)
  native.close(event)
}

async function watchers(): Promise<void> {
  let seen = 0
  const fds = Array.from({ length: 20 }, () => fdOf(native.eventfd(1), 'eventfd'))
  const watcher = native.createWatcher(() => {
    seen++
  })
  fds.forEach((fd, i) => {
    watcher.add(fd, i)
  })
  await until('reports', () => seen >= 20)
  for (const fd of fds) watcher.arm(fd, 1)
  for (const fd of fds.slice(10)) watcher.remove(fd)
  for (const fd of fds) native.close(fd)
  watcher.unref()
  watcher.close()
  native.createWatcher(() => {}).unref()
}

async function workers(emulate: boolean): Promise<void> {
  for (const after of ['return', 'terminate', 'loop', 'churn']) {
    const event = fdOf(native.eventfd(1), 'eventfd')
    const worker = new Worker(new URL('./worker-ring.ts', import.meta.url), {
      workerData: { emulate, event, after },
      execArgv: [],
    })
    const exited = new Promise((resolve) => worker.once('exit', resolve))
    let messages = 0
    worker.on('message', () => messages++)
    await until('worker', () => messages >= (after === 'loop' || after === 'churn' ? 1 : 2), 60_000)
    await worker.terminate()
    await exited
    native.close(event)
  }
}

for (let round = 0; round < 3; round++) {
  descriptors()
  sockets()
  memory()
  packets()
  links()
  for (const emulate of haveUring ? [false, true] : [true]) {
    for (let i = 0; i < 5; i++) ring(emulate)
    await workers(emulate)
  }
  await watchers()
  collect()
  await sleep(10)
  collect()
}
rmSync(directory, { recursive: true, force: true })
console.log('exercised')
