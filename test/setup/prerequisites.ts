/**
 * What the tests need from the machine beside Node: QEMU, a few file-system tools and a Linux kernel for the guest.
 *
 * Owns the list, the search, and the installation: as root on Debian or Ubuntu missing packages are installed with
 * apt-get; elsewhere one sentence says what to install. What only the guest runs (kernel, busybox) is never installed:
 * it is fetched with `apt-get download`, which needs no root, and unpacked into a cache directory.
 *
 * Runs as vitest's globalSetup and as a script: `node test/setup/prerequisites.ts`. Knows nothing of virtiod.
 * VIRTIOD_NO_INSTALL=1 keeps it from changing the machine; VIRTIOD_CACHE_DIR moves the cache (a CI can keep it between
 * clones).
 */
import { execFile, spawn } from 'node:child_process'
import {
  accessSync,
  constants,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

/** The checkout. */
export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))

/** Where fetched and built things are kept between runs. */
export const cacheDir = process.env['VIRTIOD_CACHE_DIR'] ?? join(root, 'node_modules', '.cache', 'virtiod')

interface Tool {
  readonly command: string
  /** The Debian package that has it. */
  readonly package: string
}

/** What the guest tests run on the host or copy into the guest. */
export const guestTools: readonly Tool[] = [
  { command: 'qemu-system-x86_64', package: 'qemu-system-x86' },
  { command: 'mke2fs', package: 'e2fsprogs' },
  { command: 'e2fsck', package: 'e2fsprogs' },
  { command: 'sfdisk', package: 'fdisk' },
  { command: 'blkid', package: 'util-linux' },
  { command: 'blkdiscard', package: 'util-linux' },
  { command: 'fstrim', package: 'util-linux' },
  { command: 'ldd', package: 'libc-bin' },
]

/** What the network tests need beside that: namespaces of their own, and traffic. */
export const networkTools: readonly Tool[] = [
  { command: 'unshare', package: 'util-linux' },
  { command: 'nsenter', package: 'util-linux' },
  { command: 'ip', package: 'iproute2' },
  { command: 'bridge', package: 'iproute2' },
  { command: 'ping', package: 'iputils-ping' },
  { command: 'ethtool', package: 'ethtool' },
  { command: 'iperf3', package: 'iperf3' },
]

/**
 * What the comparisons need: the C back-end, fio for the plain file's own speed, DPDK as the other end of a network
 * device, and a second reader of captures.
 */
export const peerTools: readonly Tool[] = [
  { command: 'qemu-storage-daemon', package: 'qemu-system-common' },
  { command: 'fio', package: 'fio' },
  { command: 'dpdk-testpmd', package: 'dpdk-dev' },
  { command: 'tshark', package: 'tshark' },
]

const allTools: readonly Tool[] = [...guestTools, ...networkTools, ...peerTools]

/** The unpacked guest kernel and the static busybox. */
export interface GuestFiles {
  readonly kernelVersion: string
  readonly kernel: string
  /** The directory that has the modules: …/lib/modules/VERSION. */
  readonly modules: string
  readonly busybox: string
}

/** The path of a command, looked up in PATH and in the system directories that a user's PATH leaves out. */
export function findCommand(command: string): string | undefined {
  const path = `${process.env['PATH'] ?? ''}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin`
  for (const dir of path.split(':')) {
    if (dir === '') continue
    const file = join(dir, command)
    try {
      accessSync(file, constants.X_OK)
      if (statSync(file).isFile()) return file
    } catch {
      // not here
    }
  }
  return undefined
}

/** The guest's files, if the cache is complete; the newest kernel when there are several. */
export function findGuestFiles(): GuestFiles | undefined {
  if (!existsSync(cacheDir)) return undefined
  const unpacked = readdirSync(cacheDir)
    .filter((name) => name.startsWith('linux-image-'))
    .map((name) => join(cacheDir, name))
  const busybox = [
    findCommand('busybox'),
    join(cacheDir, 'busybox-static', 'bin', 'busybox'),
    join(cacheDir, 'busybox-static', 'usr', 'bin', 'busybox'),
  ].find((file) => file !== undefined && isStatic(file))
  if (busybox === undefined) return undefined
  const kernels: (GuestFiles & { time: number })[] = []
  for (const dir of unpacked) {
    const image = existsSync(join(dir, 'boot'))
      ? readdirSync(join(dir, 'boot')).find((n) => n.startsWith('vmlinuz-'))
      : undefined
    if (image === undefined) continue
    const kernelVersion = image.slice('vmlinuz-'.length)
    const modules = ['lib', 'usr/lib']
      .map((lib) => join(dir, lib, 'modules', kernelVersion))
      .find((path) => existsSync(path))
    if (modules === undefined) continue
    kernels.push({ kernelVersion, kernel: join(dir, 'boot', image), modules, busybox, time: statSync(dir).mtimeMs })
  }
  return kernels.sort((a, b) => b.time - a.time)[0]
}

