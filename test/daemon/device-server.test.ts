/** The server of one device, without iothreads: what becomes of it when its device fails at the wrong moment. */
import { mkdtempSync, readlinkSync, rmSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { EventEmitter } from 'eventemitter3'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { type DaemonEvents, DeviceServer } from '../../src/daemon/device-server.ts'
import { createLogger } from '../../src/daemon/log.ts'
import type { RingThreads } from '../../src/daemon/rings.ts'
import type { Device } from '../../src/device/index.ts'
import { VHOST_USER_GET_FEATURES, VHOST_USER_VERSION } from '../../src/vhost-user/wire.ts'

const threads = { assign: () => ({ request: async () => 0 }) } as unknown as RingThreads

let directory: string
let events: EventEmitter<DaemonEvents>

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'virtiod-server-'))
  events = new EventEmitter()
})
afterEach(() => rmSync(directory, { recursive: true }))

function serve(more: Partial<Device>): DeviceServer {
  const device: Partial<Device> = {
    features: 0n,
    numQueues: 1,
    config: () => new Uint8Array(0),
    writeConfig: () => false,
    close: () => {},
    ...more,
  }
  const definition = { name: 'fake', queueModule: new URL('file:///none.ts') }
  const config = { name: 'fake0', definition, options: {}, socket: { path: join(directory, 's') } }
  const server = new DeviceServer(config as never, device as Device, threads, createLogger('silent'), events)
  server.listen(() => {})
  return server
}

/** A front-end comes and goes. */
async function comeAndGo(): Promise<void> {
  const left = new Promise((resolve) => events.once('sessionClose', resolve))
  const socket = connect(join(directory, 's'))
  await new Promise((resolve) => events.once('sessionOpen', resolve))
  socket.end()
  await left
}

test('a device that is not taken back after a handover that failed: who comes then is served', async () => {
  const said: string[] = []
  const server = serve({
    letGo: () => void said.push('let go'),
    takeBack: () => {
      said.push('take back')
      throw new Error('not today')
    },
  })
  await comeAndGo()
  for (let i = 0; i < 2; i++) {
    await server.suspend()
    await server.resume()
    await comeAndGo()
  }
  expect(said).toEqual(['let go', 'take back', 'let go', 'take back'])
  // Nothing waits for the end of that handover.
  let swapped = false
  await server.exchange(async () => {
    swapped = true
  }, 1000)
  expect(swapped).toBe(true)
  await server.close()
})

test('a handover that fails while it waits for an exchange: both are over, and the session goes on', async () => {
  const said: string[] = []
  const server = serve({ letGo: () => void said.push('let go') })
  const opened = new Promise((resolve) => events.once('sessionOpen', resolve))
  const socket = connect(join(directory, 's'))
  await opened
  const swapping = Promise.withResolvers<void>()
  const swapped = Promise.withResolvers<void>()
  const exchanged = server.exchange(() => {
    swapping.resolve()
    return swapped.promise
  }, 1000)
  await swapping.promise
  const suspended = expect(server.suspend()).rejects.toThrow('the handover has failed already')
  const resumed = server.resume()
  swapped.resolve()
  await Promise.all([exchanged, suspended, resumed])
  expect(said).toEqual([])
  const reply = new Promise<Buffer>((resolve) => socket.once('data', resolve))
  socket.write(Uint8Array.of(VHOST_USER_GET_FEATURES, 0, 0, 0, VHOST_USER_VERSION, 0, 0, 0, 0, 0, 0, 0))
  expect((await reply).length).toBe(20)
  await server.close()
  socket.destroy()
})

test('a device that fails during a handover: the fds that are lent to it stay open until it has failed', async () => {
  const server = serve({})
  const opened = new Promise((resolve) => events.once('sessionOpen', resolve))
  const closed = new Promise((resolve) => events.once('sessionClose', resolve))
  const socket = connect(join(directory, 's'))
  await opened
  const { fds } = await server.suspend()
  const files = () => fds.map((fd) => readlinkSync(`/proc/self/fd/${fd}`))
  const before = files()
  expect(before.length).toBe(2)
  server.deviceFailed(0, new Error('a fault'), undefined)
  await setTimeout(20)
  expect(files()).toEqual(before)
  await server.resume()
  await closed
  await comeAndGo()
  await server.close()
  socket.destroy()
})
