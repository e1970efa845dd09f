/**
 * A session on its way to another process: everything that the front-end said and that the rings reached, as JSON
 * beside the fds. The other process may be of another version: what it reads is checked.
 *
 * Not here: what the device keeps (Device.saveState), and what NET_SET_MTU did, which is in the tap.
 */
import * as v from 'valibot'
import { native } from '../native.ts'
import { Connection } from './connection.ts'
import { ProtocolError } from './errors.ts'
import { InflightBuffer } from './inflight-buffer.ts'
import { MemoryTable } from './memory-table.ts'
import type { RingState } from './ring-state.ts'
import type { Session } from './session.ts'

export interface SavedSession {
  /** Plain data; its numbers of fds are indexes into `fds`. */
  readonly state: SessionState
  /** Borrowed from the session. */
  readonly fds: readonly number[]
}

/** The state is not one of a session of this device, or can't be taken up here. */
export class SavedSessionError extends Error {
  override readonly name = 'SavedSessionError'
}

const VERSION = 1

const whole = v.pipe(v.number(), v.integer(), v.minValue(0))
const bits64 = v.pipe(v.string(), v.regex(/^[0-9a-f]{1,16}$/))
const bytes = v.pipe(v.string(), v.regex(/^([0-9a-f]{2})*$/))
/** -1 = none. */
const fd = v.pipe(v.number(), v.integer(), v.minValue(-1))

const ring = v.object({
  index: whole,
  size: whole,
  /** Absent: SET_VRING_BASE did not come. */
  base: v.optional(v.pipe(whole, v.maxValue(0xffff_ffff))),
  address: v.optional(v.object({ flags: whole, descriptor: bits64, used: bits64, available: bits64, log: bits64 })),
  kicked: v.boolean(),
  kickFd: fd,
  callFd: fd,
  errFd: fd,
  kickPolled: v.boolean(),
  callPolled: v.boolean(),
  errIgnored: v.boolean(),
  enabled: v.boolean(),
  drained: v.boolean(),
  started: v.boolean(),
})

const schema = v.object({
  version: v.literal(VERSION),
  features: v.optional(bits64),
  featuresRefused: v.boolean(),
  protocolFeatures: bits64,
  status: v.pipe(whole, v.maxValue(0xff)),
  needsReset: v.boolean(),
  configPending: v.boolean(),
  connection: v.object({ fd: whole, received: bytes, receivedFds: v.array(whole) }),
  channel: v.object({
    fd,
    waiting: v.array(v.object({ request: whole, index: whole, payload: bytes, needReply: v.boolean() })),
    awaited: v.array(v.string()),
    unsent: bytes,
    received: bytes,
  }),
  regions: v.array(v.object({ gpa: whole, size: whole, uva: whole, fileOffset: whole, fd: whole })),
  /** MemoryTable.again */
  addedAgain: v.array(v.tuple([v.string(), whole])),
  translations: v.array(v.object({ iova: whole, size: whole, uva: whole, access: whole })),
  log: v.optional(v.object({ size: whole, fileOffset: whole, fd: whole })),
  logFd: fd,
  inflight: v.optional(v.object({ size: whole, fileOffset: whole, numQueues: whole, queueSize: whole, fd: whole })),
  rings: v.array(ring),
})

export type SessionState = v.InferOutput<typeof schema>
type SavedRing = SessionState['rings'][number]

