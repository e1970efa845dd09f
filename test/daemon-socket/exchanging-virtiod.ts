/**
 * A process that serves disks and, without pause, moves their queues to other iothreads under another device object:
 * `node exchanging-virtiod.ts DISK…`, with DISK.sock and DISK.img in the working directory. It logs how often that happened.
 */
import { EventEmitter } from 'eventemitter3'
import blk from '../../devices/blk/index.ts'
import { type DaemonEvents, DeviceServer } from '../../src/daemon/device-server.ts'
import { KeptFiles } from '../../src/daemon/kept-files.ts'
import { createLogger } from '../../src/daemon/log.ts'
import type { Device, DeviceHost } from '../../src/device/index.ts'
import { fileInfo, lockFile, probeFallocate } from '../../src/engine/files.ts'
import { networkHost } from '../../src/engine/network.ts'
import { IothreadPool } from '../../src/engine/pool.ts'

const LIMIT_MS = 500
/** Exchanges of every disk that are worth a line. */
const ROUND = 2

const exchanges = new Map<string, number>()
let told = 0
const log = createLogger('info')
const pool = new IothreadPool({ count: 2, pollMaxUs: 32, emulate: process.env['VIRTIOD_IO_URING'] === 'off' })
const servers: DeviceServer[] = []
const of = (session: number) => servers.find((server) => server.rings.session === session)
pool.on('ringBroken', ({ session, index, code, message }) => of(session)?.ringBroke(index, code, message))
pool.on('deviceFailed', ({ session, index, error, chain }) => of(session)?.deviceFailed(index, error, chain))
pool.on('call', ({ session, index }) => of(session)?.ringCalls(index))
pool.on('iotlbMiss', ({ session, index, address, access }) => of(session)?.iotlbMiss(index, address, access))

async function open(name: string): Promise<Device> {
  const host: DeviceHost = {
    log,
    name,
    daemon: pool,
    signal: new AbortController().signal,
    network: networkHost,
    handover: new KeptFiles(),
    send: () => {},
    configChanged: () => {},
    fileInfo,
    lockFile,
    fallocate: probeFallocate,
  }
  const options = { 'blk-file': `${name}.img`, 'num-queues': 2, cache: 'writeback', 'read-only': false }
  return (await blk.open(options as never, host)) as Device
}

async function serve(name: string): Promise<void> {
  const device = await open(name)
  const config = { name, definition: blk, options: {}, socket: { path: `${name}.sock` } }
  const server = new DeviceServer(
    config as never,
    device,
    pool,
    log.child({ device: name }),
    new EventEmitter<DaemonEvents>()
  )
  servers.push(server)
  exchanges.set(name, 0)
  server.listen(() => {})
  void exchangeForEver(server, name, device)
}

async function exchangeForEver(server: DeviceServer, name: string, first: Device): Promise<never> {
  let device = first
  for (let count = 1; ; count++) {
    try {
      await server.exchange(async () => {
        device.close()
        device = await open(name)
        // Both queues on both threads in turn, together and apart.
        const threads = Array.from({ length: 2 }, (_, i) => pool.threads[((count >> i) & 1) ^ i]!)
        server.rings.replace(device, threads)
      }, LIMIT_MS)
      exchanges.set(name, count)
      const all = Math.min(...exchanges.values())
      if (all === told + ROUND) {
        told = all
        log.info({ count: all }, 'exchanged')
      }
    } catch (error) {
      log.error({ device: name, err: error }, 'not exchanged')
    }
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
}

await pool.ready()
for (const name of process.argv.slice(2)) await serve(name)
log.info({}, 'ready')
