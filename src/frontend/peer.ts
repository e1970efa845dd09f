/**
 * What /proc says about the process behind a socket: its name and the CPU time it used. It must not know vhost-user.
 */
import { readdirSync, readFileSync } from 'node:fs'
import { basename } from 'node:path'

/** The program behind a socket. */
export interface Peer {
  readonly pid: number
  /** The name of its executable, as in its argument vector. Node programs: the script's name. */
  readonly program: string
  /** Its version when the program is known to tell (`qemu-storage-daemon --version` is not run here): undefined. */
  readonly commandLine: readonly string[]
}

/** Describes a process, or undefined when /proc doesn't show it (another pid namespace). */
export function describePeer(pid: number): Peer | undefined {
  try {
    const commandLine = readFileSync(`/proc/${pid}/cmdline`, 'utf8')
      .split('\0')
      .filter((word) => word !== '')
    let program = basename(commandLine[0] ?? '')
    if (/^node(js)?$/.test(program)) {
      const script = commandLine.slice(1).find((word) => !word.startsWith('-'))
      if (script !== undefined) program = `node ${basename(script)}`
    }
    return { pid, program: program || readFileSync(`/proc/${pid}/comm`, 'utf8').trim(), commandLine }
  } catch {
    return undefined
  }
}

/** CPU time of a process so far. */
export interface CpuTime {
  /** Per thread, nanoseconds (schedstat); empty when the kernel keeps none. */
  readonly threads: ReadonlyMap<string, number>
  /** utime + stime of the process, exited threads included, nanoseconds in steps of 10 ms. */
  readonly total: number
}

/** Reads the clocks of a process, or undefined when it is gone. */
export function cpuTime(pid: number): CpuTime | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    const total = (Number(fields[11]) + Number(fields[12])) * 1e7 // USER_HZ is 100 on every Linux port
    const threads = new Map<string, number>()
    for (const tid of readdirSync(`/proc/${pid}/task`)) {
      try {
        threads.set(tid, Number(readFileSync(`/proc/${pid}/task/${tid}/schedstat`, 'utf8').split(' ')[0]))
      } catch {
        // The thread ended between readdir and read, or the kernel has no schedstat.
      }
    }
    return { threads, total }
  } catch {
    return undefined
  }
}

/** Nanoseconds of CPU between two readings: exact when no thread ended in between, else in steps of 10 ms. */
export function cpuBetween(before: CpuTime, after: CpuTime): number {
  let sum = 0
  for (const tid of before.threads.keys()) if (!after.threads.has(tid)) return after.total - before.total
  if (after.threads.size === 0) return after.total - before.total
  for (const [tid, time] of after.threads) sum += time - (before.threads.get(tid) ?? 0)
  return sum
}

/** Resident memory of a process in bytes, 0 when it is gone. */
export function residentBytes(pid: number): number {
  try {
    const match = /^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))
    return Number(match?.[1] ?? 0) * 1024
  } catch {
    return 0
  }
}
