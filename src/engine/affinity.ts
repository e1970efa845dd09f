/** Which processors the process may use. */
import { readFileSync } from 'node:fs'

/** The CPU numbers of /proc/self/status, `Cpus_allowed_list`: `0-3,8`. */
export function allowedCpus(): Set<number> {
  const list = /^Cpus_allowed_list:\s*(\S+)/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1] ?? ''
  const cpus = new Set<number>()
  for (const range of list.split(',')) {
    const [first = Number.NaN, last = first] = range.split('-').map(Number)
    for (let cpu = first; cpu <= last; cpu++) cpus.add(cpu)
  }
  return cpus
}
