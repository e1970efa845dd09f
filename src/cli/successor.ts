/**
 * Starts the new process of a handover: this program again, as it is installed now, with the arguments of this
 * process.
 */
import { spawn } from 'node:child_process'
import { HANDOVER_FD, HandoverError } from '../daemon/handover-messages.ts'
import type { LaunchedProcess } from '../daemon/successor.ts'

/** Where the new process finds its end of the channel: behind standard error. */
const FD = 3

/** @param fd the new process's end of the channel @throws HandoverError when no process can follow this one */
export function launchSuccessor(fd: number): LaunchedProcess {
  refuseWhereItWouldEnd()
  const child = spawn(process.execPath, [...process.execArgv, ...process.argv.slice(1)], {
    stdio: ['inherit', 'inherit', 'inherit', fd],
    env: { ...process.env, [HANDOVER_FD]: String(FD) },
  })
  const ended = new Promise<string>((resolve) => {
    child.once('error', (error) => resolve(error.message))
    child.once('exit', (code, signal) => resolve(code === null ? `killed by ${signal}` : `exit code ${code}`))
  })
  // It outlives this process.
  child.unref()
  if (child.pid === undefined) throw new HandoverError(`${process.execPath} can't be started`)
  return { pid: child.pid, ended, kill: () => void child.kill('SIGKILL') }
}

/** Where the end of this process is the end of all. @throws HandoverError */
function refuseWhereItWouldEnd(): void {
  if (process.pid === 1) throw new HandoverError('this is the first process of its container, which ends with it')
  const { SYSTEMD_EXEC_PID: started, NOTIFY_SOCKET: notify } = process.env
  if (started === String(process.pid) && notify === undefined) {
    throw new HandoverError(
      'systemd would end the new process together with this one: the unit needs Type=notify, so that it can be told'
    )
  }
}

/** The fd that a predecessor passed, once; undefined: there is none. */
export function takeHandoverFd(): number | undefined {
  const text = process.env[HANDOVER_FD]
  delete process.env[HANDOVER_FD]
  return text === undefined || !/^\d{1,6}$/.test(text) ? undefined : Number(text)
}
