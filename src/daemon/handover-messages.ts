/**
 * What the two processes of a handover tell each other, over a {@link FdChannel}. The processes may be of different
 * versions: unknown keys are ignored, and everything is checked.
 *
 * | old process | new process |
 * | --- | --- |
 * | `hello`: its devices, the files that they keep | |
 * | | opens its devices: `ready`, or `failed` at any time |
 * | suspends all sessions: a `device` each, `end` | |
 * | | has restored all of them, serves none yet: `prepared` |
 * | `commit`: from here on it does not go back by itself | |
 * | | `committed`, and only then serves |
 *
 * So each of them knows what the death of the other one means. The old process goes on when the new one ended without
 * `committed`. The new one, once prepared, goes on when the old one ended: who merely gives up kills the new one first.
 */
import * as v from 'valibot'
import { framesOf } from '../vhost-user/fd-frames.ts'
import type { DeviceConfig } from './config.ts'
import { asOptionTable, optionsOf } from './option-table.ts'

/** Of this protocol. A new process refuses a `hello` of a higher one. */
export const HANDOVER_VERSION = 1

/** The environment variable with the fd of the new process's end. */
export const HANDOVER_FD = 'VIRTIOD_HANDOVER_FD'

const count = v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(65536))
const base64 = v.pipe(v.string(), v.regex(/^[A-Za-z0-9+/]*={0,2}$/))
const socket = v.union([v.object({ path: v.string() }), v.object({ fd: v.number() })])

const hello = v.object({
  kind: v.literal('hello'),
  version: v.number(),
  pid: v.number(),
  devices: v.array(
    v.object({ name: v.string(), type: v.string(), socket, options: v.record(v.string(), v.unknown()) })
  ),
  /** Their fds come with the message, in this order. */
  files: v.array(v.object({ key: v.string(), fds: count, facts: v.unknown() })),
  /** The address of /metrics, whose listening socket is the last fd. */
  metrics: v.optional(v.unknown()),
})

/** One device at the moment of the handover; its fds come with the message. */
const device = v.object({
  kind: v.literal('device'),
  name: v.string(),
  /** Its listening socket is the first fd. `file`: the socket file, to be removed by who closes it. */
  listener: v.optional(v.object({ file: v.optional(v.object({ path: v.string(), inode: v.number() })) })),
  /** It had a connection that was handed down, which has ended. */
  ended: v.boolean(),
  /** As its session describes itself; the remaining fds are its. */
  session: v.optional(v.unknown()),
  /** `Device.saveState` */
  state: base64,
  /** Its config space, as the driver knows it. */
  config: base64,
})

const schema = v.variant('kind', [
  hello,
  device,
  v.object({ kind: v.literal('ready') }),
  v.object({ kind: v.literal('failed'), message: v.string() }),
  v.object({ kind: v.literal('end') }),
  v.object({ kind: v.literal('prepared') }),
  v.object({ kind: v.literal('commit') }),
  v.object({ kind: v.literal('committed') }),
])

export type HandoverMessage = v.InferOutput<typeof schema>
export type Hello = v.InferOutput<typeof hello>
export type HandedDevice = v.InferOutput<typeof device>

/** The values of all options that a device of this version has, `null` for those that are unset. */
export function deviceOptions({
  definition,
  options,
}: Pick<DeviceConfig, 'definition' | 'options'>): Record<string, unknown> {
  const values = options as Readonly<Record<string, unknown>>
  const table = asOptionTable(definition.options, definition.name)
  return Object.fromEntries(optionsOf(table).map(({ name }) => [name, values[name] ?? null]))
}

/** A handover that can't be. Until `committed` that means: all goes on as before. */
export class HandoverError extends Error {
  override readonly name = 'HandoverError'
  readonly code = 'ERR_HANDOVER'
}

/** @throws HandoverError */
export function parseMessage(body: unknown): HandoverMessage {
  const result = v.safeParse(schema, body)
  if (result.success) return result.output
  throw new HandoverError(`the other process sent what it should not: ${result.issues[0].message}`)
}

/** `failed` in one piece, for a process that fails before it has anything to send it with. */
export function failedFrame(message: string): Uint8Array {
  return framesOf({ kind: 'failed', message: message.slice(0, 10_000) } satisfies HandoverMessage)[0]!.bytes
}
