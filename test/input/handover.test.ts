/** A keyboard is handed over to a new process: keys stay down, LEDs on, and the control socket is never away. */
import { connect, type FrontEnd, type PendingRequest } from 'virtiod/testing'
import { expect, test } from 'vitest'
import { directory, Serving } from '../daemon-socket/serving.ts'
import { ControlClient } from './client.ts'

const EVENTS = 0
const STATUS = 1

/** Gives the device buffers for so many events. */
function buffers(front: FrontEnd, count: number): PendingRequest[] {
  return Array.from({ length: count }, () => front.submit(EVENTS, [], 8))
}

function texts(requests: readonly PendingRequest[]): string[] {
  return requests.map(({ reply }) => {
    const event = Buffer.from(reply!.bytes)
    return `${event.readUInt16LE(0)}:${event.readUInt16LE(2)}=${event.readInt32LE(4)}`
  })
}

test('the state and the control socket go along', { timeout: 60_000 }, async () => {
  using serving = new Serving(directory(), { args: ['input', '--socket-path', 'k.sock', '--control', 'k.control'] })
  using front = connect(serving.path('k.sock'), { queues: 2 })
  const first = buffers(front, 2)
  {
    using client = new ControlClient(serving.path('k.control'))
    expect(await client.command('key a down')).toEqual(['ok'])
    front.wait()
    expect(texts(first)).toEqual(['1:30=1', '0:0=0'])
    front.request(STATUS, Uint8Array.of(0x11, 0, 1, 0, 1, 0, 0, 0))
    expect(await client.line()).toBe('led capslock on')
  }

  const old = serving.pid
  serving.handOverDuring(() => front.poll())
  expect(serving.pid).not.toBe(old)

  using client = new ControlClient(serving.path('k.control'))
  expect(await client.command('leds')).toContain('led capslock on')
  const second = buffers(front, 2)
  // The key is down: only its release is an event.
  expect(await client.command('key a down')).toEqual(['ok'])
  expect(await client.command('key a up')).toEqual(['ok'])
  front.wait()
  expect(texts(second)).toEqual(['1:30=0', '0:0=0'])
  serving.stop()
  await expect(new ControlClient(serving.path('k.control')).line()).rejects.toThrow('closed')
})

test('a handover without a driver leaves the control socket where it is', { timeout: 60_000 }, async () => {
  using serving = new Serving(directory(), { args: ['input', '--socket-path', 'k.sock', '--control', 'k.control'] })
  serving.handOverDuring(() => undefined)
  using client = new ControlClient(serving.path('k.control'))
  expect(await client.command('key a down')).toEqual(['error no driver of a guest listens'])
})
