/**
 * virtio-scsi with logical units on raw images or block devices (virtio 1.3 §5.6): the control half. It has the files and
 * the config space, carries out task management, and tells drivers of units that come, go and change.
 */
import {
  API_VERSION,
  ConfigError,
  type Device,
  type DeviceDefinition,
  type DeviceHost,
  type DeviceSample,
  featureSet,
  hasFeature,
  type QemuDevice,
} from '../../src/device/index.ts'
import * as virtio from '../../src/device/virtio-scsi.ts'
import { WELL_KNOWN } from './luns.ts'
import { parseUnit, type ScsiOptions, scsiOptions } from './options.ts'
import { isCdbSize, isSenseSize, loadState, saveState } from './saved.ts'
import * as sense from './sense.ts'
import { ALL_UNITS, Settlements } from './settlements.ts'
import {
  ERRORS,
  MAX_UNITS,
  OPERATIONS,
  type Report,
  type ScsiQueueData,
  ScsiState,
  type TaskAnswer,
  type TaskOrder,
} from './shared.ts'
import { UnitSlot } from './unit-slot.ts'

const VIRTIO_ID_SCSI = 8

/** Data segments of one request: the two headers added they fit the 128 descriptors of QEMU's default ring. */
const SEG_MAX = 126
/** Sectors per request that drivers are advised to keep to: QEMU's value. */
const MAX_SECTORS = 0xffff
/** Commands in flight per unit that drivers are advised to keep to: QEMU's value. */
const CMD_PER_LUN = 128
/** QEMU's largest ring. */
const QEMU_MAX_QUEUE_SIZE = 1024
const QEMU_QUEUE_SIZE = 256
const DEFAULT_NUM_QUEUES = 16

class ScsiDevice implements Device<ScsiQueueData> {
  readonly features = featureSet(virtio.VIRTIO_SCSI_F_HOTPLUG, virtio.VIRTIO_SCSI_F_CHANGE)
  readonly numQueues: number
  readonly maxQueueSize?: number
  readonly queueData: ScsiQueueData
  readonly #options: ScsiOptions
  readonly #host: DeviceHost
  readonly #state: ScsiState
  readonly #slots: readonly UnitSlot[]
  readonly #settlements: Settlements
  #features = 0n
  #missedTotal = 0
  #refreshing: Promise<void> = Promise.resolve()
  #events: Promise<void> = Promise.resolve()

  constructor(options: ScsiOptions, host: DeviceHost, state: ScsiState, slots: readonly UnitSlot[]) {
    this.#options = options
    this.#host = host
    this.#state = state
    this.#slots = slots
    this.#settlements = new Settlements((queue, message) => host.send(queue, message))
    this.numQueues = virtio.VIRTIO_SCSI_REQUEST_QUEUE + options['num-queues']
    if (options['queue-size'] !== undefined) this.maxQueueSize = options['queue-size']
    this.queueData = { state: state.buffer, units: slots.length, unsafe: options.cache === 'unsafe' }
  }

