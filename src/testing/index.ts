/**
 * `virtiod/testing`: what tests of a device need, in four sizes. None of it is loaded by the daemon, and any test runner
 * will do.
 *
 * - {@link testDevice}: the device alone, on plain buffers: no socket, no thread, no addon;
 * - {@link startVirtiod}: virtiod as a process, serving the device on a socket;
 * - {@link connect}: a front-end for that socket, which does requests as a guest's driver would;
 * - {@link startGuest}: a Linux guest in QEMU, whose own driver uses the device.
 */

export { FrontendError, type FrontendFailure } from '../frontend/errors.ts'
export {
  runVirtiod,
  startVirtiod,
  type VirtiodEnd,
  VirtiodError,
  type VirtiodOptions,
  type VirtiodProcess,
  type VirtiodResult,
} from './daemon.ts'
export {
  connect,
  type FrontEnd,
  type FrontEndOptions,
  type PendingRequest,
} from './front-end.ts'
export {
  type CommandResult,
  type Guest,
  GuestError,
  type GuestOptions,
  type GuestResult,
  runGuest,
  startGuest,
  vhostUserArgs,
} from './guest.ts'
export {
  cacheDirectory,
  fetchGuestKernel,
  findGuestFiles,
  type GuestFiles,
  type HostTool,
  missingPrerequisites,
} from './guest-files.ts'
export type { GuestKind, InitramfsOptions } from './initramfs.ts'
export { type TestDevice, type TestDeviceOptions, testDevice } from './plain.ts'
export type { LogLine } from './plain-host.ts'
export { type Reply, UNTOUCHED } from './reply.ts'
