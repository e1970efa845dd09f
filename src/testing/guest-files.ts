/**
 * What guests need from the machine: QEMU and tools in PATH, and a Linux kernel with a static busybox, which need no
 * installation: they are downloaded with `apt-get download` (no root) and unpacked into a cache directory. Owns the
 * search, the download and the cache; installs nothing, and knows nothing of virtiod.
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
import { homedir, tmpdir } from 'node:os'
import { dirname, join, resolve } from 'node:path'

/** A program of the host that a test needs. */
export interface HostTool {
  readonly command: string
  /** The Debian package that has it. */
  readonly package: string
}

/** What every guest needs: QEMU itself, and what finds the libraries of the tools that are copied into the guest. */
const GUEST_TOOLS: readonly HostTool[] = [
  { command: 'qemu-system-x86_64', package: 'qemu-system-x86' },
  { command: 'ldd', package: 'libc-bin' },
]

/** The unpacked guest kernel and the static busybox. */
export interface GuestFiles {
  readonly kernelVersion: string
  readonly kernel: string
  /** The directory that has the modules: …/lib/modules/VERSION. */
  readonly modules: string
  readonly busybox: string
}

/**
 * Where the kernel and the guests' file systems are kept: VIRTIOD_CACHE_DIR (a CI can keep it between clones), else
 * node_modules/.cache/virtiod of the project that the working directory is in, else ~/.cache/virtiod.
 */
