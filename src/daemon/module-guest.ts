/**
 * A device module on its thread: loads it, opens the device, and calls its methods for the control thread
 * (module-device.ts). The queue half runs beside it, as in every iothread.
 */
import { DeviceError } from '../device/errors.ts'
import type { Device, DeviceDefinition } from '../device/index.ts'
import type { Iothread, IothreadGuest } from '../engine/iothread.ts'
import { loadStateOf, saveStateOf } from './device-state.ts'
import { configProblems, deviceProblems } from './module-check.ts'
import type { ImportedFiles } from './module-hooks.ts'
import { moduleHost } from './module-host.ts'
import type { LoadedModule } from './module-load.ts'
import type { Answer, Described, Mirror, ModuleCall, ModuleReport, Opened } from './module-messages.ts'
import { checkModuleOptions, type GivenOptions } from './module-options.ts'
import { shapeOf } from './module-shape.ts'
import { asOptionTable, optionsOf } from './option-table.ts'

type OpenCall = Extract<ModuleCall, { kind: 'open' }>
type Say = (report: ModuleReport) => void

/** What a module says of itself with these options. @throws ConfigError for options that it refuses */
export function describeModule(
  module: LoadedModule,
  given: GivenOptions | undefined
): { described: Described; options: unknown } {
  const { definition, url } = module
  const infos = optionsOf(asOptionTable(definition.options, definition.name))
  const shape = shapeOf(definition, url, infos)
  if (given === undefined) return { described: { shape, values: {} }, options: undefined }
  const { values, options } = checkModuleOptions(definition, given)
  const qemu = definition.qemu?.(options)
  return { described: { shape, values, ...(qemu && { qemu }) }, options }
}

/** One that could not be loaded. */
export interface FailedModule {
  readonly error: unknown
  readonly files: ImportedFiles
}

export class ModuleGuest implements IothreadGuest {
  readonly #loaded: LoadedModule | FailedModule
  readonly #say: Say
  /** Of the device that is open: after a reload that failed it is opened again. */
  #closing = new AbortController()
  #options: unknown
  #device: Device | undefined

  constructor(thread: Iothread, loaded: LoadedModule | FailedModule) {
    this.#loaded = loaded
    this.#say = (report) => thread.say(report)
    process.on('uncaughtExceptionMonitor', (_, origin) => this.#say({ kind: 'uncaught', origin }))
  }

  call(request: unknown): unknown {
    const call = request as ModuleCall
    switch (call.kind) {
      case 'describe': {
        this.#say({ kind: 'imported', files: [...this.#loaded.files.local] })
        const { described, options } = describeModule(this.#module, call.given)
        this.#options = options
        return described
      }
      case 'open':
        return this.#open(call, this.#module.definition)
      case 'abort':
        return this.#closing.abort()
      case 'samples':
        return [...(this.#opened.samples?.() ?? [])]
      default: {
        const device = this.#opened
        const result = callDevice(device, call)
        return result instanceof Promise ? result.then((value) => answer(device, value)) : answer(device, result)
      }
    }
  }

  async #open({ name, observer, inherited }: OpenCall, definition: DeviceDefinition): Promise<Opened> {
    this.#closing = new AbortController()
    this.#device = undefined
    const host = moduleHost({
      name,
      observer,
      inherited,
      signal: this.#closing.signal,
      say: this.#say,
      // Before `open` is through nobody has seen the config space.
      configChanged: () => {
        if (this.#device !== undefined) this.#say({ kind: 'configChanged', ...mirror(this.#device) })
      },
    })
    const device = await definition.open(this.#options, host)
    const problems = deviceProblems(device)
    if (problems.length > 0) throw deviceError(`open() returned no device: ${problems.join('; ')}`)
    const wrong = configProblems(device.config())
    if (wrong.length > 0) throw deviceError(wrong.join('; '))
    this.#device = device
    const { features, numQueues, maxQueueSize } = device
    const seen = mirror(device)
    const qemu = device.qemu?.()
    return {
      shape: { features, numQueues, maxQueueSize, configLength: seen.config.length },
      network: device.network !== undefined,
      ...(qemu && { qemu }),
      ...seen,
    }
  }

  get #module(): LoadedModule {
    if ('error' in this.#loaded) throw this.#loaded.error
    return this.#loaded
  }

  get #opened(): Device {
    if (this.#device === undefined) throw new Error('the device is not open')
    return this.#device
  }
}

type DeviceCall = Exclude<ModuleCall, { kind: 'describe' | 'open' | 'abort' | 'samples' }>

function callDevice(device: Device, call: DeviceCall): unknown {
  switch (call.kind) {
    case 'writeConfig':
      return device.writeConfig(call.offset, call.bytes)
    case 'negotiated':
      return device.negotiated?.(call.features)
    case 'ringActive':
      return device.ringActive?.(call.index, call.active)
    case 'reported':
      return device.reported?.(call.index, call.message)
    case 'saveState':
      return saveStateOf(device)
    case 'loadState':
      return loadStateOf(device, call.state)
    case 'setMtu':
      return device.network?.setMtu(call.mtu) ?? false
    case 'announce':
      return device.network?.announce(call.mac)
    case 'refresh':
      return device.refresh?.() ?? false
    case 'close':
      return device.close()
    case 'reset':
    case 'letGo':
    case 'takeBack':
    case 'takeOver':
      return device[call.kind]?.()
  }
}

function answer(device: Device, value: unknown): Answer {
  return { value, ...mirror(device) }
}

function mirror(device: Device): Mirror {
  return { config: Uint8Array.from(device.config()), queueData: device.queueData }
}

function deviceError(problem: string): DeviceError {
  return new DeviceError('ERR_DEVICE_DEFINITION', problem)
}
