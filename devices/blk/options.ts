/**
 * The options of the block device. The keys are the flags of `virtiod blk` and the keys of a `type: blk` device in a
 * configuration file; help, README and JSON Schema are made from this table.
 */
import * as v from 'valibot'

export const blkOptions = v.strictObject({
  'blk-file': v.pipe(
    v.string(),
    v.minLength(1),
    v.description('The raw image file or block device to serve'),
    v.metadata({ placeholder: 'PATH', path: true })
  ),
  'read-only': v.optional(
    v.pipe(v.boolean(), v.description('Refuse every write; several daemons may then share the file')),
    false
  ),
  cache: v.optional(
    v.pipe(
      v.picklist(['none', 'writethrough', 'writeback', 'unsafe']),
      v.description(
        "As in QEMU: none = O_DIRECT, past the host's page cache; writethrough = each write is durable when it " +
          'completes; writeback = durable at a flush; unsafe = flushes are ignored'
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
      v.maxValue(256),
      v.description('The most virtqueues that a front-end may use'),
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
  serial: v.exactOptional(
    v.pipe(
      v.string(),
      v.regex(/^[ -~]{1,20}$/, 'Give 1 to 20 ASCII characters'),
      v.description("The disk's serial number, 1 to 20 ASCII characters"),
      v.metadata({ placeholder: 'TEXT', unset: "made from the file's identity" })
    )
  ),
  'block-size': v.exactOptional(
    v.pipe(
      v.picklist([512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]),
      v.description('The logical block size in bytes'),
      v.metadata({ placeholder: 'BYTES', size: true, unset: "the file's own, 512 for most" })
    )
  ),
  lock: v.optional(
    v.pipe(
      v.picklist(['on', 'off']),
      v.description(
        'Lock the file against a second writer; off where two daemons must have it open, as at both ends of a live ' +
          'migration'
      ),
      v.metadata({ placeholder: 'on|off' })
    ),
    'on'
  ),
  discard: v.exactOptional(
    v.pipe(
      v.picklist(['on', 'off']),
      v.description('Offer DISCARD, which frees space in the file'),
      v.metadata({ placeholder: 'on|off', unset: 'on when the file can do it' })
    )
  ),
})

export type BlkOptions = v.InferOutput<typeof blkOptions>
