/**
 * What the tests need from the machine beside Node: QEMU, a few file-system tools and a Linux kernel for the guest.
 *
 * Owns the list and the installation: as root on Debian or Ubuntu missing packages are installed with apt-get; elsewhere
 * one sentence says what to install. What only the guest runs (kernel, busybox) is fetched by src/testing, which needs
 * no root.
 *
 * Runs as vitest's globalSetup and as a script: `node test/setup/prerequisites.ts`. Knows nothing of virtiod.
 * VIRTIOD_NO_INSTALL=1 keeps it from changing the machine; VIRTIOD_CACHE_DIR moves the cache (a CI can keep it between
 * clones).
 */
import { mkdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import {
  apt,
  fetchGuestKernel,
  findCommand,
  findGuestFiles,
  type HostTool,
  lockFile,
  missingTools,
} from '../../src/testing/guest-files.ts'

export { findCommand, findGuestFiles, type GuestFiles } from '../../src/testing/guest-files.ts'

/** The checkout. */
export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))

/** Where fetched and built things are kept between runs. */
export const cacheDir = process.env['VIRTIOD_CACHE_DIR'] ?? join(root, 'node_modules', '.cache', 'virtiod')
// The checkout's, whatever the working directory is; child processes of tests inherit it.
process.env['VIRTIOD_CACHE_DIR'] = cacheDir

/** What the guest tests run on the host or copy into the guest. */
export const guestTools: readonly HostTool[] = [
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
export const networkTools: readonly HostTool[] = [
  { command: 'unshare', package: 'util-linux' },
  { command: 'nsenter', package: 'util-linux' },
  { command: 'ip', package: 'iproute2' },
  { command: 'bridge', package: 'iproute2' },
  { command: 'ping', package: 'iputils-ping' },
  { command: 'ethtool', package: 'ethtool' },
  { command: 'iperf3', package: 'iperf3' },
]

/** What the vsock tests need beside the guest's: programs with vsock connections in the guest. */
export const vsockTools: readonly HostTool[] = [{ command: 'socat', package: 'socat' }]

/** What the SCSI tests need beside the guest's: commands of every kind, sent by the guest. */
export const scsiTools: readonly HostTool[] = [
  { command: 'sg_inq', package: 'sg3-utils' },
  { command: 'lsscsi', package: 'lsscsi' },
]

/**
 * What the comparisons need: the C back-end, fio for the plain file's own speed, DPDK as the other end of a network
 * device, and a second reader of captures.
 */
export const peerTools: readonly HostTool[] = [
  { command: 'qemu-storage-daemon', package: 'qemu-system-common' },
  { command: 'fio', package: 'fio' },
  { command: 'dpdk-testpmd', package: 'dpdk-dev' },
  { command: 'tshark', package: 'tshark' },
]

const allTools: readonly HostTool[] = [...guestTools, ...networkTools, ...vsockTools, ...scsiTools, ...peerTools]

/** What is missing, each as words for a sentence; empty when all is there. Looks only. */
export function missingPrerequisites(tools: readonly HostTool[] = allTools): string[] {
  const missing = missingTools(tools)
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
export function whyNoGuest(tools: readonly HostTool[] = guestTools): string | undefined {
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
  using _lock = await lockFile(join(cacheDir, 'prerequisites.lock'))
  // Somebody else may have done it while we waited.
  if (missingPrerequisites().length === 0) return
  const packages = new Set(
    allTools.filter((tool) => findCommand(tool.command) === undefined).map((tool) => tool.package)
  )
  const isRoot = process.getuid?.() === 0
  if (isRoot) await apt(['update', '-q'])
  if (packages.size > 0 && isRoot) {
    say(`installing ${[...packages].join(', ')} (apt-get)`)
    await apt(['install', '-y', '-q', '--no-install-recommends', ...packages])
  }
  await fetchGuestKernel(say)
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

if (import.meta.main) {
  await setup()
  const missing = missingPrerequisites()
  if (missing.length === 0) say('all there')
  process.exitCode = missing.length === 0 ? 0 : 1
}
