/**
 * The guest of virtiod/testing: what a test can put into it, and how it fails. Our other guest tests use the rest of it.
 */

import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { createServer, type Server } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  fetchGuestKernel,
  findGuestFiles,
  type Guest,
  missingPrerequisites,
  runGuest,
  startGuest,
  vhostUserArgs,
} from 'virtiod/testing'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { qemuForInput } from '../guest/qemu-copy.ts'
import { findCommand, whyNoGuest } from '../setup/prerequisites.ts'

test('the words that attach a device', () => {
  const [chardev, socket, device, card] = vhostUserArgs('/tmp/a,b.sock', 'vhost-user-rng-pci', { 'max-bytes': 64 })
  expect([chardev, device]).toEqual(['-chardev', '-device'])
  const id = /^socket,id=(\w+),path=\/tmp\/a,,b\.sock$/.exec(socket ?? '')?.[1]
  expect(card).toBe(`vhost-user-rng-pci,chardev=${id},max-bytes=64`)
  expect(vhostUserArgs('/tmp/other.sock', 'x')[1]).not.toContain(`id=${id},`)
})

test.skipIf(whyNoGuest() !== undefined)(
  'a QEMU that does not ask for KVM is the one in PATH, or differs in two jumps',
  () => {
    const path = qemuForInput()
    expect(qemuForInput()).toBe(path)
    expect(execFileSync(path, ['--version'], { encoding: 'utf8' })).toContain('QEMU emulator')
    const [original, changed] = [findCommand('qemu-system-x86_64')!, path].map((file) => readFileSync(file))
    let differences = 0
    for (let i = 0; i < original!.length; i++) if (original![i] !== changed![i]) differences++
    expect(differences).toBeLessThanOrEqual(4)
    expect(changed).toHaveLength(original!.length)
  }
)

describe.skipIf(whyNoGuest() !== undefined)('a guest', { timeout: 60_000 }, () => {
  let guest: Guest

  beforeAll(async () => {
    guest = await startGuest({
      qemuArgs: [],
      tools: ['blkid'],
      modules: ['evdev', 'virtio-rng', 'virtio_pci'],
      files: { '/opt/here/hello': '#!/bin/sh\necho "hello, $1"\n', '/etc/issue': 'nothing\n' },
    })
  }, 60_000)
  afterAll(async () => guest?.kill())

  test('has the files, tools and modules that it was given, and not the disk guests’', async () => {
    expect(await guest.sh('/opt/here/hello you; cat /etc/issue')).toBe('hello, you\nnothing')
    expect(await guest.sh('blkid -V')).toContain('util-linux')
    expect(await guest.sh('lsmod')).toMatch(/^virtio_rng .*\nevdev /m)
    expect((await guest.run('lsmod | grep virtio_blk')).exitCode).not.toBe(0)
  })

  test('tells the exit code, and why a script that must not fail has failed', async () => {
    expect(await guest.run('echo before; exit 3')).toEqual({ exitCode: 3, output: 'before' })
    await expect(guest.sh('echo some; false; echo other')).rejects.toThrow(/exit code 1 of:[\s\S]*\nsome\n/)
  })
})

describe.skipIf(whyNoGuest() !== undefined)('a guest that cannot be started', () => {
  const dir = mkdtempSync(join(tmpdir(), 'virtiod-testing-'))
  let deaf: Server
  beforeAll(async () => {
    deaf = createServer((socket) => socket.destroy())
    await new Promise<void>((resolve) => deaf.listen(join(dir, 's'), resolve))
  })
  afterAll(() => {
    deaf.close()
    rmSync(dir, { recursive: true, force: true })
  })

  test.each([
    [{ tools: ['no-such-tool'] }, 'no-such-tool, which the guest shall have, is not installed here'],
    [{ modules: ['no_such_module'] }, /the guest kernel \S+ has no module no_such_module/],
    [{ qemuArgs: ['-device', 'no-such-device'] }, /QEMU did not start[\s\S]*no-such-device/],
  ])('says why: %o', async (options, message) => {
    await expect(startGuest({ qemuArgs: [], ...options })).rejects.toThrow(message)
  })

  test('because the device hangs up', async () => {
    const qemuArgs = vhostUserArgs(join(dir, 's'), 'vhost-user-rng-pci')
    await expect(runGuest({ qemuArgs, script: 'true' })).rejects.toThrow('QEMU did not start')
  })

  test('for want of a kernel', async () => {
    const before = process.env['VIRTIOD_CACHE_DIR']
    process.env['VIRTIOD_CACHE_DIR'] = dir
    try {
      expect(findGuestFiles()).toBeUndefined()
      expect(missingPrerequisites()).toEqual([expect.stringContaining('fetchGuestKernel()')])
      expect(missingPrerequisites([{ command: 'no-such-tool', package: 'nothing' }])).toContain(
        'no-such-tool (package nothing)'
      )
      await expect(startGuest({ qemuArgs: [] })).rejects.toThrow('for want of the guest kernel')
    } finally {
      process.env['VIRTIOD_CACHE_DIR'] = before
    }
    expect(missingPrerequisites()).toEqual([])
    expect(await fetchGuestKernel()).toEqual(findGuestFiles())
  })
})
