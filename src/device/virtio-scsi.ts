/** The constants of virtio-scsi, for devices: they import from `src/device` only. */
export * from '../virtio/scsi.ts'
