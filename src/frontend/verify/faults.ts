/**
 * What is known to be wrong in other back-ends, case by case, each seen here. A failure that stands here is printed as such and
 * counted apart, never hidden. It must not decide whether a case passes.
 */

/** A fault of a program: the cases that show it, and what it is. */
export interface KnownFault {
  /** The peer's program name. */
  readonly program: string
  /** Program and version for people. */
  readonly name: string
  readonly cases: Readonly<Record<string, string>>
}

/** Malformed rings on which libvhost-user ends the session (vu_panic). */
// biome-ignore format: a list
const ENDS_SESSION = [
  'loop', 'self-loop', 'head-out-of-range', 'head-65535', 'next-out-of-range',
  'address-outside', 'address-straddles-end', 'address-overflow', 'address-wraps-into-memory', 'length-4g',
  'header-outside', 'status-outside', 'readable-after-writable', 'indirect-odd-length', 'indirect-empty',
  'indirect-loop', 'indirect-next-out-of-range', 'indirect-outside', 'indirect-huge'
]

const FAULTS: readonly KnownFault[] = [
  {
    program: 'qemu-storage-daemon',
    name: 'qemu-storage-daemon 7.2',
    cases: {
      'config/sane': 'offers SIZE_MAX with size_max 0',
      'config/offsets': 'ignores the offset of GET_CONFIG',
      'data/straddle-indirect': 'takes a buffer over two regions in an indirect table for a loop and ends the session',
      'framing/no-status': 'drops a request without a status byte and never returns it',
      'framing/short-header': 'drops a request with a short header and never returns it',
      'framing/no-header': 'drops a request without a header and never returns it',
      'request/get-id': 'leaves the bytes after the string of GET_ID as they were',
      'request/unknown-type': 'ignores bit 31 of the request type',
      'stop/drains': 'answers GET_VRING_BASE while requests are in flight',
      'stop/drains-writes': 'answers GET_VRING_BASE while requests are in flight',
      'hostile/avail-jump': 'follows an available index that jumped',
      'hostile/avail-backwards': 'follows an available index that went backwards, for tens of thousands of requests',
      'hostile/indirect-in-indirect': 'serves an indirect descriptor in an indirect table',
      'hostile/ring-region-removed': 'dies of SIGSEGV',
      'hostile/memory-truncated': 'dies of SIGBUS',
      ...Object.fromEntries(
        ENDS_SESSION.map((name) => [`hostile/${name}`, 'ends the whole session instead of the ring'])
      ),
    },
  },
]

/** What is known about a case that failed against a program, or undefined. */
export function knownFault(program: string, caseName: string): string | undefined {
  const faults = FAULTS.find((one) => one.program === program)
  const text = faults?.cases[caseName]
  return text === undefined ? undefined : `${faults?.name}: ${text}`
}
