/** The commands of virtiod, in the order of the help. */
import { devices } from '../daemon/devices.ts'
import type { CommandEntry } from './command.ts'

const deviceCommands = Object.entries(devices).map(([type, { summary }]): [string, CommandEntry] => [
  type,
  { summary, load: async () => (await import('./commands/device.ts')).deviceCommand(type) },
])

export const commands: Readonly<Record<string, CommandEntry>> = {
  start: {
    summary: 'try it: serve a demonstration disk and print the QEMU line to copy',
    load: async () => (await import('./commands/start.ts')).startCommand,
  },
  ...Object.fromEntries(deviceCommands),
  device: {
    summary: 'serve a device of your own: a TypeScript or JavaScript file, or an npm package',
    load: async (args) => (await import('./commands/module.ts')).moduleCommand(args),
  },
  new: {
    summary: 'write a starting point for a device of your own, with tests',
    load: async () => (await import('./commands/new.ts')).newCommand,
  },
  run: {
    summary: 'serve any number of devices from a YAML or JSON file',
    load: async () => (await import('./commands/run.ts')).runCommand,
  },
  'qemu-args': {
    summary: 'print the QEMU arguments for what is served',
    load: async (args) => (await import('./commands/qemu-args.ts')).qemuArgsCommand(args),
  },
  handover: {
    summary: 'replace a running daemon by a new process, without its guests noticing',
    load: async () => (await import('./commands/handover.ts')).handoverCommand,
  },
  'config-schema': {
    summary: 'print the JSON Schema of the configuration file, for editors',
    load: async () => (await import('./commands/config-schema.ts')).configSchemaCommand,
  },
  probe: {
    summary: 'show what any vhost-user socket offers',
    load: async () => (await import('./commands/probe.ts')).probeCommand,
  },
  verify: {
    summary: 'check any vhost-user-blk socket: data integrity and corner cases',
    load: async () => (await import('./commands/verify.ts')).verifyCommand,
  },
  conformance: {
    summary: 'check any vhost-user-blk or -net socket against the specifications, case by case',
    load: async () => (await import('./commands/conformance.ts')).conformanceCommand,
  },
  bench: {
    summary: 'measure any vhost-user-blk or -net socket: IOPS or packets/s, latency, processor time per request',
    load: async () => (await import('./commands/bench.ts')).benchCommand,
  },
}
