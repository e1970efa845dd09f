/** The constants of virtio-net, for devices: they import from `src/device` only. */
export * from '../virtio/net.ts'