/** What a session with stopped rings is made of. */
export function saveSession(session: Session): SavedSession {
  const { connection, negotiated, exchange, log, inflight, channel } = session
  const fds: number[] = []
  const keep = (own: number): number => (own < 0 ? -1 : fds.push(own) - 1)
  const { partial } = connection
  const state: SessionState = {
    version: VERSION,
    connection: {
      fd: keep(connection.fd),
      received: Buffer.from(partial.bytes).toString('hex'),
      receivedFds: partial.fds.map(keep),
    },
    ...(negotiated.features === undefined ? {} : { features: negotiated.features.toString(16) }),
    featuresRefused: negotiated.refused,
    protocolFeatures: negotiated.protocolFeatures.toString(16),
    status: negotiated.status,
    needsReset: negotiated.needsReset,
    configPending: session.configPending,
    channel: { fd: keep(channel.fd), ...copy(channel.save()) },
    regions: exchange.table.regions.map(({ gpa, size, uva, fileOffset, fd: own }) => ({
      gpa,
      size,
      uva,
      fileOffset,
      fd: keep(own),
    })),
    addedAgain: [...exchange.table.again],
    translations: [...exchange.translations.entries],
    ...(log.area === undefined
      ? {}
      : { log: { size: log.area.size, fileOffset: log.area.fileOffset, fd: keep(log.area.fd) } }),
    logFd: keep(log.fd),
    ...(inflight === undefined
      ? {}
      : {
          inflight: {
            size: inflight.area.size,
            fileOffset: inflight.area.fileOffset,
            numQueues: inflight.numQueues,
            queueSize: inflight.queueSize,
            fd: keep(inflight.area.fd),
          },
        }),
    rings: session.rings.all.map((one) => saveRing(one, keep)),
  }
  return { state, fds }
}

/**
 * @param make an empty session, which takes the connection over
 * @param fds taken over: they belong to the session when it resolves, and are closed when it throws
 * @throws SavedSessionError, or what the session's host throws
 */
export async function restoreSession(
  state: unknown,
  fds: readonly number[],
  make: (connection: Connection) => Session
): Promise<Session> {
  const own = new Fds(fds)
  let session: Session | undefined
  try {
    const parsed = v.safeParse(schema, state)
    if (!parsed.success) {
      const path = v.getDotPath(parsed.issues[0]) ?? 'it'
      throw new SavedSessionError(`no state of a session: ${path}: ${parsed.issues[0].message}`)
    }
    const saved = parsed.output
    const { connection } = saved
    own.check([connection.fd, ...connection.receivedFds, saved.channel.fd, saved.logFd])
    const received = Buffer.from(connection.received, 'hex')
    const taken = [connection.fd, ...connection.receivedFds].map((index) => own.take(index))
    try {
      session = make(new Connection(taken[0]!, { bytes: received, fds: taken.slice(1) }))
    } catch (error) {
      for (const one of taken) native.close(one)
      throw error
    }
    await fill(session, saved, own)
    return session
  } catch (error) {
    session?.abandon()
    if (error instanceof ProtocolError) throw new SavedSessionError(error.message, { cause: error })
    throw error
  } finally {
    own.close()
  }
}

async function fill(session: Session, saved: SessionState, own: Fds): Promise<void> {
  const { host, negotiated, exchange, log, rings } = session
  const features = saved.features === undefined ? undefined : BigInt(`0x${saved.features}`)
  const protocolFeatures = BigInt(`0x${saved.protocolFeatures}`)
  if (((features ?? 0n) & ~host.features) !== 0n || (protocolFeatures & ~session.offeredProtocolFeatures) !== 0n)
    throw new SavedSessionError('the front-end acknowledged features that are not offered here')
  negotiated.protocolFeatures = protocolFeatures
  for (const { gpa, size, uva, fileOffset, fd: index } of saved.regions) {
    const { table } = exchange
    const description = {
      guestAddress: BigInt(gpa),
      size: BigInt(size),
      userAddress: BigInt(uva),
      mmapOffset: BigInt(fileOffset),
    }
    table.regions = [...table.regions, MemoryTable.map(description, own.at(index), table.regions)]
  }
  for (const [key, count] of saved.addedAgain) exchange.table.again.set(key, count)
  if (saved.log !== undefined) {
    const { size, fileOffset, fd: index } = saved.log
    await log.setBase({ size: BigInt(size), offset: BigInt(fileOffset) }, own.at(index))
  }
  if (saved.logFd >= 0) await log.setFd(own.take(saved.logFd))
  // Translations come after ACCESS_PLATFORM, which begins without any.
  await exchange.share()
  if (features !== undefined) await session.setFeatures(features)
  if (saved.translations.length > 0) {
    for (const entry of saved.translations) exchange.translations.update(entry)
    await exchange.share()
  }
  negotiated.refused = saved.featuresRefused
  negotiated.status = saved.status
  if (saved.needsReset) negotiated.fail()
  if (saved.inflight !== undefined) {
    const { size, fileOffset, fd: index, ...queues } = saved.inflight
    const description = { mmapSize: BigInt(size), mmapOffset: BigInt(fileOffset), ...queues }
    session.inflight = new InflightBuffer(description, own.at(index), negotiated.packed, host.numQueues)
  }
  session.configPending = saved.configPending
  session.channel.restore(saved.channel, saved.channel.fd < 0 ? -1 : own.take(saved.channel.fd))
  for (const one of saved.rings) {
    const state = rings.all[one.index]
    if (state !== undefined) restoreRing(state, one, own)
    else if (one.size > 0 || one.kicked) throw new SavedSessionError(`there is no queue ${one.index}`)
    if (one.size > host.maxQueueSize) throw new SavedSessionError(`a ring of ${one.size} entries`)
  }
  await rings.resume()
  if (rings.all.some((state) => state.started !== saved.rings.some((one) => one.index === state.index && one.started)))
    throw new SavedSessionError('a ring that was started cannot start')
}

