/**
 * DEVICE_STATE against a daemon as another process: a front-end that keeps a duplicate of the pipe's fd has a hand on
 * its flags, and none of that may stop the thread that serves everybody else.
 */
import { spawnSync } from 'node:child_process'
import { closeSync, constants, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { native } from '../../src/native.ts'
import { VHOST_TRANSFER_STATE_DIRECTION_LOAD, VHOST_TRANSFER_STATE_DIRECTION_SAVE } from '../../src/vhost-user/wire.ts'
import { backendForFile, wellBehaved } from './backend.ts'
import { negotiated } from './messages.ts'

/** What a pipe holds. */
const PIPE_BYTES = 65536

const backend = backendForFile({ devices: 2 })

function pipe(): { reader: number; writer: number } {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-pipe-'))
  const path = join(directory, 'pipe')
  spawnSync('mkfifo', [path])
  const both = openSync(path, constants.O_RDWR)
  const reader = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
  const writer = openSync(path, constants.O_WRONLY | constants.O_NONBLOCK)
  closeSync(both)
  rmSync(directory, { recursive: true })
  return { reader, writer }
}

test('a pipe that becomes blocking while it is read from', () => {
  using connection = negotiated(backend().socket)
  const { reader, writer } = pipe()
  connection.setDeviceStateFd(VHOST_TRANSFER_STATE_DIRECTION_LOAD, reader)
  native.setNonblock(reader, false)
  // As much as one read takes: the next one finds nothing, and the end is not there yet.
  expect(writeSync(writer, new Uint8Array(PIPE_BYTES))).toBe(PIPE_BYTES)
  connection.barrier()
  wellBehaved(backend().sockets[1]!)
  closeSync(reader)
  closeSync(writer)
  // 64 KiB are no state of a disk.
  expect(() => connection.checkDeviceState()).toThrow('refused')
})

test('a blocking pipe without room', () => {
  using connection = negotiated(backend().socket)
  const { reader, writer } = pipe()
  expect(writeSync(writer, new Uint8Array(PIPE_BYTES))).toBe(PIPE_BYTES)
  native.setNonblock(writer, false)
  connection.setDeviceStateFd(VHOST_TRANSFER_STATE_DIRECTION_SAVE, writer)
  native.setNonblock(writer, false)
  connection.barrier()
  wellBehaved(backend().sockets[1]!)
  closeSync(writer)
  closeSync(reader)
})
