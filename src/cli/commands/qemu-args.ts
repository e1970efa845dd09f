/**
 * `virtiod qemu-args`: how to attach QEMU to what is served, from the same flags or file that serve it. It opens the devices, since
 * only they know their properties, but takes no locks: it works beside a running daemon.
 */
import { fstatSync } from 'node:fs'
import { resolve } from 'node:path'
import * as v from 'valibot'
import { configFromFlags, type DeviceConfig, loadConfig } from '../../daemon/config.ts'
import { deviceNames, devices } from '../../daemon/devices.ts'
import { checkValues } from '../../daemon/option-table.ts'
import { daemonOptions, listenerOptions } from '../../daemon/options.ts'
import { formatQemuArguments, type QemuAttachment, qemuArguments } from '../../daemon/qemu-args.ts'
import { ConfigError, type DeviceHost, type FileInfo } from '../../device/index.ts'
import type { Command } from '../command.ts'
import { EXIT_OK } from '../exit-codes.ts'
import { deviceScope } from './device.ts'

const guestOptions = v.strictObject({
  memory: v.optional(
    v.pipe(
      v.string(),
      v.regex(/^[1-9]\d*[KMGTkmgt]?$/, 'Give a size as QEMU writes it, such as 4G'),
      v.description("The guest's memory"),
      v.metadata({ placeholder: 'SIZE' })
    ),
    '1G'
  ),
})

const description =
  'Print the QEMU arguments that attach what is served: shared guest memory, and a chardev and a device for each. Give the ' +
  'flags or the file that serve it; it works beside the running daemon.'

/** @param args decide between the two forms: a file, or a device type (unsaid: the first of the registry) and its flags */
export async function qemuArgsCommand(args: readonly string[]): Promise<Command> {
  const named = deviceNames.find((name) => name === args[0])
  const flagsOnly = args.some((arg) => /^--(socket-path|fd)(=|$)/.test(arg))
  const type = named ?? (flagsOnly ? deviceNames[0] : undefined)
  const guest = { title: 'Guest options', table: guestOptions }
  if (type === undefined) {
    return {
      name: 'qemu-args',
      description,
      usage: ['CONFIG [--memory SIZE]', ...deviceNames.map((name) => `[${name}] FLAGS [--memory SIZE]`)],
      positionals: [{ name: 'CONFIG', description: 'a YAML or JSON file, or the flags of a device command' }],
      scopes: [guest],
      run: async ({ values, positionals }) => print((await loadConfig(positionals[0]!)).devices, values),
    }
  }
  const definition = await devices[type]!.load()
  return {
    name: named === undefined ? 'qemu-args' : `qemu-args ${type}`,
    description,
    usage: ['--socket-path PATH [options]'],
    positionals: [],
    scopes: [
      guest,
      deviceScope(type, definition),
      { title: 'Listener options', table: listenerOptions },
      { title: 'Daemon options (they make no difference here)', table: daemonOptions },
    ],
    run: async ({ values }) => print(configFromFlags(definition, values).devices, values),
  }
}

async function print(configs: readonly DeviceConfig[], values: Readonly<Record<string, unknown>>): Promise<number> {
  const { memory } = checkValues(guestOptions, values, (name) => `--${name}`) as v.InferOutput<typeof guestOptions>
  const attachments: QemuAttachment[] = []
  for (const config of configs) attachments.push(await attachment(config))
  process.stdout.write(formatQemuArguments(qemuArguments(attachments, memory)))
  return EXIT_OK
}

/** @throws ConfigError when the device can't be attached to QEMU by a path */
export async function attachment({ name, definition, options, socket }: DeviceConfig): Promise<QemuAttachment> {
  if (!('path' in socket)) {
    const fix = 'Give the path of the socket that the fd belongs to.'
    throw new ConfigError('ERR_OPTION_REQUIRED', '--socket-path', `missing: QEMU can't connect to an fd`, fix)
  }
  const device = await definition.open(options, observer)
  try {
    const qemu = device.qemu?.()
    if (qemu !== undefined) return { name, socketPath: resolve(socket.path), device: qemu }
    throw new ConfigError(
      'ERR_ARGUMENT',
      name,
      'this device does not say how QEMU attaches it',
      'See its documentation.'
    )
  } finally {
    device.close()
  }
}

const ignore = (): void => {}

/** What a device sees of a host that only looks: no locks, no probing of the file. */
export const observer: DeviceHost = {
  log: { debug: ignore, info: ignore, warn: ignore, error: ignore },
  fileInfo: (fd): FileInfo => {
    const stat = fstatSync(fd)
    const kind = stat.isFile() ? 'file' : stat.isBlockDevice() ? 'block' : 'other'
    // The size of a block device is not fstat's to tell, and no argument of QEMU depends on it.
    const size = kind === 'block' ? 2 ** 40 : stat.size
    return { kind, size, blockSize: 512, directMemoryAlign: 512, directOffsetAlign: 512 }
  },
  lockFile: () => true,
  fallocate: () => 0,
  configChanged: ignore,
}