export function cacheDirectory(): string {
  const given = process.env['VIRTIOD_CACHE_DIR']
  if (given !== undefined && given !== '') return resolve(given)
  for (let dir = process.cwd(); ; dir = dirname(dir)) {
    if (existsSync(join(dir, 'package.json'))) return join(dir, 'node_modules', '.cache', 'virtiod')
    if (dir === dirname(dir)) return join(process.env['XDG_CACHE_HOME'] ?? join(homedir(), '.cache'), 'virtiod')
  }
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

/** The guest's files, if they are all there; the newest kernel when the cache has several. */
export function findGuestFiles(): GuestFiles | undefined {
  const cache = cacheDirectory()
  if (!existsSync(cache)) return undefined
  const busybox = [
    findCommand('busybox'),
    join(cache, 'busybox-static', 'bin', 'busybox'),
    join(cache, 'busybox-static', 'usr', 'bin', 'busybox'),
  ].find((file) => file !== undefined && isStatic(file))
  if (busybox === undefined) return undefined
  const kernels: (GuestFiles & { time: number })[] = []
  for (const name of readdirSync(cache).filter((file) => file.startsWith('linux-image-'))) {
    const dir = join(cache, name)
    const image = existsSync(join(dir, 'boot'))
      ? readdirSync(join(dir, 'boot')).find((file) => file.startsWith('vmlinuz-'))
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

/**
 * What a guest would need and this machine has not, each as words for a sentence; empty when all is there. Looks only.
 * A test skips itself by it: `test('…', { skip: missingPrerequisites().join(', ') }, …)`.
 * @param tools of the host that the test needs besides: those that the guest shall have, for example
 */
export function missingPrerequisites(tools: readonly HostTool[] = []): string[] {
  if (process.platform !== 'linux' || process.arch !== 'x64') {
    return [`Linux on x64 (this is ${process.platform} on ${process.arch})`]
  }
  const missing = missingTools([...GUEST_TOOLS, ...tools])
  if (findGuestFiles() === undefined) missing.push('the guest kernel and busybox (fetchGuestKernel() downloads them)')
  return missing
}

/** Those of `tools` that are not there, as words for a sentence. */
export function missingTools(tools: readonly HostTool[]): string[] {
  return tools
    .filter((tool) => findCommand(tool.command) === undefined)
    .map((tool) => `${tool.command} (package ${tool.package})`)
}

/**
 * Downloads Debian's or Ubuntu's cloud kernel and a static busybox into the cache: some 30 MB, once. Quick when they are
 * there; safe to call from several processes at once.
 * @param say is told what is being done
 * @throws an Error that says what to do, where there is no apt-get or the download fails
 */
export async function fetchGuestKernel(say: (text: string) => void = () => undefined): Promise<GuestFiles> {
  const there = findGuestFiles()
  if (there !== undefined) return there
  if (process.platform !== 'linux' || process.arch !== 'x64') throw new Error('guests need Linux on x64')
  if (findCommand('apt-get') === undefined || findCommand('dpkg') === undefined) {
    throw new Error(
      'the guest kernel comes from Debian or Ubuntu packages, and this machine has no apt-get and dpkg: copy the cache ' +
        `of a machine that has to ${cacheDirectory()}`
    )
  }
  const cache = cacheDirectory()
  mkdirSync(cache, { recursive: true })
  using _lock = await lockFile(join(cache, 'guest-kernel.lock'))
  // Somebody else may have done it while we waited.
  if (findGuestFiles() === undefined) await unpack(cache, await newestKernelPackage(), say)
  if (findGuestFiles() === undefined) await unpack(cache, 'busybox-static', say)
  const files = findGuestFiles()
  if (files === undefined) throw new Error(`the downloaded packages in ${cache} have no kernel, modules and busybox`)
  return files
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
async function unpack(cache: string, name: string, say: (text: string) => void): Promise<void> {
  const target = join(cache, name)
  if (existsSync(target)) return
  say(`fetching ${name} for the guest`)
  // Ubuntu keeps most modules in a package of their own.
  const packages = [
    name,
    ...(/^linux-image-.*-generic$/.test(name) ? [name.replace('linux-image-', 'linux-modules-')] : []),
  ]
  const work = mkdtempSync(join(cache, '.unpack-'))
  try {
    // The download must be a directory that apt's own user can read when we are root; /tmp is, a checkout may not be.
    const download = mkdtempSync(join(tmpdir(), 'virtiod-deb-'))
    try {
      await apt(['download', '-q', '-o', 'APT::Sandbox::User=root', ...packages], download)
      for (const deb of readdirSync(download)) await run('dpkg', ['-x', join(download, deb), work])
    } finally {
      rmSync(download, { recursive: true, force: true })
    }
    renameSync(work, target)
  } finally {
    rmSync(work, { recursive: true, force: true })
  }
}

/** Runs apt-get; it waits for a lock that somebody else holds. @throws an Error with the last lines of its complaint */
export async function apt(args: readonly string[], cwd?: string): Promise<void> {
  await run('apt-get', ['-o', 'DPkg::Lock::Timeout=300', '-o', 'Acquire::Retries=3', ...args], cwd)
}

function run(command: string, args: readonly string[], cwd?: string): Promise<string> {
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive', LC_ALL: 'C' }
  return new Promise((resolve, reject) => {
    const child = execFile(command, args, { cwd, env, maxBuffer: 64 << 20 }, (error, stdout, stderr) => {
      if (error === null) return resolve(stdout)
      const complaint = stderr.trim().split('\n').slice(-3).join(' / ')
      reject(new Error(`${command} ${args.join(' ')} failed: ${complaint}`, { cause: error }))
    })
    child.stdin?.end()
  })
}

/**
 * Waits for an exclusive lock on a file. flock(1) holds it for as long as our end of its standard input is open, so a
 * process that dies, however, leaves no stale lock behind (a file with a pid in it would).
 */
export async function lockFile(path: string): Promise<Disposable> {
  const holder = spawn('flock', [path, 'sh', '-c', 'echo locked; exec cat'], { stdio: ['pipe', 'pipe', 'inherit'] })
  await new Promise<void>((resolve, reject) => {
    holder.once('error', reject)
    holder.once('exit', (code) => reject(new Error(`flock ${path} ended with ${code}`)))
    holder.stdout.once('data', () => resolve())
  })
  return { [Symbol.dispose]: () => holder.stdin.end() }
}
