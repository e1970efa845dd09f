/** The ways in which a hostile guest breaks a packed ring, as a table. It must not know what has to hold afterwards. */
import { VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE } from '../../virtio/constants.ts'
import type { GuestBuffer, GuestMemory } from '../memory.ts'
import type { PackedDriver } from '../packed-driver.ts'
import { RING_SIZE } from '../verify/attacks.ts'

const NEXT = VIRTQ_DESC_F_NEXT
const WRITE = VIRTQ_DESC_F_WRITE
const INDIRECT = VIRTQ_DESC_F_INDIRECT

export interface PackedVictim {
  readonly memory: GuestMemory
  readonly ring: PackedDriver
  /** What the device is to read, 8192 bytes of data, a status byte, 64 KiB for indirect tables. */
  readonly header: GuestBuffer
  readonly data: GuestBuffer
  readonly status: GuestBuffer
  readonly table: GuestBuffer
}

export interface PackedAttack {
  readonly name: string
  readonly title: string
  /** The device may also answer the chain with an error. */
  readonly mayAnswer?: boolean
  /** It may answer it in any way. */
  readonly mayServe?: boolean
  readonly indirect?: boolean
  readonly run: (victim: PackedVictim) => void
}

interface Entry {
  readonly address: number | bigint
  readonly length: number
  readonly id: number
  readonly flags: number
}

function go({ ring }: PackedVictim, ...entries: Entry[]): void {
  ring.issueRaw(entries)
  ring.publishRaw()
}

/** The three descriptors of a request; `change` alters the middle one. */
function chain({ header, data, status }: PackedVictim, change: Partial<Entry> = {}): Entry[] {
  return [
    { address: header.gpa, length: header.length, id: 0, flags: NEXT },
    { address: data.gpa, length: 512, id: 0, flags: NEXT | WRITE, ...change },
    { address: status.gpa, length: 1, id: 0, flags: WRITE },
  ]
}

function viaTable(victim: PackedVictim, length: number, flags = INDIRECT): void {
  const { table } = victim
  const view = new DataView(table.bytes.buffer, table.bytes.byteOffset)
  for (const [i, entry] of chain(victim).entries()) {
    view.setBigUint64(16 * i, BigInt(entry.address), true)
    view.setUint32(16 * i + 8, entry.length, true)
    view.setUint16(16 * i + 14, entry.flags & WRITE, true)
  }
  go(victim, { address: table.gpa, length, id: 0, flags })
}

/** A chain whose data descriptor is bad. */
function bad(name: string, title: string, change: (victim: PackedVictim) => Partial<Entry>): PackedAttack {
  return { name, title, mayAnswer: true, run: (victim) => go(victim, ...chain(victim, change(victim))) }
}

export const PACKED_ATTACKS: readonly PackedAttack[] = [
  {
    name: 'endless',
    title: 'a chain without an end: NEXT in every descriptor of the ring',
    run: (victim) => {
      const entry = { address: victim.header.gpa, length: 16, id: 0, flags: NEXT }
      go(victim, ...new Array<Entry>(RING_SIZE).fill(entry))
    },
  },
  {
    name: 'id-out-of-range',
    title: 'a buffer id beyond the ring',
    // An id is the driver's own affair as long as it comes back as it is.
    mayServe: true,
    run: (victim) => {
      const entries = chain(victim)
      go(victim, ...entries.slice(0, 2), { ...(entries[2] as Entry), id: RING_SIZE })
    },
  },
  {
    name: 'id-65535',
    title: 'buffer id 65535',
    mayServe: true,
    run: (victim) => {
      const entries = chain(victim)
      go(victim, ...entries.slice(0, 2), { ...(entries[2] as Entry), id: 0xffff })
    },
  },
  bad('address-outside', 'a buffer outside guest memory', () => ({ address: 2 ** 45 })),
  bad('address-straddles-end', 'a buffer that runs out of its region', ({ memory }) => ({
    address: memory.region(0).gpa + memory.region(0).size - 256,
  })),
  bad('address-overflow', 'a buffer whose address plus length passes 2^64', () => ({ address: 2n ** 64n - 256n })),
  bad('length-4g', 'a buffer of 2^32 − 1 bytes', () => ({ length: 0xffff_ffff })),
  {
    name: 'readable-after-writable',
    title: 'a device-readable descriptor after a device-writable one',
    mayAnswer: true,
    run: (victim) =>
      go(
        victim,
        { address: victim.status.gpa, length: 1, id: 0, flags: NEXT | WRITE },
        { address: victim.header.gpa, length: victim.header.length, id: 0, flags: 0 }
      ),
  },
  {
    name: 'zero-length',
    title: 'a descriptor of length 0',
    mayServe: true,
    run: (victim) => go(victim, ...chain(victim, { length: 0 })),
  },
  {
    name: 'indirect-in-chain',
    title: 'an indirect descriptor in a chain',
    indirect: true,
    mayServe: true,
    run: (victim) => {
      const [header] = chain(victim)
      go(victim, header as Entry, { address: victim.table.gpa, length: 48, id: 0, flags: INDIRECT })
    },
  },
  {
    name: 'indirect-and-next',
    title: 'a descriptor that is indirect and has a successor',
    indirect: true,
    mayServe: true,
    run: (victim) => {
      viaTable(victim, 48, INDIRECT | NEXT)
    },
  },
  {
    name: 'indirect-odd-length',
    title: 'an indirect table whose length is no multiple of 16',
    indirect: true,
    mayAnswer: true,
    run: (victim) => viaTable(victim, 47),
  },
  {
    name: 'indirect-empty',
    title: 'an empty indirect table',
    indirect: true,
    mayAnswer: true,
    run: (victim) => viaTable(victim, 0),
  },
  {
    name: 'indirect-outside',
    title: 'an indirect table outside guest memory',
    indirect: true,
    mayAnswer: true,
    run: (victim) => go(victim, { address: 2 ** 45, length: 48, id: 0, flags: INDIRECT }),
  },
  {
    name: 'indirect-huge',
    title: 'an indirect table of almost 4 GiB',
    indirect: true,
    mayAnswer: true,
    run: (victim) => viaTable(victim, 0xffff_fff0),
  },
]
