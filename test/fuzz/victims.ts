/** The devices that are fuzzed. */
export const BLK_QUEUES = 16
export const NET_PAIRS = 4
export const SCSI_QUEUES = 4
/** The devices for the fuzzers, and how many queues each has. `module` is victim-module.ts. */
export const VICTIMS = {
  blk: BLK_QUEUES,
  net: 2 * NET_PAIRS + 1,
  scsi: 2 + SCSI_QUEUES,
  rng: 1,
  vsock: 3,
  input: 2,
  module: 5,
} as const
export type Victim = keyof typeof VICTIMS
export const VICTIM_NAMES = Object.keys(VICTIMS) as readonly Victim[]
/** Of the guest of the vsock. */
export const GUEST_CID = 3
