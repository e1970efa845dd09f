/** The entropy device on plain buffers: what it answers, where the bytes come from, and how few of them it gives. */
import { execFileSync } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, rmSync, writeFileSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import rng from '../../devices/rng/index.ts'
import { type TestDevice, testDevice } from '../../src/testing/index.ts'

const read = (device: TestDevice, length: number) => device.request(0, [], length)

describe.each([{ split: false }, { split: true }])('virtio-rng, %o', (framing) => {
  let directory: string
  let fifo: string
  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), 'virtiod-rng-'))
    fifo = join(directory, 'fifo')
    execFileSync('mkfifo', [fifo])
  })
  afterAll(() => rmSync(directory, { recursive: true }))

  test('fills what it is given, each time with other bytes', async () => {
    await using device = await testDevice(rng, framing)
    const first = await read(device, 64)
    const second = await read(device, 64)
    expect(first.written).toBe(64)
    expect(second.written).toBe(64)
    expect(first.bytes).not.toEqual(second.bytes)
    // 64 random bytes with fewer than 30 different ones do not happen.
    expect(new Set(first.bytes).size).toBeGreaterThan(30)
    expect(device.operations).toEqual({ read: 2 })
    expect(device.metrics()).toEqual({ bytes_total: 128, limited_total: 0 })
  })

  test('answers many requests at once', async () => {
    await using device = await testDevice(rng, framing)
    const replies = await Promise.all(Array.from({ length: 100 }, () => read(device, 16)))
    expect(new Set(replies.map(({ bytes }) => Buffer.from(bytes).toString('hex'))).size).toBe(100)
  })

  test('a large request gets a short answer', async () => {
    await using device = await testDevice(rng, framing)
    expect((await read(device, 100_000)).written).toBe(65536)
  })

  test('a request with nothing to write into is counted and comes back', async () => {
    await using device = await testDevice(rng, framing)
    expect((await device.request(0, Uint8Array.of(1, 2, 3))).written).toBe(0)
    expect(device.errors).toEqual({ empty: 1, source: 0 })
  })

  test('a rate is kept: the answer is short, and who comes next waits for the next period', async () => {
    await using device = await testDevice(rng, { ...framing, options: { rate: 100, period: 50 } })
    const replies = await Promise.all([read(device, 64), read(device, 64), read(device, 64), read(device, 64)])
    expect(replies.map(({ written }) => written)).toEqual([64, 36, 50, 50])
    expect(device.metrics()).toEqual({ bytes_total: 200, limited_total: 2 })
  })

  test('nobody waits for more than one period, however many want more than there is', async () => {
    await using device = await testDevice(rng, { ...framing, options: { rate: 10, period: 100 } })
    const replies = await Promise.all(Array.from({ length: 200 }, () => read(device, 64)))
    expect(replies.map(({ written }) => written)).toEqual([10, ...new Array<number>(199).fill(1)])
    expect(device.metrics()).toEqual({ bytes_total: 209, limited_total: 199 })
  })

  test('a rate of one byte still gives one to everybody', async () => {
    await using device = await testDevice(rng, { ...framing, options: { rate: 1, period: 1 } })
    const replies = await Promise.all([read(device, 64), read(device, 64), read(device, 64)])
    expect(replies.map(({ written }) => written)).toEqual([1, 1, 1])
  })

  test('a device is a source', async () => {
    await using device = await testDevice(rng, { ...framing, options: { source: '/dev/zero' } })
    expect((await read(device, 32)).bytes).toEqual(new Uint8Array(32))
  })

  test('a FIFO is a source: what is there is the answer, and who comes too early waits', async () => {
    await using device = await testDevice(rng, { ...framing, options: { source: fifo } })
    const early = read(device, 8)
    const end = openSync(fifo, 'w')
    writeSync(end, 'abc')
    const first = await early
    expect(Buffer.from(first.bytes.subarray(0, first.written)).toString()).toBe('abc')
    writeSync(end, 'defghijklm')
    expect(Buffer.from((await read(device, 8)).bytes).toString()).toBe('defghijk')
    expect(
      Buffer.from((await read(device, 8)).bytes)
        .subarray(0, 2)
        .toString()
    ).toBe('lm')
    closeSync(end)
    expect(device.errors).toEqual({ empty: 0, source: 0 })
  })

  test('what the source did not give can be had later in the period', async () => {
    await using device = await testDevice(rng, { ...framing, options: { source: fifo, rate: 10, period: 2000 } })
    const end = openSync(fifo, 'w')
    writeSync(end, 'abc')
    expect((await read(device, 10)).written).toBe(3)
    writeSync(end, 'defghijklm')
    expect((await read(device, 10)).written).toBe(7)
    closeSync(end)
  })
})

test('a source that gives nothing is replaced, and said once', async () => {
  await using device = await testDevice(rng, { options: { source: '/dev/null' } })
  expect((await read(device, 16)).written).toBe(16)
  expect(device.errors).toEqual({ empty: 0, source: 1 })
  expect(device.log.map(({ message }) => message)).toEqual(['the source gives nothing: the guest gets bytes of Node'])
})

test('a driver that goes while its request waits leaves nothing to its successor', async () => {
  await using device = await testDevice(rng, { options: { rate: 1, period: 200 } })
  await read(device, 1)
  const waiting = read(device, 1)
  waiting.catch(() => {})
  await device.reset()
  await expect(waiting).rejects.toThrow()
  expect((await read(device, 1)).written).toBe(1)
  expect(device.failure).toBeUndefined()
})

describe('an operator is told what is wrong with', () => {
  const refused = (options: Record<string, unknown>) => testDevice(rng, { options })

  test('a regular file', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'virtiod-rng-'))
    const path = join(directory, 'seed')
    writeFileSync(path, 'twice the same')
    await expect(refused({ source: path })).rejects.toMatchObject({
      code: 'ERR_RNG_SOURCE',
      message: `--source: ${path} is neither a character device nor a FIFO. Give what never says the same twice, e.g. /dev/hwrng, or leave --source away.`,
    })
    rmSync(directory, { recursive: true })
  })

  test('a source that is not there', async () => {
    await expect(refused({ source: '/dev/nothing' })).rejects.toMatchObject({
      code: 'ERR_RNG_SOURCE',
      message:
        '--source: /dev/nothing cannot be opened (ENOENT). Give a character device or FIFO that this user may read, or leave --source away.',
    })
  })

  test.each([{ rate: 0 }, { period: 0 }, { period: 2001 }, { source: '' }])('%o', async (options) => {
    await expect(refused(options)).rejects.toMatchObject({ code: 'ERR_OPTION_VALUE' })
  })
})
