/** examples/devices/faulty-disk.ts: each fault where its rule says and nowhere else; and under a guest. */
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { request } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { missingPrerequisites, type TestDevice, testDevice } from 'virtiod/testing'
import { afterAll, describe, expect, test } from 'vitest'
import definition from '../../../examples/devices/faulty-disk.ts'
import { TestDisk } from './disk.ts'
import { Stage, transcript } from './transcript.ts'

const directory = mkdtempSync(join(tmpdir(), 'virtiod-faulty-'))
afterAll(() => rmSync(directory, { recursive: true, force: true }))

const SECTORS = 128

/** The answer of the control socket. */
async function http(method: string, socketPath: string, body?: string): Promise<{ status: number; body: string }> {
  return await new Promise((resolve, reject) => {
    const sent = request({ socketPath, method, path: '/' }, (response) => {
      text(response).then((answer) => resolve({ status: response.statusCode ?? 0, body: answer.trimEnd() }), reject)
    })
    sent.once('error', reject).end(body)
  })
}

/** A disk whose sectors hold their numbers, and its controls. */
class Bench implements AsyncDisposable {
  static #count = 0
  readonly image = join(directory, `disk${++Bench.#count}.img`)
  readonly control = `${this.image}.sock`
  readonly #device: TestDevice
  readonly disk: TestDisk

  static async make(settings: { seed?: number } = {}): Promise<Bench> {
    const image = join(directory, `disk${Bench.#count + 1}.img`)
    writeFileSync(
      image,
      Uint8Array.from({ length: SECTORS * 512 }, (_, i) => i >> 9)
    )
    return new Bench(await testDevice(definition, { options: { file: image, control: `${image}.sock`, ...settings } }))
  }

  private constructor(device: TestDevice) {
    this.#device = device
    this.disk = new TestDisk(device)
  }

  get device(): TestDevice {
    return this.#device
  }

  async rules(rules: unknown): Promise<void> {
    expect(await http('PUT', this.control, JSON.stringify(rules))).toMatchObject({ status: 200 })
  }

  /** How often each rule has hit. */
  async hits(): Promise<number[]> {
    const rules = JSON.parse((await http('GET', this.control)).body) as { hits: number }[]
    return rules.map((rule) => rule.hits)
  }

  /** Which of `count` single sectors from the first on can't be read. */
  async broken(count = SECTORS): Promise<number[]> {
    const sectors = Array.from({ length: count }, (_, sector) => sector)
    const outcomes: boolean[] = []
    // One after the other: chance is asked in this order.
    for (const sector of sectors)
      outcomes.push(
        await this.disk.read(sector * 512, 512).then(
          () => false,
          () => true
        )
      )
    return sectors.filter((sector) => outcomes[sector])
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#device.close()
  }
}

describe('without rules', () => {
  test('it is the image', async () => {
    await using bench = await Bench.make()
    expect(bench.disk.size).toBe(SECTORS * 512)
    expect(await bench.disk.read(3 * 512, 1024)).toEqual(Buffer.alloc(1024, 3).fill(4, 512))
    await bench.disk.write(512, Buffer.alloc(1024, 0xaa))
    await bench.disk.flush()
    expect(readFileSync(bench.image).subarray(0, 2048)).toEqual(
      Buffer.alloc(2048, 0).fill(0xaa, 512, 1536).fill(3, 1536)
    )
    expect(await bench.broken()).toEqual([])
    expect(bench.device.metrics()).toEqual({})
  })
})