/** What is missing, each as words for a sentence; empty when all is there. Looks only. */
export function missingPrerequisites(tools: readonly Tool[] = allTools): string[] {
  const missing = tools
    .filter((tool) => findCommand(tool.command) === undefined)
    .map((tool) => `${tool.command} (package ${tool.package})`)
  if (tools.some((tool) => tool.command === 'qemu-system-x86_64') && findGuestFiles() === undefined) {
    missing.push(
      'the guest kernel and busybox (packages linux-image-cloud-amd64 and busybox-static, unpacked in the cache)'
    )
  }
  return missing
}

/**
 * Why the guest tests cannot run here, or undefined when they can. In CI (CI=true) that is an error instead: a test
 * that did not run must not look like one that passed.
 */
export function whyNoGuest(tools: readonly Tool[] = guestTools): string | undefined {
  const reason =
    process.arch !== 'x64' || process.platform !== 'linux'
      ? `the guest tests need Linux on x64, this is ${process.platform} on ${process.arch}`
      : sentence(missingPrerequisites(tools))
  if (reason === undefined) return undefined
  if (isCi()) throw new Error(`the guest tests cannot run: ${reason}`)
  process.stderr.write(`\nSKIPPED: the guest tests: ${reason}\n\n`)
  return reason
}

/** True where a missing prerequisite is a failure. */
export function isCi(): boolean {
  return ['1', 'true'].includes(process.env['CI'] ?? '')
}

/**
 * Installs and fetches what is missing, as far as it may. Quick when there is nothing to do; safe to run twice at
 * once.
 */
export async function ensurePrerequisites(): Promise<void> {
  if (process.platform !== 'linux' || process.arch !== 'x64') return
  if (missingPrerequisites().length === 0 || process.env['VIRTIOD_NO_INSTALL'] === '1' || !isDebian()) return
  mkdirSync(cacheDir, { recursive: true })
  const release = await lock(join(cacheDir, 'prerequisites.lock'))
  try {
    // Somebody else may have done it while we waited.
    if (missingPrerequisites().length === 0) return
    const packages = new Set(
      allTools.filter((tool) => findCommand(tool.command) === undefined).map((tool) => tool.package)
    )
    const isRoot = process.getuid?.() === 0
    if (isRoot) await apt('apt-get', ['update', '-q'])
    if (packages.size > 0 && isRoot) {
      say(`installing ${[...packages].join(', ')} (apt-get)`)
      await apt('apt-get', ['install', '-y', '-q', '--no-install-recommends', ...packages])
    }
    if (findGuestFiles() === undefined) {
      await unpack(await newestKernelPackage())
      if (findGuestFiles() === undefined) await unpack('busybox-static')
    }
  } finally {
    release()
  }
}

/** vitest's globalSetup. Never fails outside CI: the tests that need something missing skip themselves and say so. */
export default async function setup(): Promise<void> {
  let failure: unknown
  try {
    await ensurePrerequisites()
  } catch (error) {
    failure = error
  }
  const missing = sentence(missingPrerequisites())
  if (missing !== undefined && isCi()) throw new Error(missing, { cause: failure })
  if (missing !== undefined) say(missing)
  if (failure !== undefined) say(`could not set it up: ${failure instanceof Error ? failure.message : String(failure)}`)
}

function sentence(missing: readonly string[]): string | undefined {
  if (missing.length === 0) return undefined
  const absent = new Set(allTools.filter((tool) => findCommand(tool.command) === undefined).map((tool) => tool.package))
  const install = absent.size > 0 ? `apt-get install ${[...absent].join(' ')}` : ''
  const fetch = findGuestFiles() === undefined ? 'node test/setup/prerequisites.ts' : ''
  const commands = [install, fetch].filter((command) => command !== '').join(' && ')
  return `missing: ${missing.join(', ')}; on Debian or Ubuntu run: ${commands}`
}

