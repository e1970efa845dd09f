/** `virtiod handover PID`: asks a running daemon to hand over to a new process, and tells how that went. */
import * as v from 'valibot'
import { OutcomeReader } from '../../daemon/handover-outcome.ts'
import { ConfigError } from '../../device/errors.ts'
import type { Command } from '../command.ts'
import { EXIT_FAILURE, EXIT_OK } from '../exit-codes.ts'

/** Between two looks. In milliseconds. */
const INTERVAL_MS = 20
/** More than all limits of a handover together. In milliseconds. */
const LIMIT_MS = 60_000

export const handoverCommand: Command = {
  name: 'handover',
  description:
    'Replace a running daemon by a new process of what is installed now, with the same arguments; its configuration ' +
    'file is read again. Connections stay open and guests wait for some milliseconds. Prints the pid of the new ' +
    'process. When the new one cannot take over, the old one goes on, and this command ends with 1. The same as sending ' +
    'it SIGUSR2.',
  usage: ['PID'],
  positionals: [{ name: 'PID', description: 'the process that serves' }],
  scopes: [{ title: 'Options', table: v.strictObject({}) }],
  run: async ({ positionals }) => {
    const pid = Number(positionals[0])
    using outcome = find(pid)
    const { count } = outcome.read()
    process.kill(pid, 'SIGUSR2')
    const deadline = performance.now() + LIMIT_MS
    while (performance.now() < deadline) {
      const alive = isAlive(pid)
      const now = outcome.read()
      if (now.count > count) {
        if (now.pid === undefined) return fail(now.problem ?? 'for no known reason', true)
        process.stdout.write(`${now.pid}\n`)
        return EXIT_OK
      }
      if (!alive) return fail('the process has ended', false)
      await new Promise((resolve) => setTimeout(resolve, INTERVAL_MS))
    }
    return fail(`nothing is known after ${LIMIT_MS / 1000} s`, true)
  },
}

function fail(problem: string, alive: boolean): number {
  process.stderr.write(`virtiod: no handover: ${problem}${alive ? `. The process goes on as before.` : ''}\n`)
  return EXIT_FAILURE
}

/** A signal to anything else would end it. @throws ConfigError */
function find(pid: number): OutcomeReader {
  const refuse = (problem: string, fix: string, cause?: unknown): ConfigError =>
    new ConfigError('ERR_ARGUMENT', 'PID', problem, fix, cause === undefined ? {} : { cause })
  const fix = 'Give the pid of a virtiod that serves; it is in every line of its log.'
  if (!Number.isInteger(pid) || pid < 1) throw refuse('it is no process id', fix)
  try {
    const found = OutcomeReader.open(pid)
    if (found !== undefined) return found
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException
    if (code === 'EACCES') throw refuse(`process ${pid} is another user's`, 'Be that user, or root.', cause)
    throw refuse(`there is no process ${pid}`, fix, cause)
  }
  throw refuse(`process ${pid} is no virtiod that serves devices`, fix)
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch {
    return false
  }
}
