/**
 * The guest's user space: an initramfs of busybox, tools of this machine with the libraries they need, and kernel modules,
 * as the test asks for them. Owns module order and /init; knows nothing of QEMU.
 *
 * The archive is built once and cached under a key of everything that goes into it. What differs per boot (script, files)
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
import { type CpioEntry, cpio } from './cpio.ts'
import { cacheDirectory, findCommand, findGuestFiles, type GuestFiles } from './guest-files.ts'

/**
 * What the guest has at least: `bare` = busybox and the PCI transport; `disk` = virtio_blk, ext4 and the tools for file
 * systems and partitions; `network` = virtio_net, ip, ethtool and iperf3.
 */
export type GuestKind = 'bare' | 'disk' | 'network'

export interface InitramfsOptions {
  /** Default: `bare`. */
  readonly kind?: GuestKind
  /** Programs of this machine to have in the guest besides, by name; they come with their shared libraries. */
  readonly tools?: readonly string[]
  /**
   * Kernel modules to load besides, by name, in this order; those that they depend on come first. One that the kernel has
   * built in needs no loading.
   */
  readonly modules?: readonly string[]
}

interface Contents {
  /** Tools that busybox has not, or has in a simpler version. */
  readonly tools: readonly string[]
  /** Roots of the module tree. One that this kernel has not is left out: a checksum may have no faster version. */
  readonly modules: readonly string[]
}

const contents: Readonly<Record<GuestKind, Contents>> = {
  bare: { tools: [], modules: ['virtio_pci'] },
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

/**
 * The path of the base archive, built when there is none for this content yet.
 * @throws an Error when a tool or a module is missing
 */
export function initramfs(options: InitramfsOptions = {}, guest: GuestFiles | undefined = findGuestFiles()): string {
  if (guest === undefined) throw new Error('there is no guest kernel: fetchGuestKernel() downloads one')
  const base = contents[options.kind ?? 'bare']
  const tools = [...new Set([...base.tools, ...(options.tools ?? [])])]
  // Debian's busybox shell takes its own applet before a program in PATH; a function comes before both. (It has no
  // functions like mkfs.ext4: of such a name busybox's own comes first.)
  const prelude = tools
    .filter((tool) => /^\w+$/.test(tool))
    .map((tool) => `${tool}() { /bin/${tool} "$@"; }\n`)
    .join('')
  const moduleFiles = orderModules(guest, base.modules, options.modules ?? [])
  const programs = tools.map((tool) => {
    const path = findCommand(tool)
    if (path === undefined) throw new Error(`${tool}, which the guest shall have, is not installed here`)
    return path
  })
  const libraries = [...new Set(programs.flatMap(sharedLibraries))]
  const files = [guest.busybox, ...programs, ...libraries, ...moduleFiles]
  const hash = createHash('sha256').update(JSON.stringify([init, prelude, guest.kernelVersion, buildVersion]))
  for (const file of files) {
    const stat = statSync(file)
    hash.update(`${file} ${stat.size} ${stat.mtimeMs}\n`)
  }
  const cacheDir = cacheDirectory()
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

/**
 * The module files to load, dependencies first. Read from the modules' own `depends=` and `softdep=pre:` words rather
 * than from modules.dep: the package ships none, and depmod is one more thing to install.
 */
function orderModules(guest: GuestFiles, optional: readonly string[], required: readonly string[]): string[] {
  const files = new Map<string, string>()
  for (const file of readdirSync(guest.modules, { recursive: true, encoding: 'utf8' })) {
    if (/\.ko(\.[a-z0-9]+)?$/.test(file)) files.set(plainName(file), join(guest.modules, file))
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
    for (const other of [...depends, ...soft]) visit(plainName(other.trim()))
    order.push(file)
  }
  for (const name of [...optional, ...required]) visit(plainName(name))
  for (const name of required) {
    if (seen.has(plainName(name)) || isBuiltIn(guest, plainName(name))) continue
    throw new Error(`the guest kernel ${guest.kernelVersion} has no module ${name}`)
  }
  return order
}

/** The package's list of what is part of the kernel. One without a list: whatever is no module is taken for built in. */
function isBuiltIn(guest: GuestFiles, name: string): boolean {
  const list = join(guest.modules, 'modules.builtin')
  if (!existsSync(list)) return true
  return readFileSync(list, 'utf8')
    .split('\n')
    .some((file) => plainName(file) === name)
}

/** As the kernel calls it, whatever its file is called: `kernel/drivers/virtio-rng.ko.xz` is virtio_rng. */
function plainName(file: string): string {
  return moduleName(file).replace(/\.ko$/, '').replaceAll('-', '_')
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