function say(text: string): void {
  process.stderr.write(`prerequisites: ${text}\n`)
}

function isDebian(): boolean {
  return findCommand('apt-get') !== undefined && findCommand('dpkg') !== undefined
}

/** An ELF file without PT_INTERP (program header type 3). */
function isStatic(file: string): boolean {
  if (!existsSync(file)) return false
  const elf = readFileSync(file)
  if (elf.length < 64 || elf.readUInt32BE(0) !== 0x7f454c46 || elf[4] !== 2) return false
  const table = Number(elf.readBigUInt64LE(32))
  const entrySize = elf.readUInt16LE(54)
  const count = elf.readUInt16LE(56)
  for (let i = 0; i < count; i++) if (elf.readUInt32LE(table + i * entrySize) === 3) return false
  return true
}

/**
 * linux-image-cloud-amd64 is an empty package that depends on the kernel of the day (Ubuntu's is linux-image-virtual).
 */
async function newestKernelPackage(): Promise<string> {
  for (const meta of ['linux-image-cloud-amd64', 'linux-image-virtual', 'linux-image-amd64']) {
    const text = await run('apt-cache', ['depends', meta]).catch(() => '')
    const concrete = /Depends: (linux-image-\d\S*)/.exec(text)?.[1]
    if (concrete !== undefined) return concrete
  }
  throw new Error('apt-cache knows no linux-image-cloud-amd64; run apt-get update as root')
}

/** Downloads a package and unpacks it as CACHE/PACKAGE; the directory appears in one step, complete. */
async function unpack(name: string): Promise<void> {
  const target = join(cacheDir, name)
  if (existsSync(target)) return
  say(`fetching ${name} for the guest`)
  // Ubuntu keeps most modules in a package of their own.
  const packages = [
    name,
    ...(/^linux-image-.*-generic$/.test(name) ? [name.replace('linux-image-', 'linux-modules-')] : []),
  ]
  const work = mkdtempSync(join(cacheDir, '.unpack-'))
  try {
    // The download must be a directory that apt's own user can read when we are root; /tmp is, a checkout may not be.
    const download = mkdtempSync(join(tmpdir(), 'virtiod-deb-'))
    try {
      await apt('apt-get', ['download', '-q', '-o', 'APT::Sandbox::User=root', ...packages], download)
      for (const deb of readdirSync(download)) await run('dpkg', ['-x', join(download, deb), work])
    } finally {
      rmSync(download, { recursive: true, force: true })
    }
    renameSync(work, target)
  } finally {
    rmSync(work, { recursive: true, force: true })
  }
}

async function apt(command: string, args: string[], cwd?: string): Promise<void> {
  await run(command, ['-o', 'DPkg::Lock::Timeout=300', '-o', 'Acquire::Retries=3', ...args], cwd)
}

function run(command: string, args: string[], cwd?: string): Promise<string> {
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive', LC_ALL: 'C' }
  return new Promise((resolve, reject) => {
    const child = execFile(command, args, { cwd, env, maxBuffer: 64 << 20 }, (error, stdout, stderr) => {
      if (error === null) resolve(stdout)
      else
        reject(
          new Error(`${command} ${args.join(' ')} failed: ${stderr.trim().split('\n').slice(-3).join(' / ')}`, {
            cause: error,
          })
        )
    })
    child.stdin?.end()
  })
}

/**
 * Waits for an exclusive lock on a file and returns what releases it. flock(1) holds it for as long as our end of its
 * standard input is open, so a process that dies, however, leaves no stale lock behind (a file with a pid in it would).
 */
async function lock(path: string): Promise<() => void> {
  const holder = spawn('flock', [path, 'sh', '-c', 'echo locked; exec cat'], { stdio: ['pipe', 'pipe', 'inherit'] })
  await new Promise<void>((resolve, reject) => {
    holder.once('error', reject)
    holder.once('exit', (code) => reject(new Error(`flock ${path} ended with ${code}`)))
    holder.stdout.once('data', () => resolve())
  })
  return () => holder.stdin.end()
}

if (import.meta.main) {
  await setup()
  const missing = missingPrerequisites()
  if (missing.length === 0) say('all there')
  process.exitCode = missing.length === 0 ? 0 : 1
}
