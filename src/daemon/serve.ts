/** Serving one device module from another program: what `virtiod device` does, as a function. */
import { fileURLToPath } from 'node:url'
import { type DaemonConfig, type LogLevel, moduleHelp } from './config.ts'
import { Daemon } from './daemon.ts'
import { createLogger } from './log.ts'
import { configuredModule } from './module-config.ts'
import { checkSocketPath, DEFAULT_POLL_MAX_US } from './options.ts'

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

/** A device that is being served. */
export interface ServedDevice extends AsyncDisposable {
  readonly name: string
  /** Resolves when the device has ended; it rejects when virtiod itself failed. That of the module does not end it. */
  readonly ended: Promise<void>
  /** Ends the session (what is in flight completes), removes the socket, closes the device. Idempotent. */
  close(): Promise<void>
}

/**
 * Serves a device module on a socket, on threads of its own in this process. Signals are the caller's affair.
 * @throws ConfigError naming what is wrong with the module, an option or the socket, and DeviceError when the module's own `create`
 * fails
 */
export async function serve(options: ServeOptions): Promise<ServedDevice> {
  const { module, socketPath, watch = false, logLevel = 'info' } = options
  const asked = module instanceof URL ? fileURLToPath(module) : module
  const path = checkSocketPath(socketPath, 'socketPath')
  const values = options.options ?? {}
  const configured = await configuredModule({
    module: asked,
    directory: process.cwd(),
    given: { values, text: false, label: 'options.', where: moduleHelp(asked) },
    watch,
  })
  const name = options.name ?? `${configured.definition.name}0`
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
