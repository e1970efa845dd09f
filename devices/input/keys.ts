/**
 * The names of keys, buttons, axes and LEDs, as in Linux' input-event-codes.h (the specification of virtio-input refers to
 * it), and which keys a US keyboard needs for a character. It knows no device.
 */

/** KEY_ESC is 1, and so on. */
const KEYS_IN_ORDER = `
  ESC 1 2 3 4 5 6 7 8 9 0 MINUS EQUAL BACKSPACE TAB Q W E R T Y U I O P LEFTBRACE RIGHTBRACE ENTER LEFTCTRL A S D F G H J K L
  SEMICOLON APOSTROPHE GRAVE LEFTSHIFT BACKSLASH Z X C V B N M COMMA DOT SLASH RIGHTSHIFT KPASTERISK LEFTALT SPACE CAPSLOCK
  F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 NUMLOCK SCROLLLOCK KP7 KP8 KP9 KPMINUS KP4 KP5 KP6 KPPLUS KP1 KP2 KP3 KP0 KPDOT
`
  .trim()
  .split(/\s+/)

const KEYS_BY_CODE: Readonly<Record<number, string>> = {
  86: '102ND',
  87: 'F11',
  88: 'F12',
  96: 'KPENTER',
  97: 'RIGHTCTRL',
  98: 'KPSLASH',
  99: 'SYSRQ',
  100: 'RIGHTALT',
  102: 'HOME',
  103: 'UP',
  104: 'PAGEUP',
  105: 'LEFT',
  106: 'RIGHT',
  107: 'END',
  108: 'DOWN',
  109: 'PAGEDOWN',
  110: 'INSERT',
  111: 'DELETE',
  113: 'MUTE',
  114: 'VOLUMEDOWN',
  115: 'VOLUMEUP',
  116: 'POWER',
  117: 'KPEQUAL',
  119: 'PAUSE',
  125: 'LEFTMETA',
  126: 'RIGHTMETA',
  127: 'COMPOSE',
  142: 'SLEEP',
  143: 'WAKEUP',
}

/** KEY_A → 30: the keys of a keyboard. */
export const KEYS: ReadonlyMap<string, number> = new Map([
  ...KEYS_IN_ORDER.map((name, i): [string, number] => [`KEY_${name}`, i + 1]),
  ...Object.entries(KEYS_BY_CODE).map(([code, name]): [string, number] => [`KEY_${name}`, Number(code)]),
])

/** The buttons of mice and tablets. */
export const BUTTONS: ReadonlyMap<string, number> = new Map([
  ['BTN_LEFT', 0x110],
  ['BTN_RIGHT', 0x111],
  ['BTN_MIDDLE', 0x112],
  ['BTN_SIDE', 0x113],
  ['BTN_EXTRA', 0x114],
])

export const REL_X = 0
export const REL_Y = 1
export const REL_WHEEL = 8
export const ABS_X = 0
export const ABS_Y = 1

/** LED_* → its name on the control socket. */
export const LEDS: ReadonlyMap<number, string> = new Map([
  [0, 'numlock'],
  [1, 'capslock'],
  [2, 'scrolllock'],
])

/** What a character takes on a US keyboard. */
export interface Stroke {
  readonly code: number
  readonly shift: boolean
}

const PLAIN = "1234567890-=[];'`\\,./ \t\n"
const SHIFTED = '!@#$%^&*()_+{}:"~|<>?'
const NAMES =
  '1 2 3 4 5 6 7 8 9 0 MINUS EQUAL LEFTBRACE RIGHTBRACE SEMICOLON APOSTROPHE GRAVE BACKSLASH COMMA DOT SLASH SPACE TAB ENTER'

const STROKES: ReadonlyMap<string, Stroke> = new Map(
  NAMES.split(' ')
    .flatMap((name, i): [string | undefined, Stroke][] => {
      const code = KEYS.get(`KEY_${name}`) as number
      return [
        [PLAIN[i], { code, shift: false }],
        [SHIFTED[i], { code, shift: true }],
      ]
    })
    .concat(
      [...'ABCDEFGHIJKLMNOPQRSTUVWXYZ'].flatMap((letter) => {
        const code = KEYS.get(`KEY_${letter}`) as number
        return [
          [letter.toLowerCase(), { code, shift: false }],
          [letter, { code, shift: true }],
        ]
      })
    )
    .filter((entry): entry is [string, Stroke] => entry[0] !== undefined)
)

/** Undefined: a US keyboard has no such character. */
export function strokeOf(character: string): Stroke | undefined {
  return STROKES.get(character)
}
