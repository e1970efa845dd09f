/**
 * virtio-rng (virtio 1.3 §5.4): fills the guest's buffers with random bytes, which its kernel mixes into its pool or hands out as
 * /dev/hwrng. A whole device in one object: read it before you write your own.
 */
import { randomFillSync } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import * as v from 'valibot'
import { type DeviceChain, defineDevice } from '../../src/device/index.ts'
import { Source } from './source.ts'

const VIRTIO_ID_ENTROPY = 4

/** The most that one request gets: a short answer is fine (§5.4.6.1), and no guest may make us allocate what it likes. */
const MAX_ANSWER = 65536

const options = v.strictObject({
  source: v.exactOptional(
    v.pipe(
      v.string(),
      v.minLength(1),
      v.description('A character device or FIFO to take the bytes from, such as /dev/hwrng'),
      v.metadata({ placeholder: 'PATH', path: true, unset: "Node's generator, which the kernel seeds" })
    )
  ),
  rate: v.exactOptional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(1),
      v.maxValue(Number.MAX_SAFE_INTEGER),
      v.description('The most bytes that the guest gets in each --period'),
      v.metadata({ placeholder: 'BYTES', size: true, unset: 'no limit' })
    )
  ),
  period: v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(1),
      // A request may wait for its period, and 2 s for the source: who stops the guest's rings waits for it, a handover for 5 s.
      v.maxValue(2000),
      v.description('Milliseconds after which the guest may have --rate bytes again'),
      v.metadata({ placeholder: 'MS' })
    ),
    1000
  ),
})

export default defineDevice({
  apiVersion: 1,
  name: 'rng',
  virtioId: VIRTIO_ID_ENTROPY,
  options,
  queues: [{ name: 'requests' }],
  operations: ['read'],
  errors: ['empty', 'source'],
  metrics: [
    { name: 'bytes_total', type: 'counter', labels: [], help: 'Random bytes that the guest got' },
    { name: 'limited_total', type: 'counter', labels: [], help: 'Requests that had to wait for the next period' },
  ],
  qemu: { driver: 'vhost-user-rng-pci', properties: {} },

  async create({ options, log, metric, signal }) {
    const { rate = Number.POSITIVE_INFINITY, period } = options
    const source = options.source === undefined ? undefined : await Source.open(options.source)
    const bytes = metric('bytes_total')
    const limited = metric('limited_total')
    let periodStart = performance.now()
    let left = rate
    /** Requests that wait for the next period. */
    let waiting = 0
    let warned = false

    function begin(): void {
      const now = performance.now()
      if (now - periodStart < period) return
      periodStart = now
      left = rate
    }

    /** Until another period has begun. */
    async function nextPeriod(): Promise<void> {
      const since = periodStart
      limited.add()
      waiting++
      try {
        for (; periodStart === since; begin())
          await sleep(Math.ceil(since + period - performance.now()), undefined, { signal })
      } finally {
        waiting--
      }
    }

    /**
     * How many of `wanted` bytes the guest may have now, at least one; waits for a period in which it may. Not for more than one:
     * who stops the rings waits for all requests, and a guest that has a thousand of them must not make that take a thousand
     * periods. So they share a period, and when there are more of them than bytes each gets its one all the same.
     */
    async function allowance(wanted: number): Promise<number> {
      begin()
      if (left <= 0) await nextPeriod()
      const allowed = Math.min(wanted, Math.max(1, Math.floor(left / (waiting + 1))))
      left -= allowed
      return allowed
    }

    /** Fills `target` as far as the source goes. Returns how many bytes. */
    async function fill(target: Uint8Array, chain: DeviceChain): Promise<number> {
      if (source !== undefined) {
        const count = await source.read(target, signal)
        if (count > 0) return count
        // An answer has at least one byte (§5.4.6.2), and these are better than none.
        chain.error('source')
        if (!warned) log.warn({ source: options.source }, 'the source gives nothing: the guest gets bytes of Node')
        warned = true
      }
      return randomFillSync(target).length
    }

    return {
      async handle(chain) {
        const wanted = Math.min(chain.writer.length, MAX_ANSWER)
        if (wanted === 0) return chain.error('empty')
        const random = new Uint8Array(await allowance(wanted))
        const count = await fill(random, chain)
        left = Math.min(rate, left + random.length - count)
        chain.writer.bytes(random.subarray(0, count))
        chain.operation('read', count)
        bytes.add(count)
      },
      close: () => source?.close(),
    }
  },
})
