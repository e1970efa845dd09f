/** The config space: what can be read and written, and how a resize reaches the front-end. */
import { closeSync, ftruncateSync, openSync, statSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { rangeBytes } from '../../src/frontend/blk.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import {
  VHOST_USER_BACKEND_CONFIG_CHANGE_MSG,
  VHOST_USER_GET_CONFIG,
  VHOST_USER_SET_CONFIG,
} from '../../src/vhost-user/wire.ts'
import * as blk from '../../src/virtio/blk.ts'
import { backendForFile, eventually, MIB, mustServe, open, pattern } from './backend.ts'
import { bothWays, message, negotiated, outcome, outcomeOf } from './messages.ts'
import { config } from './request-rows.ts'

const current = backendForFile()

describe('GET_CONFIG', () => {
  test('any part, of any size, is what the whole has there', () => {
    using connection = negotiated(current().socket)
    const whole = connection.getConfig(0, 256)!
    expect(whole.length).toBe(256)
    expect(Number(blk.decodeBlkConfig(whole).capacity) * 512).toBe(statSync(current().image).size)
    for (const [offset, size] of [
      [0, 57],
      [0, 60],
      [0, 8],
      [0, 1],
      [0, 0],
      [3, 7],
      [32, 1],
      [59, 1],
      [60, 36],
      [255, 1],
      [256, 0],
    ] as const) {
      expect(connection.getConfig(offset, size), `${size} at ${offset}`).toEqual(whole.slice(offset, offset + size))
    }
    expect(whole.subarray(60).every((byte) => byte === 0)).toBe(true)
  })

  test('out of bounds: a zero-length payload, and the session goes on', () => {
    using connection = negotiated(current().socket)
    for (const [offset, size] of [
      [256, 1],
      [255, 2],
      [1, 256],
      [200, 57],
      [0x7fff_ffff, 8],
      [0xffff_ffff, 1],
      [0xffff_fff8, 8],
      [0xffff_ff00, 256],
    ] as const) {
      expect(connection.getConfig(offset, size), `${size} at ${offset}`).toBeUndefined()
    }
    connection.barrier()
  })

  test('a size that is not that of the payload: a zero-length payload', () => {
    using connection = negotiated(current().socket)
    for (const size of [0, 59, 61, 256, 257, 0xffff_ffff]) {
      connection.send(message(VHOST_USER_GET_CONFIG, config(0, new Uint8Array(60), size)))
      expect(connection.channel.receive('GET_CONFIG').payload.length, `size ${size}`).toBe(0)
    }
    connection.barrier()
  })

  test('a payload larger than any config space ends the session', () => {
    expect(bothWays(current().socket, VHOST_USER_GET_CONFIG, config(0, new Uint8Array(257)))).toEqual([
      'closed',
      'closed',
    ])
  })
})

describe('SET_CONFIG', () => {
  test('only the write-cache switch can be written', () => {
    using connection = negotiated(current().socket)
    const before = connection.getConfig(0, 60)!
    for (let offset = 0; offset < 60; offset++) {
      if (offset === blk.VIRTIO_BLK_CONFIG_WCE) continue
      expect(
        outcomeOf(() => connection.setConfig(offset, new Uint8Array([1]))),
        `offset ${offset}`
      ).toBe('nack')
    }
    for (const [offset, size] of [
      [0, 8],
      [0, 60],
      [31, 2],
      [32, 2],
      [32, 0],
      [250, 7],
      [256, 1],
      [0xffff_ffff, 1],
      [0xffff_ffe0, 33],
    ] as const) {
      expect(
        outcomeOf(() => connection.setConfig(offset, new Uint8Array(size).fill(1))),
        `${size} at ${offset}`
      ).toBe('nack')
    }
    for (const value of [2, 0x80, 0xff]) {
      expect(outcomeOf(() => connection.setConfig(blk.VIRTIO_BLK_CONFIG_WCE, new Uint8Array([value])))).toBe('nack')
    }
    expect(connection.getConfig(0, 60)).toEqual(before)
  })

  test('a size that is not that of the payload', () => {
    for (const size of [0, 2, 256, 0xffff_ffff]) {
      using connection = negotiated(current().socket)
      expect(outcome(connection, VHOST_USER_SET_CONFIG, config(32, new Uint8Array(1), size))).toBe('nack')
    }
  })

  test('the write cache is switched, requests go on, and a new session begins with the default', () => {
    const opened = open(current().socket)
    const { connection } = opened.session
    const wce = (): number => connection.getConfig(blk.VIRTIO_BLK_CONFIG_WCE, 1)![0]!
    expect(wce()).toBe(1)
    for (const value of [0, 1, 0, 0]) {
      connection.setConfig(blk.VIRTIO_BLK_CONFIG_WCE, new Uint8Array([value]))
      expect(wce()).toBe(value)
      mustServe(opened.blk)
    }
    opened.session.close()
    using next = negotiated(current().socket)
    expect(next.getConfig(blk.VIRTIO_BLK_CONFIG_WCE, 1)).toEqual(new Uint8Array([1]))
  })
})

