/** The input device without a guest: what a driver reads of it, what the commands send, what it tells of LEDs. */
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type TestDevice, testDevice } from 'virtiod/testing'
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest'
import input from '../../devices/input/index.ts'
import {
  EV_ABS,
  EV_KEY,
  EV_LED,
  EV_REL,
  EV_REP,
  EV_SYN,
  VIRTIO_INPUT_CFG_ABS_INFO,
  VIRTIO_INPUT_CFG_EV_BITS,
  VIRTIO_INPUT_CFG_ID_DEVIDS,
  VIRTIO_INPUT_CFG_ID_NAME,
  VIRTIO_INPUT_CFG_ID_SERIAL,
  VIRTIO_INPUT_CFG_PROP_BITS,
  VIRTIO_INPUT_CONFIG_SIZE,
  VIRTIO_INPUT_EVENT_SIZE,
} from '../../src/device/virtio-input.ts'
import { ControlClient } from './client.ts'

const dir = mkdtempSync(join(tmpdir(), 'virtiod-input-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))

const control = join(dir, 'control')
const EVENTS = 0
const STATUS = 1

let device: TestDevice
let client: ControlClient

async function open(options: Record<string, unknown> = {}): Promise<void> {
  device = await testDevice(input, { options: { control, 'key-delay': 0, ...options } })
  client = new ControlClient(control)
}

afterEach(async () => {
  client?.[Symbol.dispose]()
  await device?.close()
})

/** Selects in the config space and returns what is there. */
async function select(selection: number, subsel: number): Promise<Uint8Array> {
  expect(await device.writeConfig(0, Uint8Array.of(selection))).toBe(true)
  expect(await device.writeConfig(1, Uint8Array.of(subsel))).toBe(true)
  const bytes = device.config
  expect([...bytes.subarray(0, 2)]).toEqual([selection, subsel])
  return bytes.subarray(8, 8 + bytes[2]!)
}

function bits(bitmap: Uint8Array): number[] {
  return [...bitmap].flatMap((byte, i) =>
    [0, 1, 2, 3, 4, 5, 6, 7].filter((bit) => byte & (1 << bit)).map((b) => i * 8 + b)
  )
}

/** `count` events, as the driver gets them in buffers that it gives one at a time. */
async function events(count: number): Promise<string[]> {
  const all: string[] = []
  for (let i = 0; i < count; i++) all.push(eventText(await device.give(EVENTS, VIRTIO_INPUT_EVENT_SIZE)))
  return all
}

function eventText(bytes: Uint8Array): string {
  const view = Buffer.from(bytes)
  return `${view.readUInt16LE(0)}:${view.readUInt16LE(2)}=${view.readInt32LE(4)}`
}

const SYN = `${EV_SYN}:0=0`
const down = (code: number): string[] => [`${EV_KEY}:${code}=1`, SYN]
const up = (code: number): string[] => [`${EV_KEY}:${code}=0`, SYN]

function setLed(code: number, on: boolean, type = EV_LED): Promise<unknown> {
  const bytes = Buffer.alloc(8)
  bytes.writeUInt16LE(type, 0)
  bytes.writeUInt16LE(code, 2)
  bytes.writeUInt32LE(on ? 1 : 0, 4)
  return device.request(STATUS, bytes)
}

describe('the config space', () => {
  test('of a keyboard says who it is and what it has', async () => {
    await open({ serial: 'K-1' })
    expect(Buffer.from(await select(VIRTIO_INPUT_CFG_ID_NAME, 0)).toString()).toBe('virtiod keyboard')
    expect(Buffer.from(await select(VIRTIO_INPUT_CFG_ID_SERIAL, 0)).toString()).toBe('K-1')
    expect([...(await select(VIRTIO_INPUT_CFG_ID_DEVIDS, 0))]).toEqual([6, 0, 0xf4, 0x1a, 1, 0, 1, 0])
    expect(bits(await select(VIRTIO_INPUT_CFG_EV_BITS, EV_KEY))).toEqual(expect.arrayContaining([1, 30, 88, 105, 127]))
    expect(bits(await select(VIRTIO_INPUT_CFG_EV_BITS, EV_LED))).toEqual([0, 1, 2])
    expect(bits(await select(VIRTIO_INPUT_CFG_EV_BITS, EV_REP))).toEqual([0, 1])
    // A bit map of every byte's worth of keys, and nothing of what it has not.
    expect(await select(VIRTIO_INPUT_CFG_EV_BITS, EV_REL)).toHaveLength(0)
    expect(await select(VIRTIO_INPUT_CFG_EV_BITS, 200)).toHaveLength(0)
    expect(await select(VIRTIO_INPUT_CFG_ABS_INFO, 0)).toHaveLength(0)
    expect(await select(VIRTIO_INPUT_CFG_PROP_BITS, 0)).toHaveLength(0)
    expect(await select(VIRTIO_INPUT_CFG_ID_NAME, 1)).toHaveLength(0)
    expect(await select(0x77, 0)).toHaveLength(0)
    expect(device.config.subarray(3)).toEqual(new Uint8Array(VIRTIO_INPUT_CONFIG_SIZE - 3))
  })

  test('of a tablet has axes, of a mouse relative ones', async () => {
    await open({ kind: 'tablet' })
    expect(bits(await select(VIRTIO_INPUT_CFG_EV_BITS, EV_ABS))).toEqual([0, 1])
    const info = Buffer.from(await select(VIRTIO_INPUT_CFG_ABS_INFO, 1))
    expect([0, 4, 8, 12, 16].map((at) => info.readInt32LE(at))).toEqual([0, 32767, 0, 0, 0])
    expect(Buffer.from(await select(VIRTIO_INPUT_CFG_ID_SERIAL, 0)).toString()).toBe('input0')
    client[Symbol.dispose]()
    await device.close()
    await open({ kind: 'mouse' })
    expect(bits(await select(VIRTIO_INPUT_CFG_EV_BITS, EV_REL))).toEqual([0, 1, 8])
    expect(bits(await select(VIRTIO_INPUT_CFG_EV_BITS, EV_KEY))).toEqual([0x110, 0x111, 0x112, 0x113, 0x114])
  })

  test('is written as a whole by QEMU, of which two bytes count', async () => {
    await open()
    const whole = new Uint8Array(VIRTIO_INPUT_CONFIG_SIZE).fill(0xff)
    whole.set([VIRTIO_INPUT_CFG_ID_NAME, 0])
    expect(await device.writeConfig(0, whole)).toBe(true)
    expect(Buffer.from(device.config.subarray(8, 24)).toString()).toBe('virtiod keyboard')
    expect(device.config[135]).toBe(0)
    // A write behind them selects nothing.
    expect(await device.writeConfig(8, Uint8Array.of(1, 2, 3))).toBe(true)
    expect(Buffer.from(device.config.subarray(8, 24)).toString()).toBe('virtiod keyboard')
    await device.reset()
    expect(device.config).toEqual(new Uint8Array(VIRTIO_INPUT_CONFIG_SIZE))
  })
})

describe('a keyboard', () => {
  beforeEach(() => open())

  test('types', async () => {
    const typed = client.command('type aB\\n\\\\')
    expect(await events(20)).toEqual([
      ...[...down(30), ...up(30)],
      ...[...down(42), ...down(48), ...up(48), ...up(42)],
      ...[...down(28), ...up(28)],
      ...[...down(43), ...up(43)],
    ])
    expect(await typed).toEqual(['ok'])
    expect(device.operations).toEqual({ event: 20, status: 0 })
  })

  test('has a key for every printable character of ASCII', async () => {
    const text = Array.from({ length: 95 }, (_, i) => String.fromCharCode(32 + i)).join('')
    const typed = client.command(`type ${text.replace('\\', '\\\\')}`)
    const shifted = [...text].filter((character) => /[A-Z~!@#$%^&*()_+{}|:"<>?]/.test(character)).length
    const all = await events(95 * 4 + shifted * 4)
    expect(await typed).toEqual(['ok'])
    expect(new Set(all.filter((event) => event.endsWith('=1')))).toHaveProperty('size', 48 + 1)
  })

  test('presses chords, in both spellings', async () => {
    const pressed = client.command('press KEY_LEFTCTRL leftalt Delete')
    expect(await events(12)).toEqual([
      ...[...down(29), ...down(56), ...down(111)],
      ...[...up(111), ...up(56), ...up(29)],
    ])
    expect(await pressed).toEqual(['ok'])
  })

  test('holds a key until it is told otherwise', async () => {
    const held = client.command('key KEY_A down')
    expect(await events(2)).toEqual(down(30))
    expect(await held).toEqual(['ok'])
    expect(await client.command('key KEY_A down')).toEqual(['ok'])
    const freed = client.command('key KEY_A up')
    expect(await events(2)).toEqual(up(30))
    expect(await freed).toEqual(['ok'])
  })

  test('tells of LEDs, and which are on', async () => {
    await setLed(1, true)
    expect(await client.line()).toBe('led capslock on')
    // Nothing new, an LED that it has not, and another type.
    await setLed(1, true)
    await setLed(9, true)
    await setLed(0, true, EV_REP)
    expect(await client.command('leds')).toEqual(['led numlock off', 'led capslock on', 'led scrolllock off', 'ok'])
    await setLed(1, false)
    expect(await client.line()).toBe('led capslock off')
  })

  test('forgets keys and LEDs when the driver goes, and what waits for it fails', async () => {
    const held = client.command('key KEY_A down')
    await events(2)
    await held
    await setLed(0, true)
    expect(await client.line()).toBe('led numlock on')
    const waiting = client.command('type never')
    // The first event has a buffer, the others wait for more.
    expect(await events(1)).toEqual([`${EV_KEY}:49=1`])
    await device.reset()
    expect(await waiting).toEqual(['led numlock off', "error the guest's driver is gone"])
    const again = client.command('key KEY_A down')
    expect(await events(2)).toEqual(down(30))
    expect(await again).toEqual(['ok'])
  })

  test('gives back buffers that are too small, and who wanted to use them hears of it', async () => {
    const command = client.command('key KEY_A down')
    const small = device.give(EVENTS, VIRTIO_INPUT_EVENT_SIZE - 1)
    expect(await command).toEqual(["error the guest's driver gave a buffer that is too small for an event"])
    expect(await small).toHaveLength(0)
    // One that has nothing to write into at all.
    const again = client.command('key KEY_A down')
    expect((await device.request(EVENTS, Uint8Array.of(1))).written).toBe(0)
    expect((await again)[0]).toContain('too small')
    const held = client.command('key KEY_A down')
    expect(await events(2)).toEqual(down(30))
    expect(await held).toEqual(['ok'])
    expect(device.log).toEqual([])
  })

  test('keeps its state over a handover', async () => {
    const held = client.command('key KEY_A down')
    await events(2)
    await held
    await setLed(2, true)
    const state = await device.saveState()
    await device.reset()
    await device.loadState(state)
    expect(await client.command('leds')).toContain('led scrolllock on')
    const freed = client.command('key KEY_A up')
    expect(await events(2)).toEqual(up(30))
    expect(await freed).toEqual(['ok'])
    await expect(device.loadState(Buffer.from('{"pressed": [-1], "leds": []}'))).rejects.toThrow()
  })

  test.each([
    [' ', 'knows no command ""'],
    ['typo x', 'a keyboard knows no command "typo", but type, press, key, leds, help'],
    ['toString', 'knows no command "toString"'],
    ['move 1 1', 'a keyboard knows no command "move"'],
    ['type', 'there is nothing to type'],
    ['type ä', 'a US keyboard has no key for "ä"'],
    ['type \\x', '"\\x" is none of'],
    ['press', '0 words behind the command, it takes 1 to 16'],
    ['press KEY_NONE', 'a keyboard has no key "KEY_NONE"'],
    ['press BTN_LEFT', 'a keyboard has no key "BTN_LEFT"'],
    ['key KEY_A', '1 words behind the command, it takes 2'],
    ['key KEY_A sideways', '"sideways" is neither down nor up'],
    ['leds all', '1 words behind the command, it takes 0'],
  ])('refuses "%s"', async (line, message) => {
    const answer = await client.command(line)
    expect(answer).toEqual([expect.stringMatching(/^error /)])
    expect(answer[0]).toContain(message)
    expect(device.operations).toEqual({ event: 0, status: 0 })
  })

  test('helps', async () => {
    const lines = await client.command('help')
    expect(lines.at(-1)).toBe('ok')
    expect(lines.map((line) => line.split(/[ :]/)[0])).toEqual(['type', 'press', 'key', 'leds', 'help', 'ok'])
  })
})

describe('pointers', () => {
  test('a mouse moves, clicks and scrolls', async () => {
    await open({ kind: 'mouse' })
    const moved = client.command('move -3 40')
    expect(await events(3)).toEqual([`${EV_REL}:0=-3`, `${EV_REL}:1=40`, SYN])
    expect(await moved).toEqual(['ok'])
    const aside = client.command('move 0 1')
    expect(await events(2)).toEqual([`${EV_REL}:1=1`, SYN])
    expect(await aside).toEqual(['ok'])
    const clicked = client.command('press left')
    expect(await events(4)).toEqual([...down(0x110), ...up(0x110)])
    expect(await clicked).toEqual(['ok'])
    const scrolled = client.command('wheel -1')
    expect(await events(2)).toEqual([`${EV_REL}:8=-1`, SYN])
    expect(await scrolled).toEqual(['ok'])
    expect(await client.command('move 1')).toEqual(['error 1 words behind the command, it takes 2'])
    expect(await client.command('move 1 x')).toEqual(['error "x" is no whole number from -32768 to 32767'])
    expect(await client.command('at 1 1')).toEqual([expect.stringContaining('a mouse knows no command "at"')])
  })

  test('a tablet goes to a place', async () => {
    await open({ kind: 'tablet' })
    const moved = client.command('at 100 32767')
    expect(await events(3)).toEqual([`${EV_ABS}:0=100`, `${EV_ABS}:1=32767`, SYN])
    expect(await moved).toEqual(['ok'])
    expect(await client.command('at 0 32768')).toEqual(['error "32768" is no whole number from 0 to 32767'])
  })
})

describe('the control socket', () => {
  test('does what comes from all connections in order, and answers a line without a line feed at the end', async () => {
    await open()
    using other = new ControlClient(control)
    client.write('press a\npress b\n')
    other.end('press c\r\n\npress d')
    const all = await events(16)
    expect(all.filter((event) => event.endsWith('=1')).sort()).toEqual(['1:30=1', '1:32=1', '1:46=1', '1:48=1'])
    expect([await client.line(), await client.line(), await other.line(), await other.line()]).toEqual(
      new Array(4).fill('ok')
    )
    await expect(other.line()).rejects.toThrow('closed')
    expect(client.closed).toBe(false)
  })

  test('reads on when hundreds of commands came at once', async () => {
    await open()
    client.write('leds\n'.repeat(300))
    for (let i = 0; i < 300 * 4; i++) await client.line()
    expect(await client.command('leds')).toHaveLength(4)
  })

  test('cuts off who sends a line without end', async () => {
    await open()
    client.write('x'.repeat(100_000))
    expect(await client.line()).toBe('error a line is longer than 65536 characters')
    await expect(client.line()).rejects.toThrow('closed')
  })

  test('goes away with the device', async () => {
    await open()
    await client.command('leds')
    await device.close()
    expect(existsSync(control)).toBe(false)
    await expect(client.line()).rejects.toThrow('closed')
  })

  test('that a dead process left is replaced, and no other file', async () => {
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(control, resolve))
    const options = { control }
    await expect(testDevice(input, { options })).rejects.toMatchObject({
      code: 'ERR_INPUT_CONTROL',
      option: '--control',
      message: expect.stringContaining('another process listens on'),
    })
    await new Promise((resolve) => server.close(resolve))
    writeFileSync(control, 'precious')
    await expect(testDevice(input, { options })).rejects.toMatchObject({ code: 'ERR_INPUT_CONTROL' })
    expect(readFileSync(control, 'utf8')).toBe('precious')
    rmSync(control)
  })

  test('of a path that can’t be had names the fix', async () => {
    await expect(testDevice(input, { options: { control: join(dir, 'no', 'control') } })).rejects.toThrow(
      /^--control: cannot listen on \S+ \(\w+\)\. Give a path in a directory that exists/
    )
    await expect(testDevice(input, { options: { control: join(dir, 'x'.repeat(120)) } })).rejects.toThrow(
      'longer than 100 bytes'
    )
    await expect(testDevice(input, { options: { control, kind: 'organ' } })).rejects.toThrow('--kind')
    await expect(testDevice(input)).rejects.toThrow('--control')
  })
})

test('an event of the guest that is too short is its fault', async () => {
  await open()
  await expect(device.request(STATUS, Uint8Array.of(1, 2, 3))).rejects.toMatchObject({ name: 'ChainError' })
})
