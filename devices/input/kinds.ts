/** What a keyboard, a mouse and a tablet are to a driver. */
import {
  BUS_VIRTUAL,
  EV_ABS,
  EV_KEY,
  EV_LED,
  EV_REL,
  EV_REP,
  type InputDescription,
} from '../../src/device/virtio-input.ts'
import { ABS_X, ABS_Y, BUTTONS, KEYS, LEDS, REL_WHEEL, REL_X, REL_Y } from './keys.ts'

export type InputKind = 'keyboard' | 'mouse' | 'tablet'

export interface InputShape {
  /** Names → codes of what can be pressed. */
  readonly keys: ReadonlyMap<string, number>
  describe(serial: string): InputDescription
}

/** The largest coordinate of a tablet, whatever the guest's screen; the smallest is 0. */
export const TABLET_MAX = 32767

/** The vendor of virtio's PCI devices. */
const VENDOR = 0x1af4

function ids(product: number): NonNullable<InputDescription['ids']> {
  return { bus: BUS_VIRTUAL, vendor: VENDOR, product, version: 1 }
}

export const KINDS: Readonly<Record<InputKind, InputShape>> = {
  keyboard: {
    keys: KEYS,
    describe: (serial) => ({
      name: 'virtiod keyboard',
      serial,
      ids: ids(1),
      // REP_DELAY and REP_PERIOD: the guest repeats a key that is held.
      events: { [EV_KEY]: [...KEYS.values()], [EV_LED]: [...LEDS.keys()], [EV_REP]: [0, 1] },
    }),
  },
  mouse: {
    keys: BUTTONS,
    describe: (serial) => ({
      name: 'virtiod mouse',
      serial,
      ids: ids(2),
      events: { [EV_KEY]: [...BUTTONS.values()], [EV_REL]: [REL_X, REL_Y, REL_WHEEL] },
    }),
  },
  tablet: {
    keys: BUTTONS,
    describe: (serial) => ({
      name: 'virtiod tablet',
      serial,
      ids: ids(3),
      events: { [EV_KEY]: [...BUTTONS.values()], [EV_REL]: [REL_WHEEL], [EV_ABS]: [ABS_X, ABS_Y] },
      axes: { [ABS_X]: { min: 0, max: TABLET_MAX }, [ABS_Y]: { min: 0, max: TABLET_MAX } },
    }),
  },
}