describe('resize', () => {
  /** truncate -s and SIGHUP. */
  function resize(bytes: number): void {
    const fd = openSync(current().image, 'r+')
    ftruncateSync(fd, bytes)
    closeSync(fd)
    current().process.kill('SIGHUP')
  }

  test('the front-end hears of it, and the new end can be used', () => {
    using opened = open(current().socket)
    const { connection } = opened.session
    const capacity = (): number => Number(blk.decodeBlkConfig(connection.getConfig(0, 60)!).capacity)
    mustServe(opened.blk)
    const old = capacity()
    expect(opened.blk.run(blk.VIRTIO_BLK_T_IN, old, new Uint8Array(0), 512).status).toBe(blk.VIRTIO_BLK_S_IOERR)
    const grown = old * 512 + 8 * MIB
    resize(grown)
    const told = connection.backendRequest(2000)
    expect(told?.request).toBe(VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
    expect(told?.payload.length).toBe(0)
    expect(capacity()).toBe(grown / 512)
    const data = pattern(4096)
    opened.blk.write(grown / 512 - 8, data)
    expect(opened.blk.read(grown / 512 - 8, 4096)).toEqual(data)
    expect(opened.blk.run(blk.VIRTIO_BLK_T_IN, grown / 512, new Uint8Array(0), 512).status).toBe(blk.VIRTIO_BLK_S_IOERR)

    resize(old * 512)
    expect(connection.backendRequest(2000)?.request).toBe(VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
    expect(capacity()).toBe(old)
    for (const [type, out] of [
      [blk.VIRTIO_BLK_T_IN, new Uint8Array(0)],
      [blk.VIRTIO_BLK_T_OUT, new Uint8Array(512)],
      [blk.VIRTIO_BLK_T_WRITE_ZEROES, rangeBytes([{ sector: old, sectors: 1 }])],
    ] as const) {
      const inLength = type === blk.VIRTIO_BLK_T_IN ? 512 : 0
      expect(opened.blk.run(type, old, out, inLength).status).toBe(blk.VIRTIO_BLK_S_IOERR)
    }
    mustServe(opened.blk)
    expect(statSync(current().image).size).toBe(old * 512)
  })

  test('SIGHUP without a change says nothing', () => {
    using opened = open(current().socket)
    for (let i = 0; i < 5; i++) current().process.kill('SIGHUP')
    expect(opened.session.connection.backendRequest(100)).toBeUndefined()
    mustServe(opened.blk)
  })

  test('a front-end that never reads its channel: the daemon goes on, resized over and over', () => {
    using opened = open(current().socket)
    const bytes = statSync(current().image).size
    for (let i = 1; i <= 60; i++) {
      resize(bytes + (i % 2) * MIB)
      sleepMs(2)
    }
    mustServe(opened.blk)
    resize(bytes)
    expect(
      eventually(() => Number(blk.decodeBlkConfig(opened.session.connection.getConfig(0, 8)!).capacity) * 512 === bytes)
    ).toBe(true)
  })

  test('without a channel, and without a session', () => {
    const bytes = statSync(current().image).size
    resize(bytes + MIB)
    using connection = negotiated(current().socket)
    resize(bytes)
    expect(eventually(() => Number(blk.decodeBlkConfig(connection.getConfig(0, 8)!).capacity) * 512 === bytes)).toBe(
      true
    )
  })
})
