/** Cases about the device status, resets, and the transfer of a device's state. */
import { readSync, writeSync } from 'node:fs'
import { native } from '../../native.ts'
import {
  VHOST_TRANSFER_STATE_DIRECTION_LOAD,
  VHOST_TRANSFER_STATE_DIRECTION_SAVE,
  VHOST_USER_PROTOCOL_F_DEVICE_STATE,
  VHOST_USER_PROTOCOL_F_RESET_DEVICE,
  VHOST_USER_PROTOCOL_F_STATUS,
  VHOST_USER_SET_DEVICE_STATE_FD,
} from '../../vhost-user/wire.ts'
import { VHOST_USER_F_PROTOCOL_FEATURES } from '../../virtio/constants.ts'
import { type Connection, vringState } from '../connection.ts'
import { FrontendError } from '../errors.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expect, expectEqual, Violation } from './case.ts'
import { bytesOf, receiveReply, u64Of } from './messages.ts'

const STATE = 'vhost-user.rst "Migrating back-end state", "VHOST_USER_SET_DEVICE_STATE_FD"'
const status = { protocol: [VHOST_USER_PROTOCOL_F_STATUS] }
const state = { protocol: [VHOST_USER_PROTOCOL_F_DEVICE_STATE] }

/** Both ends of a channel, as a pipe has them. */
function withChannel<T>(use: (ours: number, theirs: number) => T): T {
  const pair = new Int32Array(2)
  if (native.socketpair(pair) < 0) throw new Error('socketpair')
  const [ours = -1, theirs = -1] = pair
  try {
    return use(ours, theirs)
  } finally {
    native.close(ours)
    native.close(theirs)
  }
}

/** Reads to the end of the channel. @throws Violation when there is none in time */
function readAll(fd: number, timeoutMs: number): Uint8Array {
  const parts: Uint8Array[] = []
  for (const deadline = performance.now() + timeoutMs; ; ) {
    const left = deadline - performance.now()
    if (left <= 0 || native.pollIn(fd, Math.ceil(left)) !== 1)
      throw new Violation('the end of the state', `none in ${timeoutMs} ms`)
    const bytes = new Uint8Array(65536)
    const count = readSync(fd, bytes)
    if (count === 0) return new Uint8Array(Buffer.concat(parts))
    parts.push(bytes.subarray(0, count))
  }
}

/** Saves the state of a device whose rings are stopped. */
function save(connection: Connection, timeoutMs: number): Uint8Array {
  const pair = new Int32Array(2)
  if (native.socketpair(pair) < 0) throw new Error('socketpair')
  let [ours = -1] = pair
  try {
    const other = connection.setDeviceStateFd(VHOST_TRANSFER_STATE_DIRECTION_SAVE, pair[1] ?? -1)
    // Only the back-end's copy keeps the channel open from here on.
    native.close(pair[1] ?? -1)
    if (other !== undefined) {
      native.close(ours)
      ours = other
    }
    const bytes = readAll(ours, timeoutMs)
    connection.checkDeviceState()
    return bytes
  } finally {
    native.close(ours)
  }
}

/** @throws FrontendError nack when the back-end does not take it */
function load(connection: Connection, bytes: Uint8Array): void {
  const pair = new Int32Array(2)
  if (native.socketpair(pair) < 0) throw new Error('socketpair')
  let [ours = -1] = pair
  try {
    const other = connection.setDeviceStateFd(VHOST_TRANSFER_STATE_DIRECTION_LOAD, pair[1] ?? -1)
    native.close(pair[1] ?? -1)
    if (other !== undefined) {
      native.close(ours)
      ours = other
    }
    if (bytes.length > 0) writeSync(ours, bytes)
  } finally {
    // The end of the state.
    native.close(ours)
  }
  connection.checkDeviceState()
}

