/** File descriptors of every kind, to be handed over where another kind is expected. */
import { spawnSync } from 'node:child_process'
import { closeSync, constants, ftruncateSync, mkdtempSync, openSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { native } from '../../src/native.ts'

const O_PATH = 0o10000000
export const F_SEAL_SHRINK = 2
export const F_SEAL_GROW = 4
export const F_SEAL_WRITE = 8
const F_ADD_SEALS = 1033
/** Size of every file here. */
export const ODD_BYTES = 1 << 20

export type OddFd =
  | 'pipe'
  | 'socket'
  | 'listening socket'
  | 'O_PATH'
  | '/dev/null'
  | '/dev/zero'
  | 'regular file'
  | 'read-only file'
  | 'directory'
  | 'eventfd'
  | 'memfd'
  | 'read-only memfd'
  | 'sealed memfd'

export class OddFds implements Disposable {
  readonly #directory = mkdtempSync(join(tmpdir(), 'virtiod-fds-'))
  readonly #fds: number[] = []

  /** A new fd of that kind; it is closed with this object. */
  get(kind: OddFd): number {
    const fd = this.#make(kind)
    if (fd < 0) throw new Error(`cannot make a ${kind}: ${fd}`)
    this.#fds.push(fd)
    return fd
  }

  [Symbol.dispose](): void {
    for (const fd of this.#fds) native.close(fd)
    rmSync(this.#directory, { recursive: true, force: true })
  }

  #make(kind: OddFd): number {
    switch (kind) {
      case 'pipe': {
        const path = join(this.#directory, `fifo${this.#fds.length}`)
        spawnSync('mkfifo', [path])
        return openSync(path, constants.O_RDWR)
      }
      case 'socket': {
        const pair = new Int32Array(2)
        native.socketpair(pair)
        this.#fds.push(pair[1]!)
        return pair[0]!
      }
      case 'listening socket':
        return native.listenUnix(join(this.#directory, `sock${this.#fds.length}`), 0o600)
      case 'O_PATH':
        return openSync(this.#file(), O_PATH)
      case '/dev/null':
      case '/dev/zero':
        return openSync(kind, 'r+')
      case 'regular file':
        return openSync(this.#file(), 'r+')
      case 'read-only file':
        return openSync(this.#file(), 'r')
      case 'directory':
        return openSync(this.#directory, 'r')
      case 'eventfd':
        return native.eventfd(0)
      case 'memfd':
        return native.memfd('virtiod-test', ODD_BYTES, 0)
      case 'read-only memfd':
        return openSync(`/proc/self/fd/${this.get('memfd')}`, 'r')
      case 'sealed memfd': {
        const fd = native.memfd('virtiod-test', ODD_BYTES, 0)
        seal(fd, F_SEAL_WRITE)
        return fd
      }
    }
  }

  #file(): string {
    const path = join(this.#directory, `file${this.#fds.length}`)
    const fd = openSync(path, 'w')
    ftruncateSync(fd, ODD_BYTES)
    closeSync(fd)
    return path
  }
}

/** fcntl(F_ADD_SEALS), which Node does not have; perl-base is on every Debian. */
export function seal(fd: number, seals: number): void {
  const program = `open(my $f, '+<&=', 3) or die; fcntl($f, ${F_ADD_SEALS}, ${seals}) or die $!`
  const { status, stderr } = spawnSync('perl', ['-e', program], { stdio: ['ignore', 'ignore', 'pipe', fd] })
  if (status !== 0) throw new Error(`cannot seal the memfd: ${stderr}`)
}
