/** The options of the input device: flags of `virtiod input` and keys of a `type: input` device. */
import * as v from 'valibot'

export const inputOptions = v.strictObject({
  kind: v.optional(
    v.pipe(
      v.picklist(['keyboard', 'mouse', 'tablet']),
      v.description('What the guest sees; a tablet is a pointer with absolute coordinates'),
      v.metadata({ placeholder: 'KIND' })
    ),
    'keyboard'
  ),
  control: v.pipe(
    v.string(),
    v.minLength(1),
    v.description('The unix socket that takes commands, a line each ("help" lists them), and tells of LEDs'),
    v.metadata({ placeholder: 'PATH', path: true })
  ),
  'key-delay': v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(0),
      v.maxValue(10_000),
      v.description('Milliseconds that a typed key stays down, and between two of them'),
      v.metadata({ placeholder: 'MS' })
    ),
    5
  ),
  serial: v.exactOptional(
    v.pipe(
      v.string(),
      v.regex(/^[ -~]{1,128}$/, 'Give 1 to 128 ASCII characters'),
      v.description('The serial number that the guest sees (uniq), 1 to 128 ASCII characters'),
      v.metadata({ placeholder: 'TEXT', unset: "the device's name" })
    )
  ),
})

export type InputOptions = v.InferOutput<typeof inputOptions>
