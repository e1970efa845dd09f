/** The ways in which a hostile guest breaks a ring, as a table. `hostile.ts` makes cases of them. It must not know what has to hold afterwards. */
import { VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE } from '../../virtio/constants.ts'
import type { GuestBuffer } from '../memory.ts'
import type { Session } from '../session.ts'
import type { SplitDriver } from '../split-driver.ts'

/** Entries of the victim's ring. */
export const RING_SIZE = 16

const NEXT = VIRTQ_DESC_F_NEXT
const WRITE = VIRTQ_DESC_F_WRITE
const INDIRECT = VIRTQ_DESC_F_INDIRECT

/** What a hostile case works with: the victim's ring and valid pieces to build from. */
export interface Victim {
  readonly session: Session
  readonly ring: SplitDriver
  /** A valid header (read), 4096 bytes of data, a status byte, 64 KiB for indirect tables. */
  readonly header: GuestBuffer
  readonly data: GuestBuffer
  readonly status: GuestBuffer
  readonly table: GuestBuffer
  /** Makes head 0 available and kicks. */
  go(head?: number): void
  /** Writes a descriptor into the table. */
  entry(index: number, address: number | bigint, length: number, flags: number, next: number): void
}

/** @param request the header of a valid read. @param ring the split ring to attack; default the one of queue 0 */
export function makeVictim(session: Session, request: Uint8Array, ring = session.queue(0).split): Victim {
  const { memory } = session
  const header = memory.allocate(request.length, 16)
  header.bytes.set(request)
  const status = memory.allocate(16, 16)
  status.bytes[0] = 0xa5
  const table = memory.allocate(65536, 16)
  return {
    session,
    ring,
    header,
    status,
    table,
    data: memory.allocate(8192, 4096),
    go: (head = 0) => {
      ring.issueRaw(head)
      ring.publishRaw(ring.availableIndex)
    },
    entry: (index, address, length, flags, next) => {
      const view = new DataView(table.bytes.buffer, table.bytes.byteOffset + index * 16, 16)
      view.setBigUint64(0, BigInt(address), true)
      view.setUint32(8, length, true)
      view.setUint16(12, flags, true)
      view.setUint16(14, next, true)
    },
  }
}

export interface Attack {
  readonly name: string
  readonly title: string
  /** The device may also answer the chain with an error. */
  readonly mayAnswer?: boolean
  /** It may answer it in any way. */
  readonly mayServe?: boolean
  readonly indirect?: boolean
  readonly run: (victim: Victim) => void
}

/** The three valid descriptors of a read from `first` on. */
function validChain({ ring, header, data, status }: Victim, first = 0): void {
  ring.writeDescriptor(first, header.gpa, 16, NEXT, first + 1)
  ring.writeDescriptor(first + 1, data.gpa, 512, NEXT | WRITE, first + 2)
  ring.writeDescriptor(first + 2, status.gpa, 1, WRITE, 0)
}

/** Descriptor 0 points to the table. */
function viaTable(victim: Victim, bytes: number, flags = INDIRECT): void {
  victim.ring.writeDescriptor(0, victim.table.gpa, bytes, flags, 1)
  victim.go()
}

function validTable(victim: Victim): void {
  victim.entry(0, victim.header.gpa, 16, NEXT, 1)
  victim.entry(1, victim.data.gpa, 512, NEXT | WRITE, 2)
  victim.entry(2, victim.status.gpa, 1, WRITE, 0)
}

