/**
 * A disk that fails as you tell it: I/O errors, latency, torn and lost writes, by rule, switched while the guest runs.
 * It serves a raw image.
 *
 *   virtiod device ./faulty-disk.ts --socket-path disk.sock --option file=disk.img --option control=faults.sock
 *   curl --unix-socket faults.sock -X PUT localhost -d '[{"fault":"error","operation":"read","sectors":[2048,2055]}]'
 *
 * PUT replaces all rules, and answers when they are in force or says what is wrong with them. GET shows them with their
 * `hits`; its answer can be PUT again. The first rule that matches a request decides what happens to it:
 *
 *   fault        error: the guest gets EIO; delay: an answer after `ms`; tear: only the first `keep` sectors of a write
 *                get to the image, and the guest hears that all did; lose: none do
 *   operation    read, write or flush; unset: any
 *   sectors      [first, last], of 512 bytes: what the request has to touch; unset: anything
 *   probability  0 … 1 (unset). What chance decides follows from --option seed and begins anew with each PUT
 *   count        after so many hits the rule is used up; unset: never
 */
import { open, rename, rm } from 'node:fs/promises'
import { createServer } from 'node:http'
import { json } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import * as v from 'valibot'
import { ConfigError, defineDevice } from 'virtiod/device'
import { type BlkDisk, blkConfig, blkDevice, blkFeatures, DiskError, handleBlkRequest } from 'virtiod/device/virtio-blk'

const SECTOR = 512

const natural = v.pipe(v.number(), v.safeInteger(), v.minValue(0))
const path = (description: string) => v.pipe(v.string(), v.description(description), v.metadata({ path: true }))

const rule = v.pipe(
  v.strictObject({
    fault: v.picklist(['error', 'delay', 'tear', 'lose']),
    operation: v.exactOptional(v.picklist(['read', 'write', 'flush'])),
    sectors: v.exactOptional(v.tuple([natural, natural])),
    probability: v.optional(v.pipe(v.number(), v.minValue(0), v.maxValue(1)), 1),
    count: v.exactOptional(natural),
    ms: v.optional(v.pipe(natural, v.maxValue(20_000)), 100),
    keep: v.optional(natural, 1),
    hits: v.optional(natural, 0),
  }),
  v.check(
    (it) => it.operation === 'write' || (it.fault !== 'tear' && it.fault !== 'lose'),
    'Only a write is torn or lost'
  )
)
const state = v.strictObject({ rules: v.array(rule), random: natural })

type Rule = v.InferOutput<typeof rule>

/** The rules in force, and what chance says next. */
class Faults {
  rules: Rule[] = []
  random = 0

  /** The rule that hits this request. */
  find(operation: Rule['operation'], offset: number, length: number): Rule | undefined {
    const found = this.rules.find(
      (it) =>
        (it.operation ?? operation) === operation &&
        (it.sectors === undefined || touches(it.sectors, offset, length)) &&
        it.hits < (it.count ?? Infinity) &&
        this.#chance() < it.probability
    )
    if (found !== undefined) found.hits++
    return found
  }

  /** 0 ≤ x < 1; a linear congruential generator. */
  #chance(): number {
    this.random = (Math.imul(this.random, 1_664_525) + 1_013_904_223) >>> 0
    return this.random / 2 ** 32
  }
}

function touches([first, last]: readonly [number, number], offset: number, length: number): boolean {
  return offset < (last + 1) * SECTOR && offset + length > first * SECTOR
}

export default defineDevice({
  apiVersion: 1,
  name: 'faultydisk',
  ...blkDevice,
  options: v.strictObject({
    file: path('The raw image'),
    control: path('The Unix socket on which rules are set, by HTTP'),
    seed: v.optional(
      v.pipe(v.number(), v.integer(), v.minValue(0), v.description('What chance decides follows from it')),
      1
    ),
  }),
  features: blkFeatures({ flush: true }),
  // The image's size comes below.
  config: blkConfig(0),
  metrics: [{ name: 'faults_total', type: 'counter', labels: ['fault'], help: 'Requests that a rule has hit' }],

  async create(context) {
    const { options, config, log, signal } = context
    const file = await open(options.file, 'r+').catch((cause: unknown) => {
      throw new ConfigError(
        'ERR_FAULTY_FILE',
        '--option file',
        `${options.file} cannot be opened`,
        'Give a raw image.',
        {
          cause,
        }
      )
    })
    const size = Math.floor((await file.stat()).size / SECTOR) * SECTOR
    config.bytes.set(blkConfig(size))
    const faults = new Faults()

    /** Does what the rules say. Returns how many bytes of a write get to the image. */
    const suffer = async (operation: Rule['operation'], offset: number, length: number): Promise<number> => {
      const hit = faults.find(operation, offset, length)
      if (hit === undefined) return length
      context.metric('faults_total', { fault: hit.fault }).add()
      if (hit.fault === 'error') throw new DiskError('by rule')
      if (hit.fault === 'delay') await sleep(hit.ms, undefined, { signal })
      return hit.fault === 'tear' ? Math.min(hit.keep * SECTOR, length) : hit.fault === 'lose' ? 0 : length
    }
    const disk: BlkDisk = {
      size,
      async read(offset, length) {
        await suffer('read', offset, length)
        const { bytesRead, buffer } = await file.read(new Uint8Array(length), 0, length, offset)
        if (bytesRead < length) throw new DiskError('the image has been cut')
        return buffer
      },
      async write(offset, bytes) {
        const length = await suffer('write', offset, bytes.length)
        for (let done = 0; done < length; )
          done += (await file.write(bytes, done, length - done, offset + done)).bytesWritten
      },
      async flush() {
        await suffer('flush', 0, 0)
        await file.datasync()
      },
    }

    const server = createServer(async (request, response) => {
      try {
        if (request.method === 'PUT') {
          faults.rules = v.parse(v.array(rule), await json(request))
          faults.random = options.seed
          log.info({ rules: faults.rules.length }, 'new rules')
        }
        response.end(`${JSON.stringify(faults.rules)}\n`)
      } catch (error) {
        response.writeHead(400).end(`${v.isValiError(error) ? v.summarize(error.issues) : error}\n`)
      }
    })
    // By another name first: renaming replaces what a killed virtiod left, or the one that a handover is from.
    const fresh = `${options.control}.${process.pid}`
    await new Promise<void>((resolve, reject) => {
      server.on('error', reject).listen(fresh, () => rename(fresh, options.control).then(resolve, reject))
    }).catch(async (cause: Error) => {
      await file.close()
      throw new ConfigError('ERR_FAULTY_CONTROL', '--option control', cause.message, 'Give a path for a socket.', {
        cause,
      })
    })

    return {
      handle: (chain) => handleBlkRequest(chain, disk),
      saveState: () => ({ rules: faults.rules, random: faults.random }),
      loadState(saved) {
        Object.assign(faults, v.parse(state, saved))
      },
      async close() {
        server.close()
        server.closeAllConnections()
        await rm(options.control, { force: true })
        await file.close()
      },
    }
  },
})
