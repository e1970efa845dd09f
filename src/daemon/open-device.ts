/** Opens a configured device: on the control thread, or a module on threads of its own. */
import {
  API_VERSION,
  ConfigError,
  type Device,
  DeviceError,
  type DeviceHost,
  type QemuDevice,
} from '../device/index.ts'
import { fileInfo, lockFile, probeFallocate } from '../engine/files.ts'
import { networkHost } from '../engine/network.ts'
import { IothreadPool } from '../engine/pool.ts'
import type { DaemonConfig, DeviceConfig } from './config.ts'
import { KeptFiles } from './kept-files.ts'
import { createLogger, type Logger } from './log.ts'
import { ModuleDevice } from './module-device.ts'
import { observer } from './observer.ts'

export interface DevicePlace {
  readonly pool: IothreadPool
  /** For handovers. */
  readonly files: KeptFiles
  /** The device is only looked at: no locks, no taps. */
  readonly observer: boolean
}

/** @throws ConfigError naming option and fix, or DeviceError */
export async function openDevice(
  config: DeviceConfig,
  whole: Pick<DaemonConfig, 'devices' | 'iothreads' | 'iothreadCpus'>,
  log: Logger,
  own: Pick<DeviceHost, 'daemon' | 'signal' | 'configChanged' | 'send'>,
  { pool, files, observer: looks }: DevicePlace
): Promise<Device> {
  const { apiVersion, name } = config.definition
  if (apiVersion !== API_VERSION) {
    const message = `the device ${name} is written for version ${apiVersion} of the contract, this is version ${API_VERSION}`
    throw new DeviceError('ERR_DEVICE_API_VERSION', message)
  }
  const real = { log, network: networkHost, fileInfo, lockFile, fallocate: probeFallocate, handover: files }
  const host: DeviceHost = { ...(looks ? observer : real), ...own, name: config.name }
  try {
    if (config.module === undefined) return await config.definition.open(config.options, host)
    const { iothreads, iothreadCpus } = whole
    return await ModuleDevice.open(host, {
      source: config.module,
      pool,
      iothreads,
      iothreadCpus,
      files,
      observer: looks,
    })
  } catch (error) {
    // Of several devices, which one.
    if (error instanceof ConfigError && whole.devices.length > 1) error.message = `${config.name}: ${error.message}`
    throw error
  }
}

/** How a device that lives on threads of its own is attached to QEMU, by opening it as who only looks. */
export async function lookedAtQemu(config: DeviceConfig): Promise<QemuDevice | undefined> {
  const pool = new IothreadPool({ count: 0, pollMaxUs: 0, emulate: true })
  const place = { pool, files: new KeptFiles(), observer: true }
  const nobody = { daemon: pool, signal: new AbortController().signal, configChanged: () => {}, send: () => {} }
  const whole = { devices: [config], iothreads: 1 }
  try {
    const device = await openDevice(config, whole, createLogger('silent'), nobody, place)
    const qemu = device.qemu?.()
    await device.close()
    return qemu
  } finally {
    await pool.close()
  }
}