export const migrationCases: readonly ConformanceCase[] = [
  {
    id: 'status-kept',
    group: 'migration',
    level: 'MUST',
    rule: 'answers GET_STATUS with what SET_STATUS said last',
    cites: 'vhost-user.rst "VHOST_USER_SET_STATUS", "VHOST_USER_GET_STATUS"; virtio 1.3 §2.1',
    needs: status,
    run: (context) => {
      const { guest, ring } = context.running({ status: true })
      // ACKNOWLEDGE, DRIVER, FEATURES_OK were told by the session.
      expectEqual('the status', guest.connection.getStatus() & 0x4f, 0xb)
      guest.connection.setStatus(0xf)
      expectEqual('the status with DRIVER_OK', guest.connection.getStatus() & 0x4f, 0xf)
      ring.run()
      return '0xb, then 0xf'
    },
  },
  {
    id: 'status-reset',
    group: 'migration',
    level: 'MUST',
    rule: 'has the status 0 after SET_STATUS 0, still answers GET_VRING_BASE (as QEMU asks), and can be set up anew',
    cites: 'virtio 1.3 §2.4.1 ("MUST reinitialize device status to 0"); vhost-user.rst "Ring states"',
    needs: status,
    run: (context) => {
      const { guest, ring } = context.running({ status: true })
      guest.connection.setStatus(0xf)
      ring.run(5)
      guest.connection.setStatus(0)
      expectEqual('the status', guest.connection.getStatus(), 0)
      if (context.facts.device === 'net') guest.ring(0).stop()
      expectEqual('the base', ring.stop(), 5)
      for (const value of [1, 3]) guest.connection.setStatus(value)
      guest.connection.setFeatures(guest.session.features)
      guest.connection.setStatus(0xb)
      context.startCompanions(guest)
      const again = guest.start(context.ringIndex)
      guest.connection.setStatus(0xf)
      again.run(2, {}, 'a request after the reset')
      return '0, and requests work again'
    },
  },
  {
    id: 'reset-device',
    group: 'migration',
    level: 'MUST',
    rule: 'disables all rings and forgets its state at RESET_DEVICE, and can be set up again in the same session',
    cites: 'vhost-user.rst "VHOST_USER_RESET_DEVICE"',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_RESET_DEVICE] },
    run: (context) => {
      const { guest, ring } = context.running()
      for (let round = 0; round < 3; round++) {
        const current = round === 0 ? ring : guest.ring(context.ringIndex)
        current.run(2, {}, `a request before reset ${round + 1}`)
        guest.connection.resetDevice()
        guest.connection.barrier()
        current.started = false
        const left = current.submit()
        current.expectIdle('the device was reset', 30)
        void left
        guest.connection.setFeatures(guest.session.features)
        context.startCompanions(guest)
        guest.start(context.ringIndex).run(2, {}, `a request after reset ${round + 1}`)
      }
      return '3 times'
    },
  },
  {
    id: 'reset-owner',
    group: 'migration',
    level: 'SHOULD',
    rule: 'ignores RESET_OWNER or disables all rings by it, and keeps the connection’s state',
    cites: 'vhost-user.rst "VHOST_USER_RESET_OWNER" ("It is recommended that back-ends either ignore … or disable")',
    run: (context) => {
      const { guest, ring } = context.running()
      ring.run()
      guest.connection.resetOwner()
      if (guest.session.has(VHOST_USER_F_PROTOCOL_FEATURES)) ring.enable()
      ring.run(3, {}, 'a request after RESET_OWNER and SET_VRING_ENABLE')
      return 'the ring goes on'
    },
  },
  {
    id: 'suspended-silent',
    group: 'migration',
    level: 'MUST',
    rule: 'writes to no guest memory and notifies nobody while all rings are stopped, and answers messages',
    cites: 'vhost-user.rst "Suspended device state"',
    run: (context) => {
      const guest = context.guest({ memory: [{ gpa: 2 ** 21, uva: 2 ** 44, size: 8 * 2 ** 20, offset: 65536 }] })
      context.startCompanions(guest)
      const ring = guest.start(context.ringIndex, {}, 2 ** 20)
      ring.finishAll(ring.batch(40))
      const last = ring.batch(40)
      if (context.facts.device === 'net') guest.ring(0).stop()
      const base = ring.stop()
      ring.requests.poll()
      ring.queue.takeCalls()
      const before = Buffer.from(guest.memory.region(0).bytes)
      ring.queue.driver.kickRaw()
      for (let i = 0; i < 10; i++) {
        sleepMs(5)
        guest.connection.barrier()
      }
      const after = Buffer.from(guest.memory.region(0).bytes)
      const at = before.compare(after) === 0 ? -1 : before.findIndex((byte, i) => byte !== after[i])
      expect(at < 0, 'guest memory as it was', `byte ${at} of it changed`)
      expectEqual('calls', ring.queue.takeCalls(), 0)
      if (context.facts.device === 'net') guest.ring(0).start(0)
      ring.start(base)
      ring.queue.driver.kickRaw()
      ring.finishAll(last, 'a request that was left')
      return '8 MiB as they were, no call, 10 answers'
    },
  },
  {
    id: 'device-state-save',
    group: 'migration',
    level: 'MUST',
    rule: 'writes its whole state into the channel, closes it, and answers CHECK_DEVICE_STATE with 0',
    cites: STATE,
    needs: state,
    run: (context) => {
      const { guest, ring } = context.running()
      ring.run(5)
      if (context.facts.device === 'net') guest.ring(0).stop()
      const base = ring.stop()
      const bytes = save(guest.connection, context.timeoutMs)
      // "If the migration fails, then the source can transparently resume operation."
      if (context.facts.device === 'net') guest.ring(0).start(0)
      ring.start(base)
      ring.run(3, {}, 'a request after the state was saved')
      return `${bytes.length} bytes`
    },
  },
  {
    id: 'device-state-load',
    group: 'migration',
    level: 'MUST',
    rule: 'takes a state that was saved before, and serves rings that go on where they stood',
    cites: STATE,
    needs: state,
    run: (context) => {
      const source = context.running()
      source.ring.run(7)
      if (context.facts.device === 'net') source.guest.ring(0).stop()
      const base = source.ring.stop()
      const bytes = save(source.guest.connection, context.timeoutMs)
      const guest = context.guest()
      load(guest.connection, bytes)
      context.startCompanions(guest)
      const ring = guest.prepare(context.ringIndex, { base })
      ring.start(base)
      ring.run(3, {}, 'a request at the destination')
      expectEqual('the base', ring.stop(), base + 3)
      return `${bytes.length} bytes, rings from ${base}`
    },
  },
  {
    id: 'device-state-reply',
    group: 'migration',
    level: 'MUST',
    rule: 'sets bit 8 in the reply to SET_DEVICE_STATE_FD when no file comes with it, and sends none with an error',
    cites: 'vhost-user.rst "VHOST_USER_SET_DEVICE_STATE_FD"',
    needs: state,
    run: (context) =>
      withChannel((_ours, theirs) => {
        const { connection } = context.guest()
        const payload = vringState(VHOST_TRANSFER_STATE_DIRECTION_SAVE, 0)
        connection.send(bytesOf({ request: VHOST_USER_SET_DEVICE_STATE_FD, payload }), [theirs])
        const reply = receiveReply(connection, VHOST_USER_SET_DEVICE_STATE_FD, 8)
        const value = u64Of(reply)
        const files = reply.fds.length
        for (const fd of reply.fds) native.close(fd)
        expectEqual('bits 0–7 (success)', value & 0xffn, 0n)
        expectEqual('bit 8 (no file)', (value >> 8n) & 1n, files === 0 ? 1n : 0n)
        return `0x${value.toString(16)}, ${files} files`
      }),
  },
  {
    id: 'device-state-bad-parameters',
    group: 'migration',
    level: 'SHOULD',
    rule: 'refuses directions and phases that there are not',
    cites: 'vhost-user.rst "Device state transfer parameters"',
    needs: state,
    run: (context) => {
      const seen: string[] = []
      for (const [direction, phase] of [
        [2, 0],
        [0, 1],
        [0xffff_ffff, 0xffff_ffff],
      ] as const) {
        seen.push(
          withChannel((_ours, theirs) => {
            const { connection } = context.guest()
            try {
              connection.setDeviceStateFd(direction, theirs, phase)
            } catch (error) {
              if (error instanceof FrontendError && (error.failure === 'nack' || error.failure === 'closed'))
                return error.failure === 'nack' ? 'refused' : 'closed'
              throw error
            }
            throw new Violation(`direction ${direction}, phase ${phase} refused`, 'success')
          })
        )
      }
      return seen.join(', ')
    },
  },
  {
    id: 'device-state-garbage',
    group: 'migration',
    level: 'SHOULD',
    rule: 'answers CHECK_DEVICE_STATE with an error when what was loaded is no state, and lives',
    cites: 'vhost-user.rst "VHOST_USER_CHECK_DEVICE_STATE"',
    needs: state,
    run: (context) => {
      const { connection } = context.guest()
      try {
        load(connection, new Uint8Array(1000).fill(0xee))
      } catch (error) {
        if (error instanceof FrontendError && (error.failure === 'nack' || error.failure === 'closed'))
          return error.failure === 'nack' ? 'refused' : 'closed'
        throw error
      }
      throw new Violation('an error', '1000 bytes of 0xee were taken as a state')
    },
  },
]
