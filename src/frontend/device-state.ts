/**
 * The transfer of a device's state, as a migrating front-end does it (vhost-user.rst "Migrating back-end state"): a
 * channel, the bytes, their end, and the back-end's word for it. All rings must be stopped. It owns the channel while
 * it lasts.
 */
import { native, systemError } from '../native.ts'
import { VHOST_TRANSFER_STATE_DIRECTION_LOAD, VHOST_TRANSFER_STATE_DIRECTION_SAVE } from '../vhost-user/wire.ts'
import type { Connection } from './connection.ts'
import { FrontendError } from './errors.ts'

const NO_FDS = new Int32Array(2)

/**
 * The state of the device.
 * @throws FrontendError nack when the back-end refuses or fails, timeout when its end doesn't come
 */
export function saveDeviceState(connection: Connection): Uint8Array {
  const parts: Uint8Array[] = []
  transfer(connection, VHOST_TRANSFER_STATE_DIRECTION_SAVE, (fd) => {
    const deadline = performance.now() + connection.channel.timeoutMs
    for (;;) {
      const bytes = new Uint8Array(65536)
      const left = Math.ceil(deadline - performance.now())
      if (left <= 0 || native.pollIn(fd, left) !== 1) {
        throw new FrontendError('SET_DEVICE_STATE_FD', 'timeout', 'the end of the state did not come')
      }
      const count = native.recvMessage(fd, bytes, 0, bytes.length, NO_FDS)
      if (count === 0) return
      if (count > 0) parts.push(bytes.subarray(0, count))
      else if (count !== -11 && count !== -4) throw systemError(count, 'recvmsg', "the device's state")
    }
  })
  connection.checkDeviceState()
  return Buffer.concat(parts)
}

/** Gives the device the state of another one. @throws FrontendError nack when the back-end does not want it */
export function loadDeviceState(connection: Connection, state: Uint8Array): void {
  transfer(connection, VHOST_TRANSFER_STATE_DIRECTION_LOAD, (fd) => {
    for (let done = 0; done < state.length; ) {
      const count = native.sendMessage(fd, state, done, state.length - done, NO_FDS, 0, true)
      // A back-end that doesn't want to read on says so when it is asked.
      if (count <= 0) return
      done += count
    }
  })
  connection.checkDeviceState()
}

/** A socket pair behaves as a pipe does once its other end is closed. */
function transfer(connection: Connection, direction: number, exchange: (fd: number) => void): void {
  const pair = new Int32Array(2)
  const result = native.socketpair(pair)
  if (result < 0) throw systemError(result, 'socketpair', "the device's state")
  let [mine = -1, theirs = -1] = pair
  try {
    const other = connection.setDeviceStateFd(direction, theirs)
    native.close(theirs)
    theirs = -1
    if (other !== undefined) {
      native.close(mine)
      mine = other
    }
    exchange(mine)
  } finally {
    native.close(mine)
    if (theirs >= 0) native.close(theirs)
  }
}
