/** `virtiod bench` tells disks from network devices, and refuses what the other kind alone would take. */
import { afterAll, describe, expect, onTestFinished, test, vi } from 'vitest'
import { benchCommand } from '../../src/cli/commands/bench.ts'
import { verifyCommand } from '../../src/cli/commands/verify.ts'
import { ConfigError } from '../../src/device/errors.ts'
import { dpdkMissing, endSharedTestpmd, sharedTestpmd, wires } from './net-peers.ts'
import { serveFake } from './support.ts'

afterAll(endSharedTestpmd)

/** Runs it as the command line would; again when nothing came through, as on a machine that is busy with other tests. */
async function bench(
  sockets: readonly string[],
  values: Record<string, unknown> = {}
): Promise<{ code: number; output: string }> {
  let output = ''
  const write = vi.spyOn(process.stdout, 'write').mockImplementation((text) => {
    output += String(text)
    return true
  })
  onTestFinished(() => write.mockRestore())
  const deadline = performance.now() + 20_000
  for (;;) {
    output = ''
    const code = await benchCommand.run({ values: { seconds: 1, ...values }, positionals: sockets })
    if (code === 0 || performance.now() > deadline) return { code, output }
  }
}

/** The option that is refused. */
async function refused(sockets: readonly string[], values: Record<string, unknown>): Promise<string> {
  const error = await bench(sockets, values).then(
    () => undefined,
    (reason: unknown) => reason
  )
  expect(error).toBeInstanceOf(ConfigError)
  return (error as ConfigError).option
}

const net = async (): Promise<string> => (await sharedTestpmd({ mode: 'rxonly' })).sockets[0] as string

describe.skipIf(dpdkMissing !== undefined)('a network device', () => {
  test.each([
    ['rw', 'write'],
    ['bs', 4096],
    ['qd', 1],
    ['size', 4096],
    ['indirect', true],
  ])("--%s is a disk's", async (name, value) => {
    expect(await refused([await net()], { [name]: value })).toBe(`--${name}`)
  })

  test('is not verified as a disk', async () => {
    const socket = await net()
    const refusal = verifyCommand.run({ values: {}, positionals: [socket] })
    await expect(refusal).rejects.toMatchObject({ code: 'ERR_ARGUMENT', option: socket })
  })

  test.each([
    ['both', true],
    ['frame-size', 1519],
    ['frame-size', 63],
    ['flows', 300],
    ['queue-size', 100],
    ['queues', 200],
    ['mac', '01:00:5e:00:00:01'],
    ['peer-mac', 'x'],
  ])('--%s %s is refused by name', async (name, value) => {
    expect(await refused([await net()], { [name]: value })).toBe(`--${name}`)
  })

  test('figures for people', async () => {
    const { code, output } = await bench([await net()], { 'frame-size': 128 })
    expect(code).toBe(0)
    expect(output).toMatch(
      /^sending, 128 bytes UDP, 1 flow, 1 queue pair × 256, poll driver, .*back-end dpdk-testpmd\n/
    )
    expect(output).toMatch(/packets\/s .* Gbit\/s\n +packets +sent [\d,]+\n +per packet .* kicks .* calls .* µs/)
  })

  test('figures for programs', async () => {
    const { output } = await bench([await net()], { json: true, 'no-mrg-rxbuf': true, 'no-event-idx': true })
    const result = JSON.parse(output) as Record<string, unknown>
    expect(result).toMatchObject({ device: 'net', traffic: 'tx', frameSize: 64, mergeable: false, eventIdx: false })
  })
})

describe.skipIf(wires.length === 0)('two network sockets', () => {
  test('packets go from one to the other', async () => {
    const { code, output } = await bench(await wires[0]!.start(), { flows: 3 })
    expect(code).toBe(0)
    expect(output).toMatch(/^first socket to second, 64 bytes UDP, 3 flows/)
  })

  test('--traffic is for one', async () => {
    expect(await refused(await wires[0]!.start(), { traffic: 'tx' })).toBe('--traffic')
  })
})

describe('a disk', () => {
  test.each([
    ['traffic', 'rx'],
    ['both', true],
    ['frame-size', 64],
    ['flows', 1],
    ['queue-size', 64],
    ['mac', '02:00:00:00:00:01'],
    ['peer-mac', '02:00:00:00:00:01'],
    ['no-mrg-rxbuf', true],
  ])("--%s is a network device's", async (name, value) => {
    expect(await refused([await serveFake('none')], { [name]: value })).toBe(`--${name}`)
  })

  test('has one socket', async () => {
    const socket = await serveFake('none')
    expect(await refused([socket, '/other.sock'], {})).toBe('/other.sock')
  })

  test('is known by its features', async () => {
    const { code, output } = await bench([await serveFake('none')], { qd: 2 })
    expect([code, output]).toEqual([0, expect.stringMatching(/^randread 4096 bytes, qd 2/)])
  })

  test('--device overrules them', async () => {
    expect(await refused([await serveFake('none')], { device: 'net', bs: 4096 })).toBe('--bs')
  })
})
