/**
 * virtio-input (virtio 1.3 §5.8): a keyboard, mouse or tablet that does what it is told on a control socket, for tests of
 * what people would otherwise sit in front of: installers, boot menus, kiosks. The state: which keys are down, which LEDs are
 * on.
 */
import { closeSync } from 'node:fs'
import * as v from 'valibot'
import { defineDevice } from '../../src/device/index.ts'
import {
  EV_LED,
  InputConfig,
  readInputEvent,
  VIRTIO_ID_INPUT,
  VIRTIO_INPUT_CONFIG_SIZE,
  VIRTIO_INPUT_EVENT_SIZE,
} from '../../src/device/virtio-input.ts'
import { ledLine, runCommand } from './commands.ts'
import { ControlSocket } from './control.ts'
import { EventSender } from './events.ts'
import { LEDS } from './keys.ts'
import { KINDS } from './kinds.ts'
import { inputOptions } from './options.ts'

const code = v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(0xffff))
const savedState = v.object({ pressed: v.array(code), leds: v.array(code) })

export default defineDevice({
  apiVersion: 1,
  name: 'input',
  virtioId: VIRTIO_ID_INPUT,
  options: inputOptions,
  queues: [{ name: 'events', kind: 'buffers' }, { name: 'status' }],
  config: new Uint8Array(VIRTIO_INPUT_CONFIG_SIZE),
  operations: ['event', 'status'],
  // QEMU 7.2 offers its guest to reset single rings, whatever the back-end offers, and then tells the back-end that this was
  // negotiated (VIRTIO_F_RING_RESET); other devices of its pass on what was offered to it.
  qemu: { driver: 'vhost-user-input-pci', properties: { queue_reset: 'off' } },

  async create({ name, options, config, queues, log, signal, host }) {
    const { kind } = options
    const space = new InputConfig(config.bytes, KINDS[kind].describe(options.serial ?? name))
    const events = new EventSender(queues[0]!, options['key-delay'], signal)
    const leds = new Set<number>()
    const control = new ControlSocket(options.control, log, (line) => runCommand({ kind, events, leds }, line))
    const handoverKey = `input:${name}`
    /** The control socket, until the process before this one has let go of it. */
    let inherited = host.handover.take(handoverKey)?.fds[0]
    if (inherited === undefined) await control.bind()
    host.handover.keep(handoverKey, [inherited ?? control.fd], {})

    const setLed = (led: number, on: boolean): void => {
      if (!LEDS.has(led) || leds.has(led) === on) return
      if (on) leds.add(led)
      else leds.delete(led)
      control.tell(ledLine(led, on))
    }

    return {
      writeConfig: (offset, bytes) => space.write(offset, bytes),
      handle(chain) {
        chain.operation('status', VIRTIO_INPUT_EVENT_SIZE)
        const event = readInputEvent(chain.reader)
        // What else a guest tells its keyboard, how fast it repeats keys for example, changes nothing here.
        if (event.type === EV_LED) setLed(event.code, event.value !== 0)
      },
      reset() {
        space.reset()
        events.reset()
        for (const led of [...leds]) setLed(led, false)
      },
      saveState: () => ({ pressed: [...events.pressed], leds: [...leds] }),
      async loadState(state) {
        const saved = v.parse(savedState, state)
        if (inherited !== undefined) await control.adopt(inherited)
        inherited = undefined
        events.pressed.clear()
        for (const key of saved.pressed) events.pressed.add(key)
        for (const led of LEDS.keys()) setLed(led, saved.leds.includes(led))
      },
      async close() {
        host.handover.forget(handoverKey)
        if (inherited === undefined) await control.close()
        else closeSync(inherited)
      },
    }
  },
})
