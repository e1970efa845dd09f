/** What the cases about disks share: the disk, a ring, words for statuses. It must not know the cases. */
import { VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP } from '../../virtio/blk.ts'
import { type BlkDriver, type BlkRequest, statusName } from '../blk.ts'
import { type ConformanceCase, expect } from './case.ts'
import type { Context } from './context.ts'
import type { BlkFacts } from './facts.ts'
import type { Ring } from './guest.ts'

export const NOTHING = new Uint8Array(0)
export const OPERATION = 'virtio 1.3 §5.2.6'
export const DEVICE = 'virtio 1.3 §5.2.6.2'
/** Bytes at the end of the disk that destructive cases overwrite. */
const AREA = 2 ** 20

export interface Disk extends BlkFacts {
  readonly ring: Ring
  readonly requests: BlkDriver
  /** First sector and bytes of the area at the end. */
  readonly area: { readonly sector: number; readonly bytes: number }
}

function disk(context: Context): Disk {
  const facts = context.facts.blk as BlkFacts
  const { ring } = context.running()
  const { blockSize, capacity } = facts
  const blocks = Math.floor(Math.min(AREA, (capacity * 512) / 2) / blockSize)
  const end = Math.floor((capacity * 512) / blockSize)
  const area = { sector: ((end - blocks) * blockSize) / 512, bytes: blocks * blockSize }
  return { ...facts, ring, requests: ring.requests, area }
}

/** @throws Violation unless the status is one of `allowed` */
export function expectStatus(request: BlkRequest, allowed: readonly number[], what: string): void {
  const seen = statusName(request.status)
  expect(allowed.includes(request.status), `${what}: status ${allowed.map(statusName).join(' or ')}`, seen)
}

export const OK = [VIRTIO_BLK_S_OK]
export const UNSUPP = [VIRTIO_BLK_S_UNSUPP]
export const FAILED = [VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP]

export function blkCase(
  one: Pick<ConformanceCase, 'id' | 'level' | 'rule' | 'cites'> & Partial<ConformanceCase>,
  run: (disk: Disk, context: Context) => string
): ConformanceCase {
  const needs = { device: 'blk', ...one.needs } as const
  return { group: 'blk', ...one, needs, run: (context) => run(disk(context), context) }
}

/** Random bytes, the same for the same seed. */
export function bytesOf(seed: number, length: number): Uint8Array {
  const out = new Uint8Array(length)
  let state = seed | 1
  for (let i = 0; i < length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) | 0
    out[i] = state >>> 24
  }
  return out
}

/** First sectors that lie beyond every disk, or where the arithmetic overflows in 32 or 64 bits. */
export const WILD_SECTORS = [
  2n ** 64n - 1n,
  2n ** 63n,
  2n ** 63n - 1n,
  2n ** 56n,
  2n ** 55n,
  2n ** 55n - 1n,
  2n ** 54n,
  2n ** 48n,
]
