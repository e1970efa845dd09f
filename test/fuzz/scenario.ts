/**
 * What a hostile front-end does over one connection, as data, so that it can be written to a file, played again and cut
 * down: batches of messages with the kinds of their fds, and how the connection ends.
 */
import type { Victim } from './victims.ts'

/** Kinds of fds: those that belong there, and those of odd-fds.ts that don't. */
export const FD_KINDS = [
  'memory',
  'other memory',
  'log area',
  'in-flight area',
  'event',
  'channel',
  'state pipe read',
  'state pipe write',
  'shrinking memory',
  'pipe',
  'socket',
  'listening socket',
  'O_PATH',
  '/dev/null',
  '/dev/zero',
  'regular file',
  'read-only file',
  'directory',
  'eventfd',
  'memfd',
  'read-only memfd',
  'sealed memfd',
] as const
export type FdKind = (typeof FD_KINDS)[number]

export interface FuzzMessage {
  readonly request: number
  readonly flags: number
  /** Hexadecimal. */
  readonly payload: string
  /** What the header says; undefined = the truth. */
  readonly size?: number
  readonly fds?: readonly FdKind[]
  /** It is sent in pieces that end at these bytes, the fds one with each of the first of them. */
  readonly cuts?: readonly number[]
}

export interface Scenario {
  readonly device: Victim
  /** Which kind of ring lies in memory. */
  readonly packed: boolean
  /** After each, except the last, all replies are read. */
  readonly batches: readonly (readonly FuzzMessage[])[]
  /** Only so many bytes of the last batch are sent. */
  readonly bytesOfLast?: number
}