describe('errors', () => {
  test('are where the sectors say, for requests that touch them', async () => {
    await using bench = await Bench.make()
    await bench.rules([{ fault: 'error', operation: 'read', sectors: [10, 12] }])
    expect(await bench.broken()).toEqual([10, 11, 12])
    await expect(bench.disk.read(5 * 512, 6 * 512)).rejects.toThrow('status 1')
    await expect(bench.disk.read(12 * 512, 6 * 512)).rejects.toThrow('status 1')
    await bench.disk.read(5 * 512, 5 * 512)
    await bench.disk.write(10 * 512, new Uint8Array(512))
    await bench.disk.flush()
    expect(await bench.hits()).toEqual([5])
    expect(bench.device.metrics()).toEqual({ 'faults_total{fault="error"}': 5 })
    expect(bench.device.errors).toMatchObject({ io: 5 })
  })

  test('of writes change nothing; of flushes, too', async () => {
    await using bench = await Bench.make()
    await bench.rules([
      { fault: 'error', operation: 'write' },
      { fault: 'error', operation: 'flush', count: 1 },
    ])
    await expect(bench.disk.write(0, Buffer.alloc(512, 0xaa))).rejects.toThrow('status 1')
    expect(readFileSync(bench.image).subarray(0, 512)).toEqual(Buffer.alloc(512))
    await expect(bench.disk.flush()).rejects.toThrow('status 1')
    await bench.disk.flush()
  })

  test('end after `count`, and with the rules', async () => {
    await using bench = await Bench.make()
    await bench.rules([{ fault: 'error', count: 2 }])
    expect(await bench.broken(5)).toEqual([0, 1])
    await bench.rules([{ fault: 'error' }])
    expect(await bench.broken(5)).toEqual([0, 1, 2, 3, 4])
    await bench.rules([])
    expect(await bench.broken(5)).toEqual([])
  })

  test('the first rule that matches decides', async () => {
    await using bench = await Bench.make()
    await bench.rules([
      { fault: 'delay', ms: 1, sectors: [1, 1] },
      { fault: 'error', sectors: [0, 2] },
    ])
    expect(await bench.broken(4)).toEqual([0, 2])
    expect(await bench.hits()).toEqual([1, 2])
  })
})

describe('chance', () => {
  const rules = [{ fault: 'error', probability: 0.25 }]

  test('is as probable as the rule says, and the same for a seed', async () => {
    await using bench = await Bench.make({ seed: 7 })
    await bench.rules(rules)
    const first = await bench.broken()
    expect(first.length).toBeGreaterThan(SECTORS * 0.1)
    expect(first.length).toBeLessThan(SECTORS * 0.4)
    expect(await bench.broken()).not.toEqual(first)
    await bench.rules(rules)
    expect(await bench.broken()).toEqual(first)
    await using other = await Bench.make({ seed: 8 })
    await other.rules(rules)
    expect(await other.broken()).not.toEqual(first)
  })

  test('goes on in a successor', async () => {
    await using reference = await Bench.make()
    await reference.rules(rules)
    await reference.broken(50)
    await using old = await Bench.make()
    await old.rules(rules)
    await old.broken(50)
    await using successor = await Bench.make()
    await successor.device.loadState(await old.device.saveState())
    expect(await successor.hits()).toEqual(await old.hits())
    expect(await successor.broken()).toEqual(await reference.broken())
    await expect(successor.device.loadState(Buffer.from('{"rules":[]}'))).rejects.toThrow('random')
  })
})

describe('writes', () => {
  test('that are torn reach the image in part, those that are lost not at all, and nobody is told', async () => {
    await using bench = await Bench.make()
    await bench.rules([
      { fault: 'tear', operation: 'write', keep: 2, sectors: [0, 3] },
      { fault: 'lose', operation: 'write', sectors: [8, 8] },
    ])
    await bench.disk.write(0, Buffer.alloc(2048, 0xaa))
    await bench.disk.write(8 * 512, Buffer.alloc(512, 0xaa))
    await bench.disk.write(4 * 512, Buffer.alloc(2048, 0xbb))
    await bench.disk.write(3 * 512, Buffer.alloc(512, 0xcc))
    const image = readFileSync(bench.image)
    expect(Array.from({ length: 10 }, (_, sector) => image[sector * 512])).toEqual([
      0xaa, 0xaa, 2, 0xcc, 0xbb, 0xbb, 0xbb, 0xbb, 8, 9,
    ])
    expect(bench.device.errors).toMatchObject({ io: 0 })
    expect(bench.device.metrics()).toEqual({ 'faults_total{fault="tear"}': 2, 'faults_total{fault="lose"}': 1 })
  })
})

