/** Requests of SCSI, vsock and input as a hostile driver makes them: nearly right. It writes bytes at offsets. */
import type { Random } from './random.ts'
import { GUEST_CID } from './victims.ts'

/** Operation codes that a disk knows, and some that none does. */
const OPCODES = [
  0, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x1a, 0x1b, 0x25, 0x28, 0x2a, 0x2e, 0x2f, 0x35, 0x41, 0x42, 0x55, 0x5a, 0x5e, 0x5f,
  0x88, 0x8a, 0x8f, 0x91, 0x93, 0x9e, 0xa0, 0xa3, 0xff,
]

/** A command or a task management function for unit 0, or nearly so. */
export function fillScsi(random: Random, view: DataView, at: number, purpose: 'command' | 'task'): void {
  const lun = purpose === 'command' ? at : at + 8
  for (let i = 0; i < 51; i++) view.setUint8(at + i, random.one(6) ? random.next() : 0)
  view.setUint32(lun, random.one(10) ? random.next() : 0x0000_0001, true)
  view.setUint32(lun + 4, 0, true)
  // Tags are used again, so that there is something to abort.
  const tag = purpose === 'command' ? at + 8 : at + 16
  view.setUint32(tag, random.below(4), true)
  view.setUint32(tag + 4, 0, true)
  if (purpose === 'task') {
    view.setUint32(at, random.one(8) ? random.odd32() : random.below(3), true)
    view.setUint32(at + 4, random.one(8) ? random.odd32() : random.below(8), true)
    return
  }
  view.setUint8(at + 19, random.one(8) ? random.next() : random.pick(OPCODES))
  // Where and how much, of CDBs of 10 and of 16 bytes.
  if (!random.one(4)) view.setUint16(at + 21, 0)
  view.setUint16(at + 23, random.one(4) ? random.odd32() : random.below(8192))
  view.setUint16(at + 26, random.one(4) ? random.odd32() : random.below(9))
  view.setUint32(at + 29, random.one(4) ? random.odd32() : random.below(4096))
}

/** What its guest types. */
const COMMANDS = ['key a down', 'key a up', 'press b', 'leds', 'type x', 'help', '', 'nonsense'].map((line) =>
  Buffer.from(`${line}\n`)
)

/** A packet of one of few connections, from port 0 … 3 of the guest to port 1 of the host, mostly. */
export function fillVsock(random: Random, view: DataView, at: number): void {
  const text = random.pick(COMMANDS)
  const words: readonly number[] = [
    random.one(20) ? random.odd32() : GUEST_CID,
    random.one(40) ? random.odd32() : 0,
    random.one(20) ? random.odd32() : 2,
    0,
    random.one(20) ? random.odd32() : random.below(4),
    random.one(20) ? random.odd32() : random.one(6) ? 2 : 1,
    random.one(10) ? random.odd32() : random.one(3) ? 0 : text.length,
    0,
    random.one(12) ? random.odd32() : random.below(4),
    random.one(6) ? random.odd32() : 65_536,
    random.one(6) ? random.odd32() : 0,
  ]
  for (const [i, word] of words.entries()) view.setUint32(at + 4 * i, word, true)
  view.setUint16(at + 28, random.one(20) ? random.next() : 1, true)
  view.setUint16(at + 30, random.one(20) ? random.next() : random.pick([1, 1, 2, 3, 4, 5, 5, 5, 5, 5, 6, 7]), true)
  for (let i = 0; i < 20; i++) view.setUint8(at + 44 + i, text[i] ?? 0x0a)
}

/** What a guest says to its keyboard: an LED goes on or off. */
export function fillStatus(random: Random, view: DataView, at: number): void {
  view.setUint16(at, random.one(6) ? random.odd32() : 0x11, true)
  view.setUint16(at + 2, random.one(6) ? random.odd32() : random.below(4), true)
  view.setUint32(at + 4, random.below(2), true)
}
