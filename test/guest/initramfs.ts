/**
 * The guest's user space: an initramfs of busybox, the real tools of this machine with the libraries they need, and the
 * kernel modules: for a virtio disk with ext4, or for a virtio network card. Owns the cpio format, module order and
 * /init; knows nothing of QEMU.
 *
 * The archive is built once and cached under a key of everything that goes into it. What differs per boot (the script)
 * is a second small cpio: the kernel unpacks concatenated archives one after the other.
 */
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { basename, join } from 'node:path'
import { cacheDir, findCommand, findGuestFiles, type GuestFiles } from '../setup/prerequisites.ts'

/** What the guest is for. One archive for all would cost each boot the unpacking of what it doesn't use. */
export type GuestKind = 'disk' | 'network'

interface Contents {
  /** Tools that busybox has not, or has in a simpler version. */
  readonly tools: readonly string[]
  /**
   * Roots of the module tree; their dependencies come first. A name that the kernel has built in, or has not, is left
   * out.
   */
  readonly modules: readonly string[]
}

const contents: Readonly<Record<GuestKind, Contents>> = {
  disk: {
    tools: ['mke2fs', 'e2fsck', 'sfdisk', 'blkid', 'blkdiscard', 'fstrim'],
    modules: ['crc32c_intel', 'virtio_pci', 'virtio_blk', 'ext4'],
  },
  network: { tools: ['ip', 'ethtool', 'iperf3'], modules: ['virtio_pci', 'virtio_net'] },
}

/** The ports: kernel messages go to the first one, the script's input and output to the second one, undisturbed. */
export const scriptPort = '/dev/ttyS1'

/**
 * Lines that /init and the host exchange on the script's port; they are not part of the output, nor is the line feed
 * before the end marker (the last line of the output may lack its own).
 */
export const marker = { begin: '@@virtiod-begin', end: '@@virtiod-end', run: '@@virtiod-run' }

/**
 * PID 1. /script there: runs it with the port as its standard input and output, reports its exit code and powers off.
 * No /script: a loop that takes commands from the port, each ended by a line with the run marker.
 */
const init = `#!/bin/sh
export PATH=/bin HOME=/ LC_ALL=C
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /mnt /tmp /run
mount -t tmpfs tmp /tmp
while read -r module; do insmod "/modules/$module" || echo "insmod $module failed"; done < /modules/order
exec < ${scriptPort} > ${scriptPort} 2>&1
stty raw -echo
echo ${marker.begin}
if [ -e /script ]; then
  sh -c '. /prelude; . /script'
  printf '\\n%s\\n' "${marker.end} $?"
else
  : > /tmp/command
  while IFS= read -r line; do
    if [ "$line" = ${marker.run} ]; then
      sh -c '. /prelude; . /tmp/command' < /dev/null
      printf '\\n%s\\n' "${marker.end} $?"
      : > /tmp/command
    else
      printf '%s\\n' "$line" >> /tmp/command
    fi
  done
fi
# The port drains before the machine goes.
sync
poweroff -f
`

/** The path of the base archive, built when there is none for this content yet. */
export function initramfs(kind: GuestKind = 'disk', guest: GuestFiles | undefined = findGuestFiles()): string {
  if (guest === undefined) throw new Error('no guest kernel; run: node test/setup/prerequisites.ts')
  const { tools, modules } = contents[kind]
  // Debian's busybox shell takes its own applet before a program in PATH; a function comes before both.
  const prelude = tools.map((tool) => `${tool}() { /bin/${tool} "$@"; }\n`).join('')
  const moduleFiles = orderModules(guest.modules, modules)
  const programs = tools.map((tool) => {
    const path = findCommand(tool)
    if (path === undefined) throw new Error(`${tool} is missing; run: node test/setup/prerequisites.ts`)
    return path
  })
  const libraries = [...new Set(programs.flatMap(sharedLibraries))]
  const files = [guest.busybox, ...programs, ...libraries, ...moduleFiles]
  const hash = createHash('sha256').update(JSON.stringify([init, prelude, guest.kernelVersion, buildVersion]))
  for (const file of files) {
    const stat = statSync(file)
    hash.update(`${file} ${stat.size} ${stat.mtimeMs}\n`)
  }
  const path = join(cacheDir, `initramfs-${hash.digest('hex').slice(0, 16)}.cpio`)
  if (existsSync(path)) return path

  const entries: CpioEntry[] = ['bin', 'lib64', 'proc', 'sys', 'dev', 'modules'].map((name) => ({
    name,
    directory: true,
  }))
  // PID 1's standard streams, before devtmpfs is there.
  entries.push({ name: 'dev/console', device: [5, 1] })
  entries.push({ name: 'init', data: init, mode: 0o755 })
  entries.push({ name: 'prelude', data: prelude })
  entries.push({ name: 'bin/busybox', data: readFileSync(guest.busybox), mode: 0o755 })
  for (const applet of execFileSync(guest.busybox, ['--list'], { encoding: 'utf8' }).split('\n')) {
    if (applet !== '' && applet !== 'busybox' && !tools.includes(applet))
      entries.push({ name: `bin/${applet}`, link: 'busybox' })
  }
  for (const program of programs)
    entries.push({ name: `bin/${basename(program)}`, data: readFileSync(program), mode: 0o755 })
  const directories = new Set(entries.filter((entry) => 'directory' in entry).map((entry) => entry.name))
  for (const library of libraries) {
    const name = library.slice(1)
    for (let i = name.indexOf('/'); i >= 0; i = name.indexOf('/', i + 1)) {
      const directory = name.slice(0, i)
      if (!directories.has(directory)) entries.push({ name: directory, directory: true })
      directories.add(directory)
    }
    entries.push({ name, data: readFileSync(realpathSync(library)), mode: 0o755 })
  }
  for (const module of moduleFiles) entries.push({ name: `modules/${moduleName(module)}`, data: readModule(module) })
  entries.push({ name: 'modules/order', data: moduleFiles.map((file) => `${moduleName(file)}\n`).join('') })

  mkdirSync(cacheDir, { recursive: true })
  // Old ones go; a young one may be another process's.
  for (const name of readdirSync(cacheDir).filter((file) => /^initramfs-.*\.cpio$/.test(file))) {
    const old = join(cacheDir, name)
    if (Date.now() - statSync(old).mtimeMs > 86_400_000) rmSync(old, { force: true })
  }
  const work = `${path}.${process.pid}`
  writeFileSync(work, cpio(entries))
  renameSync(work, path)
  return path
}

