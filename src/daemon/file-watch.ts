/**
 * Tells when the content of files changes: those of a device module under `--watch`. Their directories are what is
 * watched, since editors replace a file by renaming another one; a file that was only touched is no news.
 */
import { createHash } from 'node:crypto'
import { type FSWatcher, readFileSync, realpathSync, statSync, watch } from 'node:fs'
import { basename, dirname, join } from 'node:path'

/** What belongs together is often written in several steps, and several files. In milliseconds. */
const SETTLE_MS = 50

/** Names of files that a module can import. */
const IMPORTABLE = /\.([cm]?[jt]s|json|node|wasm)$/

export interface FileWatchEvents {
  changed(): void
  /** A directory can't be watched: its changes go unnoticed. */
  failed(directory: string, error: Error): void
}

export class FileWatch implements Disposable {
  readonly #events: FileWatchEvents
  /** What each file held when that was looked at last. */
  #files = new Map<string, string>()
  /** By directory. */
  readonly #watchers = new Map<string, { readonly watcher: FSWatcher; readonly inode: number }>()
  /** Every file in the directories counts: what is missing may come. */
  #eager = false
  #surely = false
  #timer: NodeJS.Timeout | undefined
  #closed = false

  constructor(events: FileWatchEvents) {
    this.#events = events
  }

  /** Watches these from now on, in place of those before. Changes that are not told yet of those that stay will be. */
  watch(files: readonly string[]): void {
    // Somebody may replace the link, or what it leads to.
    const all = files.flatMap((file) => [file, real(file)])
    const before = this.#files
    this.#files = new Map(all.map((file) => [file, before.get(file) ?? '']))
    // First the watch, then the look.
    this.#watchDirectories()
    for (const file of all) if (!before.has(file)) this.#files.set(file, contentOf(file))
    this.#eager = false
  }

  /** It is not known what the files import now: any other file in their directories counts as well, until `watch`. */
  watchAll(): void {
    this.#eager = true
  }

  [Symbol.dispose](): void {
    this.#closed = true
    clearTimeout(this.#timer)
    for (const { watcher } of this.#watchers.values()) watcher.close()
    this.#watchers.clear()
  }

  #watchDirectories(): void {
    const directories = new Set([...this.#files.keys()].map((file) => dirname(file)))
    for (const [directory, { watcher, inode }] of this.#watchers) {
      if (directories.has(directory) && inode === inodeOf(directory)) continue
      watcher.close()
      this.#watchers.delete(directory)
    }
    for (const directory of directories) if (!this.#watchers.has(directory)) this.#watchDirectory(directory)
  }

  #watchDirectory(directory: string): void {
    const failed = (error: Error): void => {
      this.#watchers.get(directory)?.watcher.close()
      this.#watchers.delete(directory)
      this.#events.failed(directory, error)
    }
    try {
      const watcher = watch(directory, { persistent: false }, (_, name) => this.#seen(directory, name))
      watcher.on('error', failed)
      this.#watchers.set(directory, { watcher, inode: inodeOf(directory) })
    } catch (error) {
      failed(error as Error)
    }
  }

  /** @param name null: something in the directory; its own name: the directory itself */
  #seen(directory: string, name: string | null): void {
    if (name === null || name === basename(directory) || this.#files.has(join(directory, name))) this.#settle(false)
    else if (this.#eager && IMPORTABLE.test(name)) this.#settle(true)
  }

  /** @param surely something is new, whatever the files hold */
  #settle(surely: boolean): void {
    this.#surely ||= surely
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.#look(), SETTLE_MS).unref()
  }

  #look(): void {
    if (this.#closed) return
    // One may have been moved away and made anew, and with it what is watched.
    this.#watchDirectories()
    const now = new Map([...this.#files.keys()].map((file) => [file, contentOf(file)]))
    const changed = this.#surely || [...now].some(([file, content]) => content !== this.#files.get(file))
    this.#surely = false
    this.#files = now
    if (changed) this.#events.changed()
  }
}

/** A fingerprint of what a file holds; empty when it is not there. */
function contentOf(file: string): string {
  try {
    return createHash('sha256').update(readFileSync(file)).digest('hex')
  } catch {
    return ''
  }
}

function real(file: string): string {
  try {
    return realpathSync(file)
  } catch {
    return file
  }
}

function inodeOf(directory: string): number {
  return statSync(directory, { throwIfNoEntry: false })?.ino ?? -1
}
