/** The commands of the control socket: text → events. It knows no sockets. */
import { EV_ABS, EV_REL, type InputEvent } from '../../src/device/virtio-input.ts'
import { CommandError, type EventSender } from './events.ts'
import { ABS_X, ABS_Y, KEYS, LEDS, REL_WHEEL, REL_X, REL_Y, type Stroke, strokeOf } from './keys.ts'
import { type InputKind, KINDS, TABLET_MAX } from './kinds.ts'

/** What a command works on. */
export interface CommandTarget {
  readonly kind: InputKind
  readonly events: EventSender
  /** Codes of LEDs that are on. */
  readonly leds: ReadonlySet<number>
}

interface Command {
  /** As in the list of `help`. */
  readonly usage: string
  readonly of: readonly InputKind[]
  /**
   * @param rest the line behind the command's name @returns lines to answer before "ok"
   * @throws CommandError
   */
  run(target: CommandTarget, rest: string): Promise<readonly string[]>
}

const POINTERS: readonly InputKind[] = ['mouse', 'tablet']
const ALL: readonly InputKind[] = ['keyboard', ...POINTERS]
const DONE: readonly string[] = []

const COMMANDS: Readonly<Record<string, Command>> = {
  type: {
    usage: 'type TEXT: as on a US keyboard; \\n is ENTER, \\t TAB, \\\\ a backslash',
    of: ['keyboard'],
    async run({ events }, rest) {
      const shift = KEYS.get('KEY_LEFTSHIFT') as number
      // First all of it: half a line that ends in a mistake would be worse than none.
      const strokes = strokesOf(rest)
      for (const stroke of strokes) await events.press(stroke.shift ? [shift, stroke.code] : [stroke.code])
      return DONE
    },
  },
  press: {
    usage: 'press KEY …: all of them down in this order, then up: press KEY_LEFTCTRL KEY_LEFTALT KEY_DELETE',
    of: ALL,
    async run({ kind, events }, rest) {
      await events.press(words(rest, 1, 16).map((word) => codeOf(kind, word)))
      return DONE
    },
  },
  key: {
    usage: 'key KEY down|up',
    of: ALL,
    async run({ kind, events }, rest) {
      const [key = '', direction = ''] = words(rest, 2, 2)
      const code = codeOf(kind, key)
      if (direction !== 'down' && direction !== 'up') throw new CommandError(`"${direction}" is neither down nor up`)
      await events.key(code, direction === 'down')
      return DONE
    },
  },
  move: {
    usage: 'move DX DY: by so much, to the right and down',
    of: ['mouse'],
    async run({ events }, rest) {
      const [x = 0, y = 0] = numbers(rest, 2, -32768, 32767)
      await events.group(moves([relative(REL_X, x), relative(REL_Y, y)]))
      return DONE
    },
  },
  at: {
    usage: `at X Y: to this place; 0 0 is the upper left corner, ${TABLET_MAX} ${TABLET_MAX} the lower right one`,
    of: ['tablet'],
    async run({ events }, rest) {
      const [x = 0, y = 0] = numbers(rest, 2, 0, TABLET_MAX)
      await events.group([
        { type: EV_ABS, code: ABS_X, value: x },
        { type: EV_ABS, code: ABS_Y, value: y },
      ])
      return DONE
    },
  },
  wheel: {
    usage: 'wheel N: N notches away from the user, or towards the user when N is negative',
    of: POINTERS,
    async run({ events }, rest) {
      const [notches = 0] = numbers(rest, 1, -1000, 1000)
      await events.group(moves([relative(REL_WHEEL, notches)]))
      return DONE
    },
  },
  leds: {
    usage: 'leds: which are on; later changes come as lines of their own: "led capslock on"',
    of: ['keyboard'],
    async run({ leds }, rest) {
      words(rest, 0, 0)
      return [...LEDS.keys()].map((code) => ledLine(code, leds.has(code)))
    },
  },
  help: {
    usage: 'help: these lines',
    of: ALL,
    async run({ kind }, rest) {
      words(rest, 0, 0)
      return commandsOf(kind).map(([, { usage }]) => usage)
    },
  },
}

/**
 * Carries out one line.
 * @returns lines to answer before "ok" @throws CommandError for who gave it
 */
export async function runCommand(target: CommandTarget, line: string): Promise<readonly string[]> {
  const [, name = '', rest = ''] = /^(\S*) ?(.*)$/s.exec(line) ?? []
  const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined
  if (command === undefined || !command.of.includes(target.kind)) {
    const names = commandsOf(target.kind).map(([known]) => known)
    throw new CommandError(`a ${target.kind} knows no command "${name}", but ${names.join(', ')}`)
  }
  return await command.run(target, rest)
}

/** What is sent when the guest switches an LED. */
export function ledLine(code: number, on: boolean): string {
  return `led ${LEDS.get(code)} ${on ? 'on' : 'off'}`
}

function commandsOf(kind: InputKind): [string, Command][] {
  return Object.entries(COMMANDS).filter(([, { of }]) => of.includes(kind))
}

function strokesOf(text: string): Stroke[] {
  if (text === '') throw new CommandError('there is nothing to type')
  const escapes: Readonly<Record<string, string>> = { '\\n': '\n', '\\t': '\t', '\\\\': '\\' }
  return (text.match(/\\.|./gsu) ?? []).map((part) => {
    const character = part.length > 1 && part.startsWith('\\') ? escapes[part] : part
    if (character === undefined) throw new CommandError(`"${part}" is none of \\n, \\t and \\\\`)
    const stroke = strokeOf(character)
    if (stroke === undefined) throw new CommandError(`a US keyboard has no key for "${character}"`)
    return stroke
  })
}

/** `KEY_A`, `key_a` and `a` are the same. */
function codeOf(kind: InputKind, word: string): number {
  const { keys } = KINDS[kind]
  const name = word.toUpperCase()
  const code = keys.get(name) ?? keys.get(`${kind === 'keyboard' ? 'KEY' : 'BTN'}_${name}`)
  if (code === undefined) throw new CommandError(`a ${kind} has no key "${word}"`)
  return code
}

function words(rest: string, least: number, most: number): string[] {
  const found = rest.split(/\s+/).filter((word) => word !== '')
  if (found.length >= least && found.length <= most) return found
  const wanted = least === most ? `${least}` : `${least} to ${most}`
  throw new CommandError(`${found.length} words behind the command, it takes ${wanted}`)
}

function numbers(rest: string, count: number, min: number, max: number): number[] {
  return words(rest, count, count).map((word) => {
    const value = Number(word)
    if (Number.isInteger(value) && value >= min && value <= max) return value
    throw new CommandError(`"${word}" is no whole number from ${min} to ${max}`)
  })
}

function relative(code: number, value: number): InputEvent {
  return { type: EV_REL, code, value }
}

/** A relative axis that doesn't move has no event. */
function moves(events: readonly InputEvent[]): InputEvent[] {
  return events.filter(({ value }) => value !== 0)
}
