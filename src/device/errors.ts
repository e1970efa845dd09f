/**
 * Errors by who is at fault and what ends. Every one has a `code` that is
 * API: the README lists them, and a retired one is never used again.
 */

/** The operator's fault: ends the process with exit code 2, before a socket is bound. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError'
  readonly code: string
  /** The option or configuration key at fault, e.g. `--blk-file`. */
  readonly option: string

  /** @param fix what to do about it, a sentence */
  constructor(code: string, option: string, problem: string, fix: string, options?: ErrorOptions) {
    super(`${option}: ${problem}. ${fix}`, options)
    this.code = code
    this.option = option
  }
}

/** The device's own fault: ends that device's session, or keeps the daemon from starting with it. */
export class DeviceError extends Error {
  override readonly name = 'DeviceError'
  readonly code: string

  constructor(code: string, message: string, options?: ErrorOptions) {
    super(message, options)
    this.code = code
  }
}

/**
 * The guest's fault: a request that is too short for what the handler reads, or otherwise not one of its kind. Out of a handler
 * it breaks the ring (ERR_RING_REQUEST), as QEMU's devices do.
 */
export class ChainError extends Error {
  override readonly name = 'ChainError'
  readonly code = 'ERR_CHAIN'
}
