/** Child processes that don't outlive the one that started them. */
import { type ChildProcess, type SpawnOptions, spawn } from 'node:child_process'
import { findCommand } from './guest-files.ts'

/**
 * Starts a program that the kernel ends when this process dies, however it dies; a test run that is killed leaves no
 * QEMU. setpriv replaces itself by the program, so the child's pid is the program's.
 */
export function spawnTied(command: string, args: readonly string[], options: SpawnOptions): ChildProcess {
  const setpriv = findCommand('setpriv')
  if (setpriv === undefined) return spawn(command, args, options)
  return spawn(setpriv, ['--pdeathsig', 'KILL', '--', command, ...args], options)
}
