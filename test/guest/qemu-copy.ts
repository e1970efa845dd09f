/**
 * QEMU before 8.0 refuses vhost-user-input (and vhost-user-gpu) without KVM: "vhost initialization failed: requires kvm".
 * The device does not need it, and 8.0 stopped asking ("backends/vhost-user: remove the ioeventfd check"). So that guests
 * under TCG can use such a device, here is a copy of this machine's QEMU without the question. It knows no guests.
 */
import { createHash } from 'node:crypto'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join } from 'node:path'
import { cacheDirectory, findCommand } from '../../src/testing/guest-files.ts'

/** What asks, and the two variables that it looks at (backends/vhost-user.c). */
const FUNCTION = 'vhost_user_backend_dev_init'
const VARIABLES = ['kvm_allowed', 'kvm_eventfds_allowed']
const COMPLAINT = 'vhost initialization failed: requires kvm'

// x86-64: cmpb $0, displacement(%rip); je displacement; nop.
const CMPB_RIP = [0x80, 0x3d]
const CMPB_SIZE = 7
const JE = 0x74
const NOP = 0x90
/** Between the comparison and its jump the compiler may put an instruction that leaves the flags alone. */
const JUMP_WITHIN = 8

/**
 * The path of a QEMU that attaches vhost-user-input to a guest without KVM, for `GuestOptions.qemu`: the one in PATH when
 * it does so itself, or a copy of it in the cache.
 * @throws an Error when there is no QEMU, or it is one that this does not know how to change
 */
export function qemuForInput(): string {
  const original = findCommand('qemu-system-x86_64')
  if (original === undefined) throw new Error('qemu-system-x86_64 is missing (package qemu-system-x86)')
  const binary = readFileSync(original)
  if (!binary.includes(COMPLAINT)) return original
  const cache = cacheDirectory()
  const home = join(cache, `qemu-${createHash('sha256').update(binary).digest('hex').slice(0, 16)}`)
  const copy = join(home, 'bin', 'qemu-system-x86_64')
  if (existsSync(copy)) return copy
  removeCheck(binary)
  mkdirSync(cache, { recursive: true })
  const work = mkdtempSync(join(cache, '.qemu-'))
  try {
    mkdirSync(join(work, 'bin'))
    writeFileSync(join(work, 'bin', 'qemu-system-x86_64'), binary, { mode: 0o755 })
    // It looks for its firmware and modules beside its own directory.
    const prefix = dirname(dirname(realpathSync(original)))
    for (const name of ['share', 'lib']) symlinkSync(join(prefix, name), join(work, name))
    renameSync(work, home)
  } catch (error) {
    rmSync(work, { recursive: true, force: true })
    // Another process was quicker.
    if (!existsSync(copy)) throw error
  }
  return copy
}

/** Takes the jumps to the complaint out. @throws an Error when they are not found: then nothing was changed */
function removeCheck(binary: Buffer): void {
  const symbols = dynamicSymbols(binary)
  const code = symbols.get(FUNCTION)
  const variables = VARIABLES.map((name) => symbols.get(name)?.address)
  const jumps: number[] = []
  if (code !== undefined) {
    const start = fileOffset(binary, code.address)
    for (let at = start; at < start + code.size - CMPB_SIZE; at++) {
      if (binary[at] !== CMPB_RIP[0] || binary[at + 1] !== CMPB_RIP[1] || binary[at + CMPB_SIZE - 1] !== 0) continue
      const next = code.address + (at - start) + CMPB_SIZE
      if (!variables.includes(next + binary.readInt32LE(at + 2))) continue
      const jump = binary.subarray(at + CMPB_SIZE, at + CMPB_SIZE + JUMP_WITHIN).indexOf(JE)
      if (jump >= 0) jumps.push(at + CMPB_SIZE + jump)
    }
  }
  if (jumps.length !== VARIABLES.length)
    throw new Error('this QEMU asks for KVM in a way that is not known here; QEMU 8.0 does not ask')
  for (const at of jumps) binary.fill(NOP, at, at + 2)
}

interface Symbol {
  /** As the program sees it. */
  readonly address: number
  readonly size: number
}

const SHT_DYNSYM = 11
const PT_LOAD = 1

/** The symbols that QEMU has for its own modules, from an ELF file of 64 bits. */
function dynamicSymbols(elf: Buffer): Map<string, Symbol> {
  const sections = table(elf, 0x28, 0x3a)
  const found = new Map<string, Symbol>()
  const dynsym = sections.find((at) => elf.readUInt32LE(at + 4) === SHT_DYNSYM)
  if (dynsym === undefined) return found
  const strings = Number(elf.readBigUInt64LE(sections[elf.readUInt32LE(dynsym + 0x28)]! + 0x18))
  const start = Number(elf.readBigUInt64LE(dynsym + 0x18))
  const end = start + Number(elf.readBigUInt64LE(dynsym + 0x20))
  for (let at = start; at < end; at += 24) {
    const name = strings + elf.readUInt32LE(at)
    found.set(elf.toString('latin1', name, elf.indexOf(0, name)), {
      address: Number(elf.readBigUInt64LE(at + 8)),
      size: Number(elf.readBigUInt64LE(at + 16)),
    })
  }
  return found
}

/** @throws an Error when no segment of the file has the address */
function fileOffset(elf: Buffer, address: number): number {
  for (const at of table(elf, 0x20, 0x36)) {
    const [offset, start, , size] = [8, 16, 24, 32].map((field) => Number(elf.readBigUInt64LE(at + field)))
    const inside = address >= start! && address < start! + size!
    if (elf.readUInt32LE(at) === PT_LOAD && inside) return offset! + address - start!
  }
  throw new Error(`no segment has the address 0x${address.toString(16)}`)
}

/** Offsets of the entries of a table. @param field of its own offset in the ELF header @param sizes of entry size, count */
function table(elf: Buffer, field: number, sizes: number): number[] {
  const start = Number(elf.readBigUInt64LE(field))
  const size = elf.readUInt16LE(sizes)
  return Array.from({ length: elf.readUInt16LE(sizes + 2) }, (_, i) => start + i * size)
}
