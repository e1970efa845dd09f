/** How a vsock begins and ends: its options, its socket, and what a successor takes over. */
import { execFileSync } from 'node:child_process'
import { existsSync, lstatSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import vsock from '../../devices/vsock/index.ts'
import { VIRTIO_VSOCK_OP_REQUEST, VIRTIO_VSOCK_OP_RST, VIRTIO_VSOCK_OP_RW } from '../../devices/vsock/packet.ts'
import { testDevice } from '../../src/testing/index.ts'
import { FakeGuest, until } from './fake-guest.ts'

let directory: string
let path: string
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'virtiod-vsock-'))
  path = join(directory, 'vm.vsock')
})
afterEach(() => rmSync(directory, { recursive: true }))

const open = (options: Record<string, unknown> = {}) =>
  testDevice(vsock, { options: { 'guest-cid': 3, 'uds-path': path, ...options } })

describe('options', () => {
  test.each([0, 1, 2, 0xffff_ffff, -1, 3.5])('a guest has no cid %d', async (cid) => {
    await expect(open({ 'guest-cid': cid })).rejects.toMatchObject({ code: 'ERR_OPTION_VALUE' })
  })

  test.each([3, 0xffff_fffe])('the config space says the cid: %d', async (cid) => {
    await using device = await open({ 'guest-cid': cid })
    expect(device.config.length).toBe(8)
    expect(Buffer.from(device.config).readBigUInt64LE()).toBe(BigInt(cid))
    expect(await device.writeConfig(0, new Uint8Array(8))).toBe(false)
  })

  test('streams are offered, and nothing else', async () => {
    await using device = await open()
    expect(device.device.features).toBe(1n)
    expect(device.device.numQueues).toBe(3)
  })
})

describe('the socket of the host programs', () => {
  test('is there while the device is', async () => {
    {
      await using device = await open()
      expect(lstatSync(path).isSocket()).toBe(true)
      expect(device.failure).toBeUndefined()
    }
    expect(existsSync(path)).toBe(false)
  })

  test('that a dead process left is replaced', async () => {
    const script = `require('net').createServer().listen(${JSON.stringify(path)}, () => process.kill(process.pid, 9))`
    expect(() => execFileSync(process.execPath, ['-e', script])).toThrow()
    expect(lstatSync(path).isSocket()).toBe(true)
    await using device = await open()
    expect(device.failure).toBeUndefined()
    expect(lstatSync(path).isSocket()).toBe(true)
  })

  test('that another process listens on is refused', async () => {
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(path, resolve))
    await expect(open()).rejects.toMatchObject({
      code: 'ERR_VSOCK_UDS_IN_USE',
      option: '--uds-path',
      message: `--uds-path: another process listens on ${path}. Stop that process, or give another path.`,
    })
    expect(lstatSync(path).isSocket()).toBe(true)
    await new Promise((resolve) => server.close(resolve))
  })

  test('never replaces a file', async () => {
    writeFileSync(path, 'precious')
    await expect(open()).rejects.toMatchObject({
      code: 'ERR_VSOCK_UDS_PATH',
      message: `--uds-path: ${path} exists and is no socket. Give a path where there is nothing, or a socket that nobody listens on.`,
    })
    expect(lstatSync(path).isFile()).toBe(true)
  })

  test('in a directory that is not there', async () => {
    path = join(directory, 'none', 'vm.vsock')
    await expect(open()).rejects.toMatchObject({
      code: 'ERR_VSOCK_UDS_PATH',
      message: `--uds-path: cannot listen on ${path}. Give a path in a directory that exists and that you may write to.`,
    })
  })

  test('has room in its path for any port', async () => {
    const longest = 96 - Buffer.byteLength(directory) - 1
    path = join(directory, 'x'.repeat(longest + 1))
    await expect(open()).rejects.toMatchObject({
      code: 'ERR_VSOCK_UDS_PATH',
      message: `--uds-path: ${path} has 97 bytes. Give a path of at most 96 bytes: the guest's ports are put behind it.`,
    })
    path = join(directory, 'x'.repeat(longest))
    await using guest = await open()
    expect(guest.failure).toBeUndefined()
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(`${path}_4294967294`, resolve))
    await new Promise((resolve) => server.close(resolve))
  })

  test('that somebody else has put in its place is left alone', async () => {
    const device = await open()
    rmSync(path)
    mkdirSync(path)
    await device.close()
    expect(lstatSync(path).isDirectory()).toBe(true)
  })
})

describe('the state of a device', () => {
  test('tells a successor which connections the guest has to hear the end of', async () => {
    await using guest = await FakeGuest.start({ buffers: 16 })
    const program = await guest.listen(1)
    await guest.connect(1000, 1)
    const host = await program()
    await guest.dial('CONNECT 52\n')
    const { srcPort } = await guest.expect(VIRTIO_VSOCK_OP_REQUEST)
    const state = await guest.device.saveState()
    expect(JSON.parse(Buffer.from(state).toString())).toEqual({
      connections: [
        [1, 1000],
        [srcPort, 52],
      ],
    })
    // It has lost nothing by that, should there be no successor after all.
    host.write('still here')
    expect(String((await guest.expect(VIRTIO_VSOCK_OP_RW)).payload)).toBe('still here')

    await using next = await FakeGuest.start()
    await next.device.loadState(state)
    expect(await next.expect(VIRTIO_VSOCK_OP_RST)).toMatchObject({ srcPort: 1, dstPort: 1000 })
    expect(await next.expect(VIRTIO_VSOCK_OP_RST)).toMatchObject({ srcPort, dstPort: 52 })
    // TRANSPORT_RESET, for a driver that gives buffers for events.
    expect(await next.device.give(2, 4)).toEqual(new Uint8Array(4))
    await until(() => next.device.operations['event'] === 1)
  })

  test('an event for a driver that is gone is not told to the next one', async () => {
    await using guest = await FakeGuest.start()
    await guest.device.loadState(Buffer.from('{"connections":[]}'))
    await guest.device.reset()
    guest.forget()
    let told = false
    guest.device.give(2, 4).then(
      () => {
        told = true
      },
      () => {}
    )
    await guest.listen(1)
    await guest.connect(1000, 1)
    expect(told).toBe(false)
  })

  test.each(['null', '{}', '{"connections":[[1]]}', '{"connections":[[1,-2]]}', '{"connections":[[1,4294967296]]}'])(
    'that is none is refused: %s',
    async (text) => {
      await using device = await open()
      await expect(device.loadState(Buffer.from(text))).rejects.toThrow('no state of a vsock')
    }
  )
})

test('qemu-args know the driver', async () => {
  await using device = await open()
  expect(device.device.qemu?.()).toEqual({ driver: 'vhost-user-vsock-pci', properties: {} })
})
