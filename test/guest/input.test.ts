/**
 * virtio-input in a real guest: its kernel takes the three kinds for what they are, what is typed arrives at /dev/input, and
 * an LED that the guest switches is told on the control socket. One boot for all.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Guest, startGuest, startVirtiod, type VirtiodProcess, vhostUserArgs } from 'virtiod/testing'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { ControlClient } from '../input/client.ts'
import { whyNoGuest } from '../setup/prerequisites.ts'
import { qemuForInput } from './qemu-copy.ts'

const dir = mkdtempSync(join(tmpdir(), 'virtiod-input-guest-'))
const KINDS = ['keyboard', 'mouse', 'tablet'] as const
const at = (name: string): string => join(dir, name)

describe.skipIf(whyNoGuest() !== undefined)(
  'a guest with a keyboard, a mouse and a tablet',
  { timeout: 60_000 },
  () => {
    const daemons: VirtiodProcess[] = []
    const controls = new Map<string, ControlClient>()
    let guest: Guest

    /** /dev/input/eventN; QEMU's machine has a keyboard of its own. */
    const node = new Map<string, string>()

    /** Starts reading `count` events of a device in the guest; returns what reads them out. */
    async function listen(kind: string, count: number): Promise<() => Promise<string[]>> {
      const file = node.get(kind)!
      // struct input_event of 64 bits: two words of time, then type, code and value.
      await guest.sh(`rm -f /tmp/done
      (dd if=${file} of=/tmp/events bs=24 count=${count} 2> /dev/null; echo > /tmp/done) &
      until ls -l /proc/[0-9]*/fd 2> /dev/null | grep -q ${file}; do usleep 10000; done`)
      return async () => {
        const text = await guest.sh(`until [ -e /tmp/done ]; do usleep 10000; done
        hexdump -v -e '24/1 "%02x" "\\n"' /tmp/events`)
        return text.split('\n').map((line) => {
          const event = Buffer.from(line, 'hex').subarray(16)
          return `${event.readUInt16LE(0)}:${event.readUInt16LE(2)}=${event.readInt32LE(4)}`
        })
      }
    }

    beforeAll(async () => {
      const attached: string[] = []
      for (const kind of KINDS) {
        const args = [
          '--socket-path',
          at(kind),
          '--control',
          at(`${kind}.control`),
          '--kind',
          kind,
          '--serial',
          `${kind}-1`,
        ]
        daemons.push(await startVirtiod(['input', ...args]))
        controls.set(kind, new ControlClient(at(`${kind}.control`)))
        attached.push(...vhostUserArgs(at(kind), 'vhost-user-input-pci', { queue_reset: 'off' }))
      }
      guest = await startGuest({ qemu: qemuForInput(), qemuArgs: attached, modules: ['virtio_input', 'evdev'] })
    }, 60_000)

    afterAll(async () => {
      for (const control of controls.values()) control[Symbol.dispose]()
      await guest?.kill()
      for (const daemon of daemons) await daemon.stop('SIGKILL')
      rmSync(dir, { recursive: true, force: true })
    })

    test('knows them by name, serial, ids and handlers', async () => {
      const list = await guest.sh('cat /proc/bus/input/devices')
      const virtio = list.split('\n\n').filter((entry) => entry.includes('virtiod'))
      expect(virtio).toHaveLength(3)
      for (const [i, kind] of KINDS.entries()) {
        expect(virtio[i]).toContain(`N: Name="virtiod ${kind}"`)
        expect(virtio[i]).toContain(`U: Uniq=${kind}-1`)
        expect(virtio[i]).toContain(`I: Bus=0006 Vendor=1af4 Product=000${i + 1} Version=0001`)
      }
      for (const [i, kind] of KINDS.entries())
        node.set(kind, `/dev/input/${/Handlers=.*?(event\d+)/.exec(virtio[i]!)![1]}`)
      expect(virtio[0]).toMatch(/Handlers=.*kbd.* event\d/)
      expect(virtio[0]).toContain('B: LED=7')
      expect(virtio[1]).toContain('B: REL=103')
      expect(virtio[2]).toContain('B: ABS=3')
    })

    test('reads what is typed', async () => {
      const read = await listen('keyboard', 16)
      expect(await controls.get('keyboard')!.command('type aB')).toEqual(['ok'])
      const syn = '0:0=0'
      const key = (code: number, value: number): string[] => [`1:${code}=${value}`, syn]
      const expected = [key(30, 1), key(30, 0), key(42, 1), key(48, 1), key(48, 0), key(42, 0)].flat()
      // 12 of the 16; the rest is another key's.
      expect(await controls.get('keyboard')!.command('press KEY_F12')).toEqual(['ok'])
      expect(await read()).toEqual([...expected, ...key(88, 1), ...key(88, 0)])
    })

    test('loses no key of a long text', async () => {
      const text = 'the quick brown fox jumps over the lazy dog '.repeat(2)
      const read = await listen('keyboard', text.length * 4)
      expect(await controls.get('keyboard')!.command(`type ${text}`)).toEqual(['ok'])
      const downs = (await read()).filter((event) => /^1:\d+=1$/.test(event))
      expect(downs).toHaveLength(text.length)
      expect(downs.slice(0, 3)).toEqual(['1:20=1', '1:35=1', '1:18=1'])
    })

    test('moves and clicks', async () => {
      const mouse = await listen('mouse', 7)
      expect(await controls.get('mouse')!.command('move -5 7')).toEqual(['ok'])
      expect(await controls.get('mouse')!.command('press BTN_RIGHT')).toEqual(['ok'])
      expect(await mouse()).toEqual(['2:0=-5', '2:1=7', '0:0=0', '1:273=1', '0:0=0', '1:273=0', '0:0=0'])
      const tablet = await listen('tablet', 3)
      expect(await controls.get('tablet')!.command('at 1000 32767')).toEqual(['ok'])
      expect(await tablet()).toEqual(['3:0=1000', '3:1=32767', '0:0=0'])
    })

    test('switches an LED, which is told', async () => {
      const keyboard = controls.get('keyboard')!
      // struct input_event: EV_LED, LED_CAPSL, 1.
      const event = (on: number): string =>
        `\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\021\\0\\01\\0\\0${on}\\0\\0\\0`
      await guest.sh(`printf '${event(1)}' > ${node.get('keyboard')}`)
      expect(await keyboard.line()).toBe('led capslock on')
      expect(await keyboard.command('leds')).toContain('led capslock on')
      await guest.sh(`printf '${event(0)}' > ${node.get('keyboard')}`)
      expect(await keyboard.line()).toBe('led capslock off')
    })

    test('loses its keyboard’s daemon no sooner than it ends', async () => {
      const result = await guest.powerOff()
      expect(result.console).not.toMatch(/virtio_input.*(error|fail)|hung task/i)
      for (const daemon of daemons) expect(await daemon.stop()).toEqual({ code: 0, signal: null })
    })
  }
)
