/**
 * A boot sector for the firmware test, assembled by hand: 16-bit code that prints a greeting to COM1, reads two places
 * of the disk through the BIOS (int 13h, ah=42h, which SeaBIOS serves with its own virtio driver), prints what stood
 * there and leaves QEMU through isa-debug-exit. Pure bytes; knows nothing of QEMU's command line beyond that port.
 */

/** Where the sector is loaded, and where its parts lie in it. */
const base = 0x7c00
const printAt = 0x80
const failAt = 0xa0
const packetsAt = 0x100
const greetingAt = 0x140
const errorAt = 0x180

/** What the sector writes to port 0xf4; isa-debug-exit ends QEMU with value * 2 + 1. */
export const exitPort = 0xf4
export const bootedExitCode = 0x10 * 2 + 1
export const readFailedExitCode = 0x11 * 2 + 1

export interface SectorRun {
  readonly lba: number
  readonly sectors: number
  /** Where in the first 64 KiB of memory it goes. */
  readonly address: number
}

/** 512 bytes that print `greeting`, then the NUL-terminated text in each of the runs. */
export function bootSector(greeting: string, runs: readonly SectorRun[]): Uint8Array {
  if (runs.length > 4 || greeting.length >= errorAt - greetingAt) throw new RangeError('does not fit into the sector')
  const sector = new Uint8Array(512)
  const view = new DataView(sector.buffer)
  let at = 0
  const emit = (...bytes: number[]): void => {
    sector.set(bytes, at)
    at += bytes.length
  }
  const word = (value: number): [number, number] => [value & 0xff, (value >> 8) & 0xff]
  const print = (address: number): void => {
    emit(0xbe, ...word(address)) //                   mov si, address
    emit(0xe8, ...word(printAt - (at + 3))) //        call print
  }
  const exit = (value: number): void => {
    emit(0xb0, value, 0xe6, exitPort) //              mov al, value; out exitPort, al
    emit(0xf4, 0xeb, 0xfd) //                         hlt; jmp $-1
  }

  emit(0xfa, 0x31, 0xc0) //                           cli; xor ax, ax
  emit(0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0) //         mov ds, ax; mov es, ax; mov ss, ax
  emit(0xbc, ...word(base), 0xfb, 0xfc) //            mov sp, base; sti; cld
  print(base + greetingAt)
  runs.forEach((run, index) => {
    const packet = packetsAt + index * 16
    view.setUint8(packet, 16)
    view.setUint16(packet + 2, run.sectors, true)
    view.setUint16(packet + 4, run.address, true)
    view.setBigUint64(packet + 8, BigInt(run.lba), true)
    emit(0xbe, ...word(base + packet)) //             mov si, packet (dl is the drive, from the BIOS)
    emit(0xb4, 0x42, 0xcd, 0x13) //                   mov ah, 42h; int 13h
    emit(0x0f, 0x82, ...word(failAt - (at + 4))) //   jc fail
    print(run.address)
  })
  exit(0x10)
  if (at > printAt) throw new RangeError('does not fit into the sector')

  at = failAt
  print(base + errorAt)
  exit(0x11)

  at = printAt
  emit(0x52) //                                       push dx
  emit(0xac, 0x84, 0xc0, 0x74, 0x12) //         next: lodsb; test al, al; jz done
  emit(0x88, 0xc4, 0xba, 0xfd, 0x03) //               mov ah, al; mov dx, 3fdh
  emit(0xec, 0xa8, 0x20, 0x74, 0xfb) //         wait: in al, dx; test al, 20h; jz wait
  emit(0x88, 0xe0, 0xba, 0xf8, 0x03, 0xee) //         mov al, ah; mov dx, 3f8h; out dx, al
  emit(0xeb, 0xe9) //                                 jmp next
  emit(0x5a, 0xc3) //                           done: pop dx; ret

  sector.set(Buffer.from(`${greeting}\0`, 'latin1'), greetingAt)
  sector.set(Buffer.from('read failed\n\0', 'latin1'), errorAt)
  sector.set([0x55, 0xaa], 510)
  return sector
}
