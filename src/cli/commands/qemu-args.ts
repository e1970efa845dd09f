/**
 * `virtiod qemu-args`: how to attach QEMU to what is served, from the same flags or file that serve it. It opens the devices, since
 * only they know their properties, but takes no locks and touches no taps: it works beside a running daemon.
 */
import { createHash } from 'node:crypto'
import { hostname } from 'node:os'
import { resolve } from 'node:path'
import * as v from 'valibot'
import { configFromFlags, type DeviceConfig, loadConfig } from '../../daemon/config.ts'
import { deviceNames, devices, MODULE_TYPE } from '../../daemon/devices.ts'
import { observer } from '../../daemon/observer.ts'
import { checkValues } from '../../daemon/option-table.ts'
import { daemonOptions, listenerOptions } from '../../daemon/options.ts'
import { formatQemuArguments, type QemuAttachment, qemuArguments } from '../../daemon/qemu-args.ts'
import { ConfigError, type QemuDevice } from '../../device/index.ts'
import type { Command } from '../command.ts'
import { EXIT_OK } from '../exit-codes.ts'
import { deviceScope, repeatable } from './device.ts'
import { configFromModule, moduleCommand } from './module.ts'

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
  if (args[0] === MODULE_TYPE) return moduleQemuArgs(args.slice(1))
  const named = deviceNames.find((name) => name === args[0])
  const flagsOnly = args.some((arg) => /^--(socket-path|fd)(=|$)/.test(arg))
  const type = named ?? (flagsOnly ? deviceNames[0] : undefined)
  const guest = { title: 'Guest options', table: guestOptions }
  if (type === undefined) {
    return {
      name: 'qemu-args',
      description,
      usage: [
        'CONFIG',
        ...deviceNames.map((name, index) => `${index === 0 ? `[${name}]` : name} FLAGS`),
        `${MODULE_TYPE} MODULE FLAGS`,
      ].map((what) => `${what} [--memory SIZE]`),
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
    repeatable: repeatable(devices[type]!.several),
    scopes: [
      guest,
      deviceScope(type, definition),
      { title: 'Listener options', table: listenerOptions },
      { title: 'Daemon options (they make no difference here)', table: daemonOptions },
    ],
    run: async ({ values }) => print(configFromFlags(definition, values).devices, values),
  }
}

async function moduleQemuArgs(args: readonly string[]): Promise<Command> {
  const command = await moduleCommand(args)
  const guest = { title: 'Guest options', table: guestOptions }
  return {
    ...command,
    name: `qemu-args ${MODULE_TYPE}`,
    description,
    scopes: [guest, ...command.scopes],
    run: async (input) => print((await configFromModule(input)).devices, input.values),
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
export async function attachment(config: DeviceConfig): Promise<QemuAttachment> {
  const { name, socket } = config
  if (!('path' in socket)) {
    const fix = 'Give the path of the socket that the fd belongs to.'
    throw new ConfigError('ERR_OPTION_REQUIRED', '--socket-path', `missing: QEMU can't connect to an fd`, fix)
  }
  const qemu = await qemuOf(config)
  const socketPath = resolve(socket.path)
  if (qemu !== undefined) return { name, socketPath, device: withMac(qemu, socketPath) }
  const fix = "Add to its module, for example: qemu: { driver: 'vhost-user-rng-pci', properties: {} }."
  throw new ConfigError('ERR_ARGUMENT', name, 'the device does not say how QEMU attaches it', fix)
}

async function qemuOf(config: DeviceConfig): Promise<QemuDevice | undefined> {
  const { definition, options, module } = config
  // What a device can say without being opened is said while it is open elsewhere.
  const told = module?.qemu ?? definition.qemu?.(options)
  if (told !== undefined) return told
  if (module !== undefined) return (await import('../../daemon/open-device.ts')).lookedAtQemu(config)
  const device = await definition.open(options, observer)
  try {
    return device.qemu?.()
  } finally {
    await device.close()
  }
}

/**
 * Left alone, every QEMU gives its first card the same MAC, and two guests of one switch could not talk: a card that has
 * none gets one that is its socket's own and stays.
 */
function withMac(device: QemuDevice, socketPath: string): QemuDevice {
  if (device.netdev === undefined || 'mac' in device.properties) return device
  const digest = createHash('sha256').update(`${hostname()}:${socketPath}`).digest()
  const mac = ['52', '54', '00', ...[0, 1, 2].map((index) => digest.toString('hex', index, index + 1))].join(':')
  return { ...device, properties: { mac, ...device.properties } }
}
