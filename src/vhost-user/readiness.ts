/** Waits for fds on the control thread: one native watcher for the whole process, promises on top. */
import { type NativeWatcher, native, systemError } from '../native.ts'

let watcher: NativeWatcher | undefined
let nextId = 1
const callbacks = new Map<number, () => void>()

function open(): NativeWatcher {
  watcher ??= native.createWatcher((id) => callbacks.get(id)?.())
  if (callbacks.size === 0) watcher.ref()
  return watcher
}

/** One fd that somebody waits for. The fd's owner disposes this before it closes the fd. */
export class Readiness {
  readonly #fd: number
  readonly #id = nextId++
  #armed = false
  #wake: (() => void) | undefined

  /** @throws a system error when the fd cannot be polled */
  constructor(fd: number) {
    this.#fd = fd
    const result = open().add(fd, this.#id)
    if (result < 0) throw systemError(result, 'epoll_ctl', `cannot watch fd ${fd}`)
    this.#armed = true
    callbacks.set(this.#id, () => {
      this.#armed = false
      this.wake()
    })
  }

  /** Resolves when the fd is readable, or when `wake` or `dispose` was called. One waiter at a time. */
  wait(): Promise<void> {
    return new Promise((resolve) => {
      this.#wake = resolve
      if (!callbacks.has(this.#id)) return this.wake()
      if (!this.#armed) {
        this.#armed = true
        watcher!.arm(this.#fd, this.#id)
      }
    })
  }

  /** Ends the current wait. */
  wake(): void {
    const wake = this.#wake
    this.#wake = undefined
    wake?.()
  }

  dispose(): void {
    if (!callbacks.delete(this.#id)) return
    watcher!.remove(this.#fd)
    // The helper thread stays for the next one; it just doesn't keep the process alive.
    if (callbacks.size === 0) watcher!.unref()
    this.wake()
  }
}