/** Change it when this file builds something else from the same ingredients. */
const buildVersion = 1

/** One thing in an archive. */
export type CpioEntry = { readonly name: string } & (
  | { readonly data: string | Uint8Array; readonly mode?: number }
  | { readonly directory: true }
  | { readonly link: string }
  | { readonly device: readonly [major: number, minor: number] }
)

/**
 * A cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst), padded to 512
 * bytes.
 */
export function cpio(entries: readonly CpioEntry[]): Buffer {
  const parts: Buffer[] = []
  let size = 0
  let inode = 1
  const push = (part: Buffer, align: number): void => {
    const padding = -part.length & (align - 1)
    parts.push(part, Buffer.alloc(padding))
    size += part.length + padding
  }
  const add = (name: string, mode: number, data: Buffer, device: readonly [number, number] = [0, 0]): void => {
    const fields = [inode++, mode, 0, 0, 1, 0, data.length, 0, 0, device[0], device[1], name.length + 1, 0]
    const header = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}${name}\0`
    push(Buffer.from(header, 'latin1'), 4)
    push(data, 4)
  }
  for (const entry of entries) {
    if ('directory' in entry) add(entry.name, 0o040755, Buffer.alloc(0))
    else if ('link' in entry) add(entry.name, 0o120777, Buffer.from(entry.link))
    else if ('device' in entry) add(entry.name, 0o020600, Buffer.alloc(0), entry.device)
    else add(entry.name, 0o100000 | (entry.mode ?? 0o644), Buffer.from(entry.data))
  }
  add('TRAILER!!!', 0, Buffer.alloc(0))
  push(Buffer.alloc(-size & 511), 1)
  return Buffer.concat(parts)
}

/**
 * The module files to load, dependencies first. Read from the modules' own `depends=` and `softdep=pre:` words rather
 * than from modules.dep: the package ships none, and depmod is one more thing to install.
 */
function orderModules(directory: string, roots: readonly string[]): string[] {
  const files = new Map<string, string>()
  for (const file of readdirSync(directory, { recursive: true, encoding: 'utf8' })) {
    if (/\.ko(\.[a-z0-9]+)?$/.test(file))
      files.set(moduleName(file).replace(/\.ko$/, '').replaceAll('-', '_'), join(directory, file))
  }
  const order: string[] = []
  const seen = new Set<string>()
  const visit = (name: string): void => {
    const file = files.get(name)
    if (file === undefined || seen.has(name)) return
    seen.add(name)
    const text = readModule(file).toString('latin1')
    const depends = /\0depends=([^\0]*)\0/.exec(text)?.[1]?.split(',') ?? []
    const soft = [...text.matchAll(/\0softdep=pre: ?([^\0]*)\0/g)].flatMap((match) => match[1]?.split(' ') ?? [])
    for (const other of [...depends, ...soft]) visit(other.trim().replaceAll('-', '_'))
    order.push(file)
  }
  for (const name of roots) visit(name)
  return order
}

function moduleName(file: string): string {
  return basename(file).replace(/\.(xz|zst|gz)$/, '')
}

/** Debian 12 ships plain modules, later ones compressed. */
function readModule(file: string): Buffer {
  const unpackers: Record<string, string> = { '.xz': 'xz', '.zst': 'zstd', '.gz': 'gzip' }
  const unpacker = unpackers[/\.[a-z0-9]+$/.exec(file)?.[0] ?? '']
  return unpacker === undefined ? readFileSync(file) : execFileSync(unpacker, ['-dc', file], { maxBuffer: 64 << 20 })
}

/** The libraries that the loader would map, at the paths where it looks for them, and the loader itself. */
function sharedLibraries(program: string): string[] {
  const ldd = findCommand('ldd') ?? 'ldd'
  return [...execFileSync(ldd, [program], { encoding: 'utf8' }).matchAll(/(?:=> |^\t)(\/\S+) \(0x/gm)].map(
    (match) => match[1] ?? ''
  )
}
