/**
 * The options of the SCSI device. The keys are the flags of `virtiod scsi` and the keys of a `type: scsi` device in a
 * configuration file; help, README and JSON Schema are made from this table.
 */
import * as v from 'valibot'
import { ConfigError } from '../../src/device/index.ts'
import { MAX_UNITS, SERIAL_LENGTH } from './shared.ts'

export const scsiOptions = v.strictObject({
  lun: v.pipe(
    v.array(v.pipe(v.string(), v.minLength(1))),
    v.minLength(1),
    v.maxLength(MAX_UNITS),
    v.description(
      'A logical unit: a raw image file or a block device, and behind commas read-only, serial=TEXT, block-size=BYTES, ' +
        'hotplug (it may be missing; SIGHUP plugs it in and out as the file comes and goes). The first is LUN 0'
    ),
    v.metadata({ placeholder: 'PATH[,OPTION…]', path: true })
  ),
  cache: v.optional(
    v.pipe(
      v.picklist(['none', 'writethrough', 'writeback', 'unsafe']),
      v.description(
        "As in QEMU: none = O_DIRECT, past the host's page cache; writethrough = each write is durable when it " +
          'completes; writeback = durable at SYNCHRONIZE CACHE; unsafe = that is ignored'
      ),
      v.metadata({ placeholder: 'MODE' })
    ),
    'writeback'
  ),
  'num-queues': v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(1),
      v.maxValue(254),
      v.description('The most request queues that a front-end may use'),
      v.metadata({ placeholder: 'N' })
    ),
    16
  ),
  'queue-size': v.exactOptional(
    v.pipe(
      v.picklist([2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]),
      v.description('The largest ring that a driver may set up'),
      v.metadata({ placeholder: 'N', unset: 'any' })
    )
  ),
  'block-size': v.exactOptional(
    v.pipe(
      v.picklist([512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]),
      v.description('The logical block size in bytes of units that have none of their own'),
      v.metadata({ placeholder: 'BYTES', size: true, unset: "the file's own, 512 for most" })
    )
  ),
  lock: v.optional(
    v.pipe(
      v.picklist(['on', 'off']),
      v.description(
        'Lock the files against a second writer; off where two daemons must have them open, as at both ends of a live ' +
          'migration'
      ),
      v.metadata({ placeholder: 'on|off' })
    ),
    'on'
  ),
  discard: v.exactOptional(
    v.pipe(
      v.picklist(['on', 'off']),
      v.description('Offer UNMAP, which frees space in the file'),
      v.metadata({ placeholder: 'on|off', unset: 'on for files that can do it' })
    )
  ),
})

export type ScsiOptions = v.InferOutput<typeof scsiOptions>

/** What one `--lun` says. */
export interface UnitOptions {
  readonly path: string
  readonly readOnly: boolean
  readonly hotplug: boolean
  readonly serial: string | undefined
  readonly blockSize: number | undefined
}

const BLOCK_SIZES = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
const KNOWN = 'read-only, hotplug, serial=TEXT and block-size=BYTES'

/**
 * Reads a `--lun`. A comma in the path is doubled, as QEMU has it.
 * @throws ConfigError ERR_SCSI_LUN
 */
export function parseUnit(text: string): UnitOptions {
  // No path has a NUL.
  const [path = '', ...words] = text
    .replaceAll(',,', '\0')
    .split(',')
    .map((part) => part.replaceAll('\0', ','))
  const refuse = (problem: string, fix: string): ConfigError =>
    new ConfigError('ERR_SCSI_LUN', '--lun', `${text}: ${problem}`, fix)
  if (path === '') throw refuse('it begins with no path', 'Give a raw image or a block device.')
  const seen = new Set<string>()
  let serial: string | undefined
  let blockSize: number | undefined
  for (const word of words) {
    const [name = '', value] = splitOnce(word)
    if (seen.has(name)) throw refuse(`${name} is given twice`, 'Give it once.')
    seen.add(name)
    if ((name === 'read-only' || name === 'hotplug') && value === undefined) continue
    if (name === 'serial' && value !== undefined) {
      if (value.length > SERIAL_LENGTH || !/^[ -~]+$/.test(value))
        throw refuse(`serial "${value}"`, `Give 1 to ${SERIAL_LENGTH} ASCII characters.`)
      serial = value
    } else if (name === 'block-size' && value !== undefined) {
      blockSize = Number(value)
      if (!BLOCK_SIZES.includes(blockSize))
        throw refuse(`block size "${value}"`, `Give one of ${BLOCK_SIZES.join(', ')}.`)
    } else throw refuse(`"${word}" is no option of a unit`, `There are ${KNOWN}; a comma in a path is doubled.`)
  }
  return { path, readOnly: seen.has('read-only'), hotplug: seen.has('hotplug'), serial, blockSize }
}

function splitOnce(word: string): [name: string, value?: string] {
  const at = word.indexOf('=')
  return at < 0 ? [word] : [word.slice(0, at), word.slice(at + 1)]
}