function saveRing(state: RingState, keep: (own: number) => number): SavedRing {
  const { index, size, base, address, kicked, kickPolled, callPolled, errIgnored, enabled, drained, suspended } = state
  const hex = (value: bigint): string => value.toString(16)
  return {
    index,
    size,
    ...(base === undefined ? {} : { base }),
    ...(address === undefined
      ? {}
      : {
          address: {
            flags: address.flags,
            descriptor: hex(address.descriptor),
            used: hex(address.used),
            available: hex(address.available),
            log: hex(address.log),
          },
        }),
    kicked,
    kickFd: keep(state.kickFd),
    callFd: keep(state.callFd),
    errFd: keep(state.errFd),
    kickPolled,
    callPolled,
    errIgnored,
    enabled,
    drained,
    started: suspended,
  }
}

function restoreRing(state: RingState, saved: SavedRing, own: Fds): void {
  const { address, kickFd, callFd, errFd, started, index, ...rest } = saved
  Object.assign(state, rest)
  const big = (value: string): bigint => BigInt(`0x${value}`)
  if (address !== undefined) {
    state.address = {
      index,
      flags: address.flags,
      descriptor: big(address.descriptor),
      used: big(address.used),
      available: big(address.available),
      log: big(address.log),
    }
  }
  state.kickFd = own.takeIfAny(kickFd)
  state.callFd = own.takeIfAny(callFd)
  state.errFd = own.takeIfAny(errFd)
  state.suspended = started
}

/** The fds that came: each is taken over by somebody, or closed at the end. */
class Fds {
  readonly #fds: number[]

  constructor(fds: readonly number[]) {
    this.#fds = [...fds]
  }

  /** Borrows one. @throws SavedSessionError when there is none of that index */
  at(index: number): number {
    const found = this.#fds[index] ?? -1
    if (found < 0) throw new SavedSessionError(`there is no file descriptor ${index}`)
    return found
  }

  take(index: number): number {
    const found = this.at(index)
    this.#fds[index] = -1
    return found
  }

  takeIfAny(index: number): number {
    return index < 0 ? -1 : this.take(index)
  }

  /** @throws SavedSessionError when one of these is not there, or is there twice */
  check(indexes: readonly number[]): void {
    const named = indexes.filter((index) => index >= 0)
    for (const index of named) this.at(index)
    if (new Set(named).size !== named.length) throw new SavedSessionError('a file descriptor that is two things')
  }

  close(): void {
    for (const one of this.#fds) if (one >= 0) native.close(one)
  }
}

/** Without readonly, as the schema has it. */
function copy({
  waiting,
  awaited,
  unsent,
  received,
}: ReturnType<Session['channel']['save']>): Omit<SessionState['channel'], 'fd'> {
  return { waiting: waiting.map((one) => ({ ...one })), awaited: [...awaited], unsent, received }
}
