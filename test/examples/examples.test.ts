/** The files under examples/ work as they stand: a user copies them. */
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import {
  closeSync,
  copyFileSync,
  existsSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, it } from 'vitest'
import { Running } from '../cli/spawn.ts'
import { bootedExitCode, bootSector, exitPort } from '../guest/boot-sector.ts'

const root = fileURLToPath(new URL('../..', import.meta.url))
const main = join(root, 'src/cli/main.ts')
// Not in /tmp, which may be a tmpfs: disks.yaml has a disk with O_DIRECT.
const directory = mkdtempSync('/var/tmp/virtiod-examples-')
afterAll(() => rmSync(directory, { recursive: true, force: true }))

function image(name: string): string {
  const path = join(directory, name)
  closeSync(openSync(path, 'w'))
  truncateSync(path, 64 * 2 ** 20)
  return path
}

function virtiod(...args: string[]): { status: number | null; stdout: string; stderr: string } {
  return spawnSync(process.execPath, [main, ...args], { cwd: directory, encoding: 'utf8' })
}

describe('disks.yaml', () => {
  const config = join(directory, 'disks.yaml')

  it('is a configuration that can be served, once its images are there', () => {
    copyFileSync(join(root, 'examples/disks.yaml'), config)
    expect(virtiod('run', config, '--check-config')).toMatchObject({ status: 2 })
    for (const name of ['root.img', 'data.img', 'media.img']) image(name)
    expect(virtiod('run', config, '--check-config')).toMatchObject({ status: 0, stderr: '' })
    const args = virtiod('qemu-args', config)
    expect(args.status).toBe(0)
    expect(args.stdout.match(/-device/g)).toHaveLength(3)
  })
})

describe('switch.yaml', () => {
  const config = join(directory, 'switch.yaml')
  const example = readFileSync(join(root, 'examples/switch.yaml'), 'utf8')
  // Its port may be taken.
  writeFileSync(config, example.replace('127.0.0.1:9401', '127.0.0.1:0'))
  /** The commands in its comment. */
  const commands = example
    .replaceAll(/^# ?/gm, '')
    .replaceAll(/\\\n\s*/g, '')
    .split('\n')
    .filter((line) => line.startsWith('  qemu-system-x86_64 '))
    .map((line) => line.trim().split(/ +/).slice(1))

  it('needs nothing, and has QEMU lines that say the same', () => {
    expect(virtiod('run', config, '--check-config')).toMatchObject({ status: 0, stderr: '' })
    const printed = virtiod('qemu-args', config)
    expect(printed.status).toBe(0)
    const devices = printed.stdout.match(/(?<=-device )\S+/g) ?? []
    expect(devices).toHaveLength(2)
    const told = commands.map((words) => words[words.indexOf('-device') + 1])
    expect(told).toEqual(devices.map((device) => device.replace(/netdev=[^,]*/, 'netdev=net')))
  })

  it('connects both guests', async () => {
    await using daemon = new Running(['run', config])
    await daemon.printed('"ready"')
    const guests = commands.map((words) =>
      spawn('qemu-system-x86_64', [...words, '-nodefaults', '-display', 'none', '-S'], {
        cwd: directory,
        stdio: 'ignore',
      })
    )
    try {
      for (const name of ['web', 'db']) await daemon.printed(`"device":"${name}","session":`)
      expect(daemon.stdout.match(/"msg":"front-end connected"/g)).toHaveLength(2)
    } finally {
      for (const guest of guests) guest.kill('SIGKILL')
    }
    expect((await daemon.stop()).code).toBe(0)
  })
})

describe('qemu.sh', () => {
  it('boots a guest from an image and leaves nothing behind', () => {
    const disk = image('boot.img')
    const fd = openSync(disk, 'r+')
    const text = 'this is the second sector\n'
    writeSync(fd, bootSector('it boots\n', [{ lba: 1, sectors: 1, address: 0x8000 }]), 0, 512, 0)
    writeSync(fd, Buffer.from(text.padEnd(512, '\0')), 0, 512, 512)
    closeSync(fd)
    const run = spawnSync(
      join(root, 'examples/qemu.sh'),
      [disk, '-nographic', '-no-reboot', '-device', `isa-debug-exit,iobase=${exitPort},iosize=1`],
      {
        encoding: 'utf8',
        timeout: 25_000,
        env: { ...process.env, TMPDIR: directory, ACCEL: 'tcg', VIRTIOD: `${process.execPath} ${main}` },
      }
    )
    expect(run.stdout.replaceAll('\r', '')).toContain(`it boots\n${text}`)
    expect(run.status).toBe(bootedExitCode)
    // Its lock is gone with it, and so are its socket and log.
    expect(execFileSync('ls', [directory], { encoding: 'utf8' })).not.toContain('tmp.')
    expect(virtiod('blk', '--socket-path', 's', '--blk-file', disk, '--check-config').status).toBe(0)
  })
})

describe('systemd', () => {
  const unit = readFileSync(join(root, 'examples/systemd/virtiod-blk@.service'), 'utf8')

  it('calls virtiod with options that it has', () => {
    const [, command = ''] = /^ExecStart=\/usr\/bin\/env virtiod (.*)$/m.exec(unit) ?? []
    const disk = image('web1.img')
    const args = command.replaceAll('/var/lib/virtiod/%i.img', disk).replaceAll('/run/virtiod-%i', directory).split(' ')
    expect(virtiod(...args, '--check-config')).toMatchObject({ status: 0, stderr: '' })
  })

  it.skipIf(!existsSync('/usr/bin/systemd-analyze'))('passes systemd-analyze verify', () => {
    const path = join(directory, 'virtiod-blk@web1.service')
    copyFileSync(join(root, 'examples/systemd/virtiod-blk@.service'), path)
    const run = spawnSync('systemd-analyze', ['verify', '--man=no', path], { encoding: 'utf8' })
    expect(run.stderr.split('\n').filter((line) => line.includes('virtiod'))).toEqual([])
  })
})

describe('libvirt', () => {
  it('shares the memory and attaches a vhost-user disk, in well-formed XML', () => {
    const xml = readFileSync(join(root, 'examples/libvirt/disk.xml'), 'utf8')
    const open: string[] = []
    for (const [, close, name, rest] of xml.replaceAll(/<!--[\s\S]*?-->/g, '').matchAll(/<(\/?)(\w+)([^>]*)>/g)) {
      if (close === '/') expect(open.pop()).toBe(name)
      else if (!rest!.endsWith('/')) open.push(name!)
    }
    expect(open).toEqual([])
    expect(xml).toMatch(/<access mode='shared'\/>/)
    expect(xml).toMatch(/<disk type='vhostuser' device='disk'>/)
  })
})
