/**
 * The open files of a device module that handovers are about: those that it keeps for a successor, and those that it has of
 * a predecessor. They belong to its thread, and end with it.
 */
import { fstatSync } from 'node:fs'
import type { InheritedFiles } from '../device/index.ts'
import { closeFds } from '../vhost-user/fd-channel.ts'
import type { KeptFiles } from './kept-files.ts'
import type { ModuleReport } from './module-messages.ts'

export class ModuleFiles {
  readonly #files: KeptFiles
  /** Of keys: those of two modules may be the same. */
  readonly #prefix: string
  readonly #kept = new Set<string>()
  #inherited: { readonly fd: number; readonly file: string | undefined }[] = []

  /** @param files of the whole daemon @param device its name */
  constructor(files: KeptFiles, device: string) {
    this.#files = files
    this.#prefix = `${device}:`
  }

  /** What a predecessor kept for it. */
  get waiting(): [key: string, files: InheritedFiles][] {
    return this.#files.waiting(this.#prefix)
  }

  hear(report: Extract<ModuleReport, { kind: 'keep' | 'forget' | 'took' }>): void {
    const key = this.#prefix + report.key
    switch (report.kind) {
      case 'keep':
        this.#kept.add(key)
        return this.#files.keep(key, report.fds, report.facts)
      case 'forget':
        this.#kept.delete(key)
        return this.#files.forget(key)
      case 'took':
        for (const fd of this.#files.take(key)?.fds ?? []) this.#inherited.push({ fd, file: fileOf(fd) })
    }
  }

  /** The fds of a thread are closed when it ends: they can't be handed over any more. */
  forgetKept(): void {
    for (const key of this.#kept) this.#files.forget(key)
    this.#kept.clear()
  }

  /** Node closes what a thread opened when it dies, but not what it took over: its lock would keep out the next one. */
  closeInherited(): void {
    // The device may have closed it itself, and the number be another file's.
    const left = this.#inherited.filter(({ fd, file }) => file !== undefined && fileOf(fd) === file)
    closeFds(left.map(({ fd }) => fd))
    this.#inherited = []
  }
}

/** Which file an fd is of; undefined: it is not open. */
function fileOf(fd: number): string | undefined {
  try {
    const { dev, ino } = fstatSync(fd)
    return `${dev}:${ino}`
  } catch {
    return undefined
  }
}