  config(): Uint8Array {
    const bytes = new Uint8Array(virtio.VIRTIO_SCSI_CONFIG_SIZE)
    const view = new DataView(bytes.buffer)
    view.setUint32(virtio.VIRTIO_SCSI_CONFIG_NUM_QUEUES, this.#options['num-queues'], true)
    view.setUint32(virtio.VIRTIO_SCSI_CONFIG_SEG_MAX, SEG_MAX, true)
    view.setUint32(virtio.VIRTIO_SCSI_CONFIG_MAX_SECTORS, MAX_SECTORS, true)
    view.setUint32(virtio.VIRTIO_SCSI_CONFIG_CMD_PER_LUN, CMD_PER_LUN, true)
    view.setUint32(virtio.VIRTIO_SCSI_CONFIG_EVENT_INFO_SIZE, virtio.VIRTIO_SCSI_EVENT_SIZE, true)
    view.setUint32(virtio.VIRTIO_SCSI_CONFIG_SENSE_SIZE, this.#state.senseSize, true)
    view.setUint32(virtio.VIRTIO_SCSI_CONFIG_CDB_SIZE, this.#state.cdbSize, true)
    view.setUint32(virtio.VIRTIO_SCSI_CONFIG_MAX_LUN, MAX_UNITS - 1, true)
    return bytes
  }

  /** The driver may choose how much room there is for sense data and CDBs (virtio 1.3 §5.6.4). */
  writeConfig(offset: number, bytes: Uint8Array): boolean {
    const start = virtio.VIRTIO_SCSI_CONFIG_SENSE_SIZE
    const end = virtio.VIRTIO_SCSI_CONFIG_CDB_SIZE + 4
    if (offset < start || offset + bytes.length > end || bytes.length === 0) return false
    const config = this.config()
    config.set(bytes, offset)
    const view = new DataView(config.buffer)
    const senseSize = view.getUint32(virtio.VIRTIO_SCSI_CONFIG_SENSE_SIZE, true)
    const cdbSize = view.getUint32(virtio.VIRTIO_SCSI_CONFIG_CDB_SIZE, true)
    if (!isSenseSize(senseSize) || !isCdbSize(cdbSize)) return false
    this.#state.senseSize = senseSize
    this.#state.cdbSize = cdbSize
    this.#host.log.debug({ senseSize, cdbSize }, 'the driver chose the size of sense data and CDBs')
    return true
  }

  negotiated(features: bigint): void {
    this.#features = features
  }

  reset(): void {
    this.#features = 0n
    this.#state.missed = false
    this.#state.resetSizes()
    for (const { state } of this.#slots) state.reset(sense.POWER_ON_OR_RESET)
  }

  saveState(): Uint8Array {
    return saveState(this.#state)
  }

  /** @throws Error when it is no state of a device with these units */
  loadState(bytes: Uint8Array): void {
    loadState(this.#state, bytes)
  }

  ringActive(queue: number, active: boolean): void {
    this.#settlements.ringActive(queue, active)
    // A guest that stops its disks when it is shut down shall find them running when it starts again; front-ends stop
    // the rings then, and often do no more.
    if (this.#settlements.idle) for (const { state } of this.#slots) state.stopped = false
  }

  reported(queue: number, message: unknown): void {
    const report = message as Report
    this.#settlements.reported(queue, report)
    if (report.kind === 'task') void this.#task(report)
    else if (report.kind === 'missed') this.#eventLost()
  }

  *samples(): Iterable<DeviceSample> {
    for (const { lun, plugged, state } of this.#slots)
      yield { metric: 'lun_bytes', labels: { lun }, value: plugged ? state.blocks * state.blockSize : 0 }
    yield { metric: 'events_missed_total', labels: {}, value: this.#missedTotal }
  }

  /** Looks for images that were resized, and for files of hot-pluggable units that came or went. */
  async refresh(): Promise<boolean> {
    // One after the other, whatever the number of signals.
    this.#refreshing = this.#refreshing.then(() => this.#refresh())
    await this.#refreshing
    return false
  }

  qemu(): QemuDevice {
    return qemu(this.#options)
  }

  async close(): Promise<void> {
    // A unit that is being pulled out: no queue is left that could use it.
    await this.#refreshing
    for (const slot of this.#slots) slot.close()
  }

  // ---- units that come, go and change

  async #refresh(): Promise<void> {
    for (const slot of this.#slots) {
      try {
        if (slot.options.hotplug) await this.#replug(slot)
        if (slot.plugged && slot.resized()) this.#capacityChanged(slot)
      } catch (error) {
        const { message } = error as Error
        this.#host.log.warn({ lun: slot.lun, err: error }, `LUN ${slot.lun} was not looked at again: ${message}`)
      }
    }
  }

  async #replug(slot: UnitSlot): Promise<void> {
    const found = slot.look()
    if (!slot.plugged) {
      if (found === 'nothing') return
      await slot.plugIn()
      this.#host.log.info({ lun: slot.lun }, 'the unit was plugged in')
      this.#unitsChanged(slot, virtio.VIRTIO_SCSI_EVT_RESET_RESCAN)
      return
    }
    if (found === 'same') return
    slot.state.pullOut()
    this.#unitsChanged(slot, virtio.VIRTIO_SCSI_EVT_RESET_REMOVED)
    await this.#settlements.settle({ lun: slot.lun, detach: true })
    slot.close()
    // Not both at once: Linux may serve the two events in either order.
    const next = found === 'other' ? '; there is another file in its place, the next SIGHUP plugs that in' : ''
    this.#host.log.info({ lun: slot.lun }, `the unit was pulled out${next}`)
  }

  #unitsChanged(changed: UnitSlot, reason: number): void {
    for (const { lun, plugged, state } of this.#slots)
      if (plugged && lun !== changed.lun) state.raise(sense.REPORTED_LUNS_DATA_HAS_CHANGED)
    if (hasFeature(this.#features, virtio.VIRTIO_SCSI_F_HOTPLUG))
      this.#event(virtio.VIRTIO_SCSI_T_TRANSPORT_RESET, changed.lun, reason)
  }

  /**
   * The event is for who negotiated CHANGE. But QEMU 7.2 offers that to its guests by itself and does not pass it on,
   * while it does pass HOTPLUG on.
   */
  #capacityChanged({ lun, state }: UnitSlot): void {
    const code = sense.CAPACITY_DATA_HAS_CHANGED
    state.raise(code)
    if (
      hasFeature(this.#features, virtio.VIRTIO_SCSI_F_CHANGE) ||
      hasFeature(this.#features, virtio.VIRTIO_SCSI_F_HOTPLUG)
    )
      this.#event(virtio.VIRTIO_SCSI_T_PARAM_CHANGE, lun, (code >>> 8) | ((code & 0xff) << 8))
  }

  /** Events come to the driver in their order; one for which there is no event queue is lost, and the driver told later. */
  #event(event: number, lun: number, reason: number): void {
    this.#events = this.#events.then(async () => {
      if (await this.#settlements.deliver({ event, lun, reason })) return
      this.#state.missed = true
      this.#eventLost()
    })
  }

  #eventLost(): void {
    this.#missedTotal++
    this.#host.log.debug({}, 'an event found no buffer, the driver will be told that it missed some')
  }

  // ---- task management (SAM-5 §7)

  async #task(order: TaskOrder): Promise<void> {
    const response = await this.#carryOut(order)
    this.#host.send(virtio.VIRTIO_SCSI_CONTROL_QUEUE, { kind: 'answer', id: order.id, response } satisfies TaskAnswer)
  }

  /** Resolves to the response, when all that it concerns is over. */
  async #carryOut({ subtype, lun, tag }: TaskOrder): Promise<number> {
    const aborted = { cancel: virtio.VIRTIO_SCSI_S_ABORTED }
    const reset = { cancel: virtio.VIRTIO_SCSI_S_RESET }
    if (subtype === virtio.VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET) {
      await this.#settlements.settle({ lun: ALL_UNITS, ...reset })
      for (const { state } of this.#slots) state.raise(sense.I_T_NEXUS_LOSS)
      return virtio.VIRTIO_SCSI_S_FUNCTION_COMPLETE
    }
    // Its commands are answered at once.
    if (lun === WELL_KNOWN) return virtio.VIRTIO_SCSI_S_FUNCTION_COMPLETE
    switch (subtype) {
      case virtio.VIRTIO_SCSI_T_TMF_ABORT_TASK:
        await this.#settlements.settle({ lun, tag, ...aborted })
        return virtio.VIRTIO_SCSI_S_FUNCTION_COMPLETE
      case virtio.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET:
        await this.#settlements.settle({ lun, ...reset })
        this.#state.units[lun]!.reset(sense.BUS_DEVICE_RESET_FUNCTION)
        return virtio.VIRTIO_SCSI_S_FUNCTION_COMPLETE
      case virtio.VIRTIO_SCSI_T_TMF_QUERY_TASK:
        return queried(await this.#settlements.settle({ lun, tag }))
      case virtio.VIRTIO_SCSI_T_TMF_QUERY_TASK_SET:
        return queried(await this.#settlements.settle({ lun }))
      default:
        // ABORT TASK SET and CLEAR TASK SET: there is one initiator.
        await this.#settlements.settle({ lun, ...aborted })
        return virtio.VIRTIO_SCSI_S_FUNCTION_COMPLETE
    }
  }
}

/** QUERY TASK succeeds when the task is there, and completes when it is not. */
function queried(tasks: number): number {
  return tasks > 0 ? virtio.VIRTIO_SCSI_S_FUNCTION_SUCCEEDED : virtio.VIRTIO_SCSI_S_FUNCTION_COMPLETE
}

function qemu(options: ScsiOptions): QemuDevice {
  const queues = options['num-queues']
  return {
    driver: 'vhost-user-scsi-pci',
    properties: {
      // Left alone QEMU makes one queue per vCPU, which is what most want.
      ...(queues === DEFAULT_NUM_QUEUES ? {} : { num_queues: queues }),
      virtqueue_size: Math.min(options['queue-size'] ?? QEMU_QUEUE_SIZE, QEMU_MAX_QUEUE_SIZE),
    },
  }
}

/** Opens, locks and examines the files. @throws ConfigError */
async function open(options: ScsiOptions, host: DeviceHost): Promise<ScsiDevice> {
  const units = options.lun.map(parseUnit)
  const serials = units.flatMap(({ serial }) => (serial === undefined ? [] : [serial]))
  const twice = serials.find((serial, i) => serials.indexOf(serial) !== i)
  if (twice !== undefined) {
    const fix = 'Give each its own: guests take units of one serial number for the same disk.'
    throw new ConfigError('ERR_SCSI_LUN', '--lun', `two units have the serial number ${twice}`, fix)
  }
  const state = new ScsiState(units.length)
  const slots = units.map((unit, lun) => new UnitSlot(lun, state.units[lun]!, unit, options, host))
  try {
    for (const slot of slots) await slot.begin()
  } catch (error) {
    for (const slot of slots) slot.close()
    throw error
  }
  return new ScsiDevice(options, host, state, slots)
}

const definition: DeviceDefinition<ScsiOptions, ScsiQueueData> = {
  apiVersion: API_VERSION,
  name: 'scsi',
  virtioId: VIRTIO_ID_SCSI,
  options: scsiOptions,
  operations: OPERATIONS,
  errors: ERRORS,
  metrics: [
    {
      name: 'lun_bytes',
      type: 'gauge',
      labels: ['lun'],
      help: 'Capacity of a logical unit; 0 while it is pulled out',
    },
    {
      name: 'events_missed_total',
      type: 'counter',
      labels: [],
      help: 'Events that the driver had no buffer for: it was told that it missed some',
    },
  ],
  queueModule: new URL('./queue.ts', import.meta.url),
  qemu,
  open,
}

export default definition
