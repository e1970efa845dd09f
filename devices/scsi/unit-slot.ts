/** A LUN of the control half: the file behind it, plugged in and out. It must not know queues. */
import { closeSync, statSync } from 'node:fs'
import type { DeviceHost } from '../../src/device/index.ts'
import { fileIdentity, type Image, type ImageNames, openImage } from '../disk/image.ts'
import type { ScsiOptions, UnitOptions } from './options.ts'
import { SERIAL_LENGTH, type UnitState } from './shared.ts'

/** How the options and error codes of this device are called. */
const ABOUT: ImageNames = {
  file: '--lun',
  readOnly: ',read-only',
  cache: '--cache',
  blockSize: '--block-size',
  discard: '--discard',
  lock: '--lock',
  codes: {
    open: 'ERR_SCSI_FILE_OPEN',
    kind: 'ERR_SCSI_FILE_KIND',
    locked: 'ERR_SCSI_FILE_LOCKED',
    size: 'ERR_SCSI_FILE_SIZE',
    blockSize: 'ERR_SCSI_BLOCK_SIZE',
    cache: 'ERR_SCSI_CACHE',
    discard: 'ERR_SCSI_DISCARD',
  },
}

/** Of all units of all devices; 0 says that there is none. */
let generations = 0

export class UnitSlot {
  readonly lun: number
  readonly state: UnitState
  readonly options: UnitOptions
  readonly #device: ScsiOptions
  readonly #host: DeviceHost
  #image: Image | undefined
  #identity = ''

  constructor(lun: number, state: UnitState, options: UnitOptions, device: ScsiOptions, host: DeviceHost) {
    this.lun = lun
    this.state = state
    this.options = options
    this.#device = device
    this.#host = host
  }

  /** A file is open, whether or not the driver sees it still. */
  get open(): boolean {
    return this.#image !== undefined
  }

  get plugged(): boolean {
    return this.state.generation !== 0
  }

  /** What is at the path now: nothing, the open file, or another one. */
  look(): 'nothing' | 'same' | 'other' {
    const stat = statSync(this.options.path, { bigint: true, throwIfNoEntry: false })
    if (stat === undefined) return 'nothing'
    return `${stat.dev.toString(16)}-${stat.ino.toString(16)}` === this.#identity ? 'same' : 'other'
  }

  /** At the start: takes the file that a predecessor had open, or plugs in what is there. @throws ConfigError */
  async begin(): Promise<void> {
    const [inherited] = this.#host.handover.take(this.#key)?.fds ?? []
    if (inherited !== undefined || !this.options.hotplug || this.look() !== 'nothing') await this.plugIn(inherited)
  }

  /** Opens the file and plugs it in. @param inherited an fd to use instead @throws ConfigError */
  async plugIn(inherited?: number): Promise<void> {
    const { options } = this
    const device = this.#device
    const image = await openImage(
      {
        path: options.path,
        readOnly: options.readOnly,
        direct: device.cache === 'none',
        blockSize: options.blockSize ?? device['block-size'],
        lock: device.lock === 'on',
        discard: device.discard,
      },
      ABOUT,
      this.#host,
      inherited
    )
    this.#image = image
    this.#identity = fileIdentity(image.fd)
    this.#host.handover.keep(this.#key, [image.fd], {})
    this.state.plugIn(
      {
        ...image,
        readOnly: options.readOnly,
        writeback: device.cache !== 'writethrough',
        serial: options.serial ?? this.#identity.slice(0, SERIAL_LENGTH),
      },
      ++generations
    )
  }

  /** Releases the file: no queue uses it any more. */
  close(): void {
    this.state.pullOut()
    if (this.#image === undefined) return
    this.#host.handover.forget(this.#key)
    closeSync(this.#image.fd)
    this.#image = undefined
    this.#identity = ''
  }

  /** The image may have been resized; a part of a block at its end is not used. Returns whether the capacity changed. */
  resized(): boolean {
    if (this.#image === undefined) return false
    const { size } = this.#host.fileInfo(this.#image.fd)
    const blocks = Math.floor(size / this.state.blockSize)
    if (blocks === this.state.blocks) return false
    this.#host.log.info(
      { lun: this.lun, from: this.state.blocks, to: blocks },
      'the image was resized (logical blocks)'
    )
    this.state.blocks = blocks
    return true
  }

  /** Under which a successor gets the open file. */
  get #key(): string {
    return `scsi:${this.#host.name}:${this.lun}`
  }
}
