/** QEMU starts with what `virtiod qemu-args` prints, for every device of ours and for a module, and connects to each. */
import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { runVirtiod, startVirtiod } from 'virtiod/testing'
import { afterAll, expect, test } from 'vitest'
import { findCommand, whyNoGuest } from '../setup/prerequisites.ts'

const directory = mkdtempSync(join(tmpdir(), 'virtiod-qemu-args-'))
afterAll(() => rmSync(directory, { recursive: true, force: true }))

const image = (name: string): string => {
  const path = join(directory, name)
  writeFileSync(path, '')
  truncateSync(path, 1 << 20)
  return path
}

/** Not among them: input, which QEMU before 8.0 refuses without KVM (input.test.ts). */
const devices = [
  { type: 'blk', 'blk-file': image('blk.img') },
  { type: 'net', switch: 'args' },
  { type: 'scsi', lun: [image('scsi.img')] },
  { type: 'rng' },
  { type: 'vsock', 'guest-cid': 77, 'uds-path': join(directory, 'vm') },
  { type: 'device', module: fileURLToPath(new URL('../../examples/devices/computed-disk.ts', import.meta.url)) },
].map((device, index) => ({
  name: `${device.type}-${index}`,
  'socket-path': join(directory, `${index}.sock`),
  ...device,
}))

test.skipIf(whyNoGuest() !== undefined)('QEMU starts with the arguments of all devices', async () => {
  const file = join(directory, 'all.json')
  writeFileSync(file, JSON.stringify({ devices }))
  await using daemon = await startVirtiod(['run', file], {})
  const printed = runVirtiod(['qemu-args', file, '--memory', '128M'])
  expect(printed.stderr).toBe('')
  const args = printed.stdout.replaceAll('\\\n', ' ').trim().split(/\s+/)
  const machine = ['-S', '-display', 'none', '-accel', 'tcg', '-monitor', 'stdio', '-nodefaults']
  const qemu = spawn(findCommand('qemu-system-x86_64')!, [...machine, ...args], { stdio: ['pipe', 'ignore', 'pipe'] })
  let complaints = ''
  qemu.stderr.on('data', (text: Buffer) => {
    complaints += text.toString()
  })
  const ended = new Promise<number | null>((resolve) => qemu.on('close', resolve))
  try {
    const connected = devices.map(({ name }) => daemon.printed(new RegExp(`"device":"${name}".*front-end connected`)))
    await Promise.race([Promise.all(connected), ended])
    qemu.stdin.write('quit\n')
    expect(await ended, complaints).toBe(0)
    await Promise.all(connected)
  } finally {
    qemu.kill('SIGKILL')
  }
})
