/** Where random bytes come from beside Node's generator: a character device such as /dev/hwrng, or a FIFO. */
import { constants } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { ConfigError } from '../../src/device/index.ts'

/** How often a source that has nothing is asked again. */
const RETRY_MS = 20
/** How long a request waits for the source. It must end: a guest can't be stopped while one is in work. */
const PATIENCE_MS = 2000

export class Source {
  readonly #file: FileHandle

  private constructor(file: FileHandle) {
    this.#file = file
  }

  /** @throws ConfigError */
  static async open(path: string): Promise<Source> {
    let file: FileHandle | undefined
    try {
      // A read that waits in the kernel could not be ended when the device is: hence O_NONBLOCK.
      file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK)
      const stat = await file.stat()
      if (stat.isCharacterDevice() || stat.isFIFO()) return new Source(file)
    } catch (cause) {
      await file?.close()
      const { code } = cause as NodeJS.ErrnoException
      const fix = 'Give a character device or FIFO that this user may read, or leave --source away.'
      throw new ConfigError('ERR_RNG_SOURCE', '--source', `${path} cannot be opened (${code})`, fix, { cause })
    }
    await file.close()
    // A regular file would tell two guests the same, or one guest again after a restart.
    const fix = 'Give what never says the same twice, e.g. /dev/hwrng, or leave --source away.'
    throw new ConfigError('ERR_RNG_SOURCE', '--source', `${path} is neither a character device nor a FIFO`, fix)
  }

  /** As much as there is now, but at least a byte; 0 when the source failed, or has had nothing for 2 s. */
  async read(target: Uint8Array, signal: AbortSignal): Promise<number> {
    for (const end = performance.now() + PATIENCE_MS; performance.now() < end; ) {
      try {
        const { bytesRead } = await this.#file.read(target)
        if (bytesRead > 0) return bytesRead
        // A FIFO that nobody has open for writing just now.
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') return 0
      }
      await sleep(RETRY_MS, undefined, { signal })
    }
    return 0
  }

  close(): Promise<void> {
    return this.#file.close()
  }
}
