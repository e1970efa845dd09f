/** virtio-blk for devices: the constants of the specification, and the serving of requests in the short style. */

export * from '../virtio/blk.ts'
export * from './blk-disk.ts'