export const ATTACKS: readonly Attack[] = [
  {
    name: 'loop',
    title: 'descriptors that form a loop',
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(2, victim.data.gpa, 512, NEXT | WRITE, 1)
      victim.go()
    },
  },
  {
    name: 'self-loop',
    title: 'a descriptor that is its own successor',
    run: (victim) => {
      victim.ring.writeDescriptor(0, victim.header.gpa, 16, NEXT, 0)
      victim.go()
    },
  },
  { name: 'head-out-of-range', title: 'a head beyond the ring', run: (victim) => victim.go(RING_SIZE) },
  { name: 'head-65535', title: 'head 65535', run: (victim) => victim.go(65535) },
  {
    name: 'next-out-of-range',
    title: 'a successor beyond the ring',
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, victim.data.gpa, 512, NEXT | WRITE, 65535)
      victim.go()
    },
  },
  {
    name: 'avail-jump',
    title: 'an available index more than a ring ahead',
    run: (victim) => {
      validChain(victim)
      victim.ring.publishRaw(victim.ring.availableIndex + RING_SIZE + 1)
    },
  },
  {
    name: 'avail-backwards',
    title: 'an available index that goes backwards',
    run: (victim) => victim.ring.publishRaw(victim.ring.availableIndex - 1),
  },
  {
    name: 'address-outside',
    title: 'a data buffer outside guest memory',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, 2 ** 45, 512, NEXT | WRITE, 2)
      victim.go()
    },
  },
  {
    name: 'address-straddles-end',
    title: 'a data buffer that runs out of its region',
    mayAnswer: true,
    run: (victim) => {
      const region = victim.session.memory.region(0)
      validChain(victim)
      victim.ring.writeDescriptor(1, region.gpa + region.size - 256, 512, NEXT | WRITE, 2)
      victim.go()
    },
  },
  {
    name: 'address-overflow',
    title: 'a data buffer whose address plus length passes 2^64',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, 2n ** 64n - 256n, 512, NEXT | WRITE, 2)
      victim.go()
    },
  },
  {
    name: 'address-wraps-into-memory',
    title: 'a data buffer that begins near 2^64 and would wrap around into memory',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, 2n ** 64n - 4096n, 0xffff_ffff, NEXT | WRITE, 2)
      victim.go()
    },
  },
  {
    name: 'length-4g',
    title: 'a data buffer of 2^32 − 1 bytes',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, victim.data.gpa, 0xffff_ffff, NEXT | WRITE, 2)
      victim.go()
    },
  },
  {
    name: 'header-outside',
    title: 'a header outside guest memory',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(0, 2 ** 45, 16, NEXT, 1)
      victim.go()
    },
  },
  {
    name: 'status-outside',
    title: 'a status byte outside guest memory',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(2, 2 ** 45, 1, WRITE, 0)
      victim.go()
    },
  },
  {
    name: 'readable-after-writable',
    title: 'a device-readable descriptor after a device-writable one',
    mayAnswer: true,
    run: (victim) => {
      victim.ring.writeDescriptor(0, victim.status.gpa, 1, NEXT | WRITE, 1)
      victim.ring.writeDescriptor(1, victim.header.gpa, 16, 0, 0)
      victim.go()
    },
  },
  {
    name: 'zero-length',
    title: 'a descriptor of length 0',
    mayServe: true,
    run: (victim) => {
      victim.ring.writeDescriptor(0, victim.header.gpa, 16, NEXT, 1)
      victim.ring.writeDescriptor(1, victim.data.gpa, 0, NEXT | WRITE, 2)
      victim.ring.writeDescriptor(2, victim.status.gpa, 1, WRITE, 0)
      victim.go()
    },
  },
  {
    name: 'unknown-flags',
    title: 'a descriptor with unknown flags',
    mayServe: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, victim.data.gpa, 512, NEXT | WRITE | 0xfff8, 2)
      victim.go()
    },
  },
  {
    name: 'indirect-in-indirect',
    title: 'an indirect descriptor in an indirect table',
    indirect: true,
    run: (victim) => {
      validTable(victim)
      victim.entry(1, victim.table.gpa + 1024, 48, INDIRECT | NEXT, 2)
      viaTable(victim, 48)
    },
  },
  {
    name: 'indirect-and-next',
    title: 'a descriptor that is indirect and has a successor',
    indirect: true,
    mayServe: true,
    run: (victim) => {
      validTable(victim)
      victim.ring.writeDescriptor(1, victim.data.gpa, 512, WRITE, 0)
      viaTable(victim, 48, INDIRECT | NEXT)
    },
  },
  {
    name: 'indirect-odd-length',
    title: 'an indirect table whose length is no multiple of 16',
    indirect: true,
    run: (victim) => {
      validTable(victim)
      viaTable(victim, 47)
    },
  },
  { name: 'indirect-empty', title: 'an empty indirect table', indirect: true, run: (victim) => viaTable(victim, 0) },
  {
    name: 'indirect-loop',
    title: 'a loop in an indirect table',
    indirect: true,
    run: (victim) => {
      validTable(victim)
      victim.entry(2, victim.data.gpa, 512, NEXT | WRITE, 1)
      viaTable(victim, 48)
    },
  },
  {
    name: 'indirect-next-out-of-range',
    title: 'a successor beyond the indirect table',
    indirect: true,
    run: (victim) => {
      validTable(victim)
      victim.entry(1, victim.data.gpa, 512, NEXT | WRITE, 3)
      viaTable(victim, 48)
    },
  },
  {
    name: 'indirect-outside',
    title: 'an indirect table outside guest memory',
    indirect: true,
    run: (victim) => {
      victim.ring.writeDescriptor(0, 2 ** 45, 48, INDIRECT, 0)
      victim.go()
    },
  },
  {
    name: 'indirect-huge',
    title: 'an indirect table of almost 4 GiB',
    indirect: true,
    run: (victim) => viaTable(victim, 0xffff_fff0),
  },
  {
    name: 'indirect-long',
    title: 'a chain of 4096 one-byte descriptors in an indirect table, longer than the ring and than seg_max',
    indirect: true,
    mayServe: true,
    run: (victim) => {
      victim.entry(0, victim.header.gpa, 16, NEXT, 1)
      for (let i = 1; i < 4095; i++) victim.entry(i, victim.data.gpa + (i % 4096), 1, NEXT | WRITE, i + 1)
      victim.entry(4095, victim.status.gpa, 1, WRITE, 0)
      viaTable(victim, 65536)
    },
  },
]
