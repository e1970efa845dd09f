/**
 * The library: virtiod inside another program. Device authors want `virtiod/device` instead. It installs no signal
 * handlers and prints nothing; the command line (`src/cli/`) is one user of it.
 *
 * ```ts
 * import { createLogger, Daemon, loadConfig } from 'virtiod'
 *
 * const config = await loadConfig('disks.yaml')
 * const daemon = await Daemon.start(config, createLogger(config.logLevel))
 * // …
 * await daemon.close()
 * ```
 *
 * A device of one's own, from one's own program:
 *
 * ```ts
 * import { serve } from 'virtiod'
 *
 * await using device = await serve({ module: './my-device.ts', socketPath: '/tmp/my-device.sock', options: { size: 4096 } })
 * await device.ended
 * ```
 */
export { type DaemonConfig, type DeviceConfig, loadConfig, parseConfig, type SocketAddress } from './daemon/config.ts'
export { Daemon } from './daemon/daemon.ts'
export { ERROR_CODES } from './daemon/error-codes.ts'
export { createLogger, type Logger } from './daemon/log.ts'
export { type ServedDevice, type ServeOptions, serve } from './daemon/serve.ts'
export { ConfigError, DeviceError } from './device/errors.ts'
export { type MetricsAddress, type OperationsServer, startOperationsServer } from './ops/http.ts'
export { renderMetrics } from './ops/metrics.ts'
export type { DaemonSnapshot, DeviceSnapshot, IothreadSnapshot, QueueSnapshot } from './ops/snapshot.ts'