describe('delay', () => {
  test('a request that is late is overtaken', async () => {
    await using bench = await Bench.make()
    await bench.rules([{ fault: 'delay', ms: 50, count: 1 }])
    const order: string[] = []
    await Promise.all([
      bench.disk.read(512, 512).then((bytes) => order.push(`late ${bytes[0]}`)),
      bench.disk.read(1024, 512).then((bytes) => order.push(`soon ${bytes[0]}`)),
    ])
    expect(order).toEqual(['soon 2', 'late 1'])
  })
})

describe('the control socket', () => {
  test('says what is wrong with rules, and leaves those that are there', async () => {
    await using bench = await Bench.make()
    await bench.rules([{ fault: 'error', sectors: [1, 1] }])
    for (const [body, complaint] of [
      ['{}', 'Array'],
      ['[{"fault":"explode"}]', '0.fault'],
      ['[{"fault":"error","sektor":3}]', 'sektor'],
      ['[{"fault":"error","probability":2}]', '0.probability'],
      ['[{"fault":"delay","ms":20001}]', '0.ms'],
      ['[{"fault":"tear","operation":"read"}]', 'Only a write is torn or lost'],
      ['[{"fault"', 'JSON'],
    ] as const) {
      const answer = await http('PUT', bench.control, body)
      expect([body, answer.status]).toEqual([body, 400])
      expect(answer.body).toContain(complaint)
    }
    expect(await bench.broken(3)).toEqual([1])
  })

  test('replaces one that was left behind, and goes with the device', async () => {
    const bench = await Bench.make()
    expect(existsSync(bench.control)).toBe(true)
    await bench.device.close()
    expect(existsSync(bench.control)).toBe(false)
    writeFileSync(bench.control, 'left behind')
    const options = { file: bench.image, control: bench.control }
    await using again = await testDevice(definition, { options })
    expect(await http('GET', bench.control)).toEqual({ status: 200, body: '[]' })
    await again.close()
  })

  test('a path that can be none', async () => {
    await using bench = await Bench.make()
    const control = join(directory, 'nowhere', 'x')
    await expect(testDevice(definition, { options: { file: bench.image, control } })).rejects.toMatchObject({
      name: 'ConfigError',
      code: 'ERR_FAULTY_CONTROL',
    })
  })
})

test('an image that is not there', async () => {
  const options = { file: join(directory, 'none.img'), control: join(directory, 'none.sock') }
  await expect(testDevice(definition, { options })).rejects.toMatchObject({
    name: 'ConfigError',
    option: '--option file',
  })
})

test.skipIf(missingPrerequisites().length > 0)(
  'a guest gets what the rules say',
  async () => {
    // busybox' dd gives up O_DIRECT silently, and then a page is read in place of a sector.
    await using stage = new Stage('faulty-disk.ts', { modules: ['virtio_blk'], tools: ['dd'] })
    await stage.play(transcript('faulty-disk.ts'))
    const { guest } = stage
    const control = join(stage.directory, 'faults.sock')
    const rules = (body: unknown) => http('PUT', control, JSON.stringify(body))
    // Each sector on its own: exactly those of the rule fail.
    await rules([{ fault: 'error', operation: 'read', sectors: [100, 103] }])
    const scan = `for i in $(seq 96 107); do
      dd if=/dev/vda of=/dev/null bs=512 count=1 skip=$i iflag=direct 2> /dev/null || echo $i; done`
    expect(await guest.sh(scan)).toBe('100\n101\n102\n103')
    // Late, but right.
    await rules([{ fault: 'delay', operation: 'read', ms: 30 }])
    expect(await guest.sh('dd if=/dev/vda bs=4096 count=4 skip=10 iflag=direct 2> /dev/null | wc -c')).toBe('16384')
    expect(JSON.parse((await http('GET', control)).body)).toMatchObject([{ fault: 'delay', hits: 4 }])
    // A failing flush is what fsync tells.
    await rules([{ fault: 'error', operation: 'flush', count: 1 }])
    expect((await guest.run('dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync 2> /dev/null')).exitCode).not.toBe(
      0
    )
    await rules([])
    await guest.sh('dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync 2> /dev/null')
    expect((await stage.daemons[0]!.stop()).code).toBe(0)
  },
  90_000
)
