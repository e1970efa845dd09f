/** Listens to the SIGBUS guard: a front-end that truncates the memory it shared ends its session, not the daemon. */
import { native } from '../native.ts'
import { Readiness } from './readiness.ts'

/** The guard has one eventfd for the whole process, which can be watched once; a program may run several daemons. */
const listeners = new Set<MemoryFaults>()
let readiness: Readiness | undefined

export class MemoryFaults implements Disposable {
  readonly #onFault: () => void

  /** @param onFault called after one or more mappings lost pages, of whichever daemon of this process */
  constructor(onFault: () => void) {
    this.#onFault = onFault
    if (readiness === undefined) {
      const fd = native.faultEventFd()
      readiness = new Readiness(fd)
      void listen(fd, readiness)
    }
    listeners.add(this)
  }

  tell(): void {
    this.#onFault()
  }

  [Symbol.dispose](): void {
    if (!listeners.delete(this) || listeners.size > 0) return
    readiness?.dispose()
    readiness = undefined
  }
}

/** Until nobody wants to hear of it. */
async function listen(fd: number, own: Readiness): Promise<void> {
  while (readiness === own) {
    await own.wait()
    if (native.eventfdRead(fd) > 0) for (const listener of listeners) listener.tell()
  }
}
