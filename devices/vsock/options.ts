/** The options of virtio-vsock: flags of `virtiod vsock` and keys of a `type: vsock` device. */
import * as v from 'valibot'

export const vsockOptions = v.strictObject({
  'guest-cid': v.pipe(
    v.number(),
    v.integer(),
    // 0 to 2 are the hypervisor, the guest itself and the host; the last one stands for "any".
    v.minValue(3),
    v.maxValue(0xffff_fffe),
    v.description("The guest's context id: its address"),
    v.metadata({ placeholder: 'CID' })
  ),
  'uds-path': v.pipe(
    v.string(),
    v.minLength(1),
    v.description(
      'The unix socket on which host programs reach the guest (they say "CONNECT PORT" first); the guest reaches ' +
        'host programs that listen on PATH_PORT'
    ),
    v.metadata({ placeholder: 'PATH', path: true })
  ),
  'buffer-size': v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(4096),
      v.maxValue(16 * 1024 * 1024),
      v.description('Bytes that the guest may send on a connection before its host program reads them'),
      v.metadata({ placeholder: 'BYTES', size: true })
    ),
    256 * 1024
  ),
  'max-connections': v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(1),
      v.maxValue(65536),
      v.description('The most connections at a time; more are refused'),
      v.metadata({ placeholder: 'N' })
    ),
    1024
  ),
})

export type VsockOptions = v.InferOutput<typeof vsockOptions>
