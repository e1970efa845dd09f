/** Serving one device module from another program: what `virtiod device` does, as a function. */
import { fileURLToPath } from 'node:url'
import * as v from 'valibot'
import { ConfigError } from '../device/errors.ts'
import { type DaemonConfig, deviceKeys, type LogLevel, moduleHelp, moduleKeys } from './config.ts'
import { Daemon } from './daemon.ts'
import { createLogger } from './log.ts'
import { configuredModule } from './module-config.ts'
import { checkNames, checkValues } from './option-table.ts'
import { checkSocketPath, DEFAULT_POLL_MAX_US, daemonOptions } from './options.ts'

export interface ServeOptions {
  /** The device module: a path (relative to the working directory), a file URL, or the name of an npm package. */
  readonly module: string | URL
  /** The unix socket to listen on; it is created, and a stale one is replaced. */
  readonly socketPath: string
  /** The options of the module, as its table has them. */
  readonly options?: Readonly<Record<string, unknown>>
  /** Reload the module when its files change, while the guest keeps running. The default is false. */
  readonly watch?: boolean
  /** The least important log lines to print (JSON, on stdout). The default is `info`. */
  readonly logLevel?: LogLevel
  /** The device's name in logs; the module's and 0, as in `counter0`, if unset. */
  readonly name?: string
}

/** As {@link ServeOptions} says it, for what no compiler has looked at. */
const keys = v.strictObject({
  module: moduleKeys.entries.module,
  socketPath: v.pipe(v.string(), v.minLength(1)),
  options: moduleKeys.entries.options,
  watch: moduleKeys.entries.watch,
  logLevel: daemonOptions.entries['log-level'],
  name: deviceKeys.entries.name,
})

/** A device that is being served. */
export interface ServedDevice extends AsyncDisposable {
  readonly name: string
  /** Resolves when the device has ended; it rejects when virtiod itself failed. That of the module does not end it. */
  readonly ended: Promise<void>
  /** Ends the session (what is in flight completes), removes the socket, closes the device. Idempotent. */
  close(): Promise<void>
}

/**
 * Serves a device module on a socket, on threads of its own in this process; any number of times. Signals are the
 * caller's affair.
 * @throws ConfigError naming what is wrong with a key, the module, one of its options or the socket, and DeviceError
 * when the module's own `create` fails
 */
export async function serve(options: ServeOptions): Promise<ServedDevice> {
  const checked = checkOptions(options)
  const { module, watch, logLevel } = checked
  const path = checkSocketPath(checked.socketPath, 'socketPath')
  const values = checked.options ?? {}
  const configured = await configuredModule({
    module,
    directory: process.cwd(),
    given: { values, text: false, label: 'options.', where: moduleHelp(module) },
    watch,
  })
  const name = checked.name ?? `${configured.definition.name}0`
  const config: DaemonConfig = {
    logLevel,
    iothreads: 1,
    pollMaxUs: DEFAULT_POLL_MAX_US,
    devices: [{ ...configured, name, socket: { path } }],
  }
  const daemon = await Daemon.start(config, createLogger(logLevel))
  const over = Promise.withResolvers<void>()
  // Who does not ask for it does not want to hear of it.
  over.promise.catch(() => {})
  daemon.ended().then(over.resolve, over.reject)
  const close = (): Promise<void> => daemon.close().then(over.resolve)
  return { name, ended: over.promise, close, [Symbol.asyncDispose]: close }
}

function checkOptions(options: ServeOptions): v.InferOutput<typeof keys> {
  if (typeof options !== 'object' || options === null) {
    const fix = 'Give an object with module and socketPath.'
    throw new ConfigError('ERR_OPTION_REQUIRED', 'serve()', 'no options', fix)
  }
  const label = (key: string): string => key
  const known = Object.keys(keys.entries)
  checkNames(Object.keys(options), known, label, 'key', `The keys are ${known.join(', ')}`)
  const { module } = options
  const values = { ...options, module: module instanceof URL ? fileOf(module) : module }
  return checkValues(keys, values, label) as v.InferOutput<typeof keys>
}

function fileOf(url: URL): string {
  if (url.protocol === 'file:') return fileURLToPath(url)
  const fix = 'Give a path, a file URL, or the name of a package.'
  throw new ConfigError('ERR_OPTION_VALUE', 'module', `${url.href} is no file`, fix)
}
