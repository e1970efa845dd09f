/** `--watch`: reloads a device's module when one of its files changes; one reload after the other, the last content wins. */
import { FileWatch } from './file-watch.ts'
import type { Logger } from './log.ts'
import type { ModuleDevice } from './module-device.ts'
import { pathOf } from './module-failure.ts'
import { type ReloadServer, reloadModule, StuckVersion } from './module-reload.ts'

export class ModuleWatch implements Disposable {
  /** Reloads so far; with those of a module that had to start again. */
  readonly counts = { ok: 0, failed: 0 }
  readonly #device: ModuleDevice
  readonly #server: ReloadServer
  readonly #log: Logger
  readonly #files: FileWatch
  #running = false
  #closed = false

  /** @param device is open, and stays so until this is disposed of */
  constructor(device: ModuleDevice, server: ReloadServer, log: Logger) {
    this.#device = device
    this.#server = server
    this.#log = log
    this.#files = new FileWatch({
      changed: () => void this.#changed(),
      failed: (directory, error) => log.warn({ err: error }, `changes in ${directory} go unnoticed: ${error.message}`),
    })
    this.#watch(device.instance.files)
  }

  [Symbol.dispose](): void {
    this.#closed = true
    this.#files[Symbol.dispose]()
  }

  async #changed(): Promise<void> {
    this.#device.changed()
    // What it imports by now, nobody knows before it serves.
    if (this.#device.restarting) this.#files.watchAll()
    if (this.#running) return
    this.#running = true
    while (this.#device.stale && !this.#closed) await this.#reload()
    this.#running = false
  }

  async #reload(): Promise<void> {
    this.#log.debug({}, 'the module changed')
    try {
      await this.#served()
      if (this.#closed) return
      this.#watch(this.#device.instance.files)
      this.counts.ok++
    } catch (error) {
      if (this.#closed) return
      // Perhaps a file is missing: nobody knows where it will turn up.
      this.#files.watchAll()
      this.counts.failed++
      const before = this.#device.instance.ended ? 'the one before has to start again' : 'the one before serves on'
      this.#log.error({ err: error }, `the module was not reloaded, ${before}: ${(error as Error).message}`)
    }
  }

  /** Resolves when the new version serves. @throws what is wrong with it */
  async #served(): Promise<void> {
    const device = this.#device
    // One that died loads its files anew by itself, and tells of it.
    await device.ready
    if (!device.stale || this.#closed) return
    const { files } = device.instance
    try {
      const pauseMs = await reloadModule(device, this.#server, this.#log, (now) => this.#watch([...files, ...now]))
      this.#log.info({ pauseMs: Math.round(pauseMs * 10) / 10 }, 'the module was reloaded')
    } catch (error) {
      if (!(error instanceof StuckVersion)) throw error
      this.#files.watchAll()
      await device.ready
    }
  }

  #watch(urls: readonly string[]): void {
    const { specifier } = this.#device.source.address
    const asked = specifier.startsWith('file:') ? [specifier] : []
    this.#files.watch([...asked, ...urls].map(pathOf))
  }
}
