/**
 * The devices that come with virtiod: name → how to load it and how to announce it. A new device is one more row here
 * (and its folder under devices/). Modules load on demand: a daemon that serves disks never reads the code of others.
 */
import type { DeviceDefinition } from '../device/index.ts'

export interface DeviceEntry {
  /** One line for `virtiod --help`. */
  readonly summary: string
  /** `--print-capabilities` (vhost-user.rst "Backend program conventions"; QEMU's docs/interop/vhost-user.json). */
  readonly capabilities: { readonly type: string; readonly features?: readonly string[] }
  /** Its command takes several sockets, and serves one device of the same options on each. */
  readonly several?: SeveralSockets
  /** It lives on threads of its own, as a stranger's device would: the file to load there. */
  readonly module?: URL
  /** Imports the device's module, whose default export is its definition. */
  load(): Promise<DeviceDefinition>
}

export interface SeveralSockets {
  /** Only with this option. */
  readonly with: string
  /** Not with these, which are one device's. */
  readonly without: readonly string[]
}

/** The `type` of a device whose module the operator names. */
export const MODULE_TYPE = 'device'

export const devices: Readonly<Record<string, DeviceEntry>> = {
  blk: {
    summary: 'serve a disk: a raw image file or a block device',
    capabilities: { type: 'block', features: ['read-only', 'blk-file'] },
    // A definition of any options and queue data is used as one of unknown ones: only the definition itself looks
    // inside.
    load: async () => (await import('../../devices/blk/index.ts')).default as unknown as DeviceDefinition,
  },
  scsi: {
    summary: 'serve disks behind a SCSI controller: raw image files or block devices, each a logical unit',
    capabilities: { type: 'scsi' },
    load: async () => (await import('../../devices/scsi/index.ts')).default as unknown as DeviceDefinition,
  },
  net: {
    summary: 'serve a network card: on a tap of the host, or on a switch inside virtiod',
    capabilities: { type: 'net' },
    several: { with: 'switch', without: ['mac', 'pcap'] },
    load: async () => (await import('../../devices/net/index.ts')).default as unknown as DeviceDefinition,
  },
  rng: {
    summary: 'serve random numbers, at a limited rate if you like',
    capabilities: { type: 'rng' },
    module: new URL('../../devices/rng/index.ts', import.meta.url),
    load: async () => (await import('../../devices/rng/index.ts')).default as unknown as DeviceDefinition,
  },
  vsock: {
    summary: 'serve connections between programs of the guest and unix sockets of the host',
    capabilities: { type: 'vsock' },
    module: new URL('../../devices/vsock/index.ts', import.meta.url),
    load: async () => (await import('../../devices/vsock/index.ts')).default as unknown as DeviceDefinition,
  },
  input: {
    summary: 'serve a keyboard, mouse or tablet that does what it is told on a control socket',
    capabilities: { type: 'input' },
    module: new URL('../../devices/input/index.ts', import.meta.url),
    load: async () => (await import('../../devices/input/index.ts')).default as unknown as DeviceDefinition,
  },
}

export const deviceNames: readonly string[] = Object.keys(devices)
