/** The constants of virtio-blk, for devices: they import from `src/device` only. */
export * from '../virtio/blk.ts'
