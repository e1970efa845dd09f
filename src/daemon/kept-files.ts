/**
 * The open files that the devices of a daemon promised to a successor, and those that a predecessor promised to this
 * one. It must not know what they are.
 */
import type { HandoverFiles, InheritedFiles } from '../device/index.ts'
import { closeFds } from '../vhost-user/fd-channel.ts'

export class KeptFiles implements HandoverFiles, Disposable {
  readonly #kept = new Map<string, InheritedFiles>()
  readonly #inherited: Map<string, InheritedFiles>

  /** @param inherited by key; takes over the fds */
  constructor(inherited: ReadonlyMap<string, InheritedFiles> = new Map()) {
    this.#inherited = new Map(inherited)
  }

  keep(key: string, fds: readonly number[], facts: unknown): void {
    this.#kept.set(key, { fds: [...fds], facts })
  }

  forget(key: string): void {
    this.#kept.delete(key)
  }

  take(key: string): InheritedFiles | undefined {
    const found = this.#inherited.get(key)
    this.#inherited.delete(key)
    return found
  }

  /** What a predecessor kept and nobody has taken, of the keys that begin with `prefix`; without that. */
  waiting(prefix: string): [key: string, files: InheritedFiles][] {
    const found = [...this.#inherited].filter(([key]) => key.startsWith(prefix))
    return found.map(([key, files]) => [key.slice(prefix.length), files])
  }

  /** What a successor gets. */
  get kept(): ReadonlyMap<string, InheritedFiles> {
    return this.#kept
  }

  /** Closes what no device took. */
  [Symbol.dispose](): void {
    for (const { fds } of this.#inherited.values()) closeFds(fds)
    this.#inherited.clear()
  }
}
