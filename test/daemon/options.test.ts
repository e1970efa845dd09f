/** The little languages of option values. */
import { describe, expect, test } from 'vitest'
import { checkSocketPath, parseIothreadCpus, parseMetricsAddress } from '../../src/daemon/options.ts'

describe('--iothread-cpus', () => {
  test.each([
    ['2,3', 2, [[2], [3]]],
    [
      '0-3,4-7',
      2,
      [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
      ],
    ],
    ['0+2', 1, [[0, 2]]],
    ['5+0-1+1', 1, [[0, 1, 5]]],
    ['1', 3, [[1], [1], [1]]],
  ])('%s for %i iothreads', (text, iothreads, expected) => {
    expect(parseIothreadCpus(text, iothreads, '--iothread-cpus')).toEqual(expected)
  })

  test.each([
    ['1,2', 3, '--iothread-cpus: 2 items for 3 iothreads. Give one item per iothread, or a single one for all;'],
    ['1,2', 1, '--iothread-cpus: 2 items for 1 iothread. '],
    ['3-1', 1, '--iothread-cpus: 3-1 is no range of processors. Give it as FIRST-LAST.'],
    ['1-2-3', 1, '--iothread-cpus: 1-2-3 is no range of processors. '],
  ])('%s for %i iothreads is refused', (text, iothreads, message) => {
    expect(() => parseIothreadCpus(text, iothreads, '--iothread-cpus')).toThrow(message)
  })
})

describe('--metrics', () => {
  test.each([
    ['127.0.0.1:9400', { host: '127.0.0.1', port: 9400 }],
    ['[::1]:9400', { host: '::1', port: 9400 }],
    ['localhost:0', { host: 'localhost', port: 0 }],
    [':9400', { host: '127.0.0.1', port: 9400 }],
    ['unix:/run/m.sock', { path: '/run/m.sock' }],
  ])('%s', (text, expected) => {
    expect(parseMetricsAddress(text, '--metrics')).toEqual(expected)
  })

  test.each(['9400', '127.0.0.1', 'a:b', '::1:9400', '127.0.0.1:65536', 'http://x:1', 'unix:', ''])(
    '%s is refused',
    (text) => {
      expect(() => parseMetricsAddress(text, '--metrics')).toThrow(
        `--metrics: ${JSON.stringify(text)} is no address. Give HOST:PORT such as 127.0.0.1:9400`
      )
    }
  )
})

describe('socket paths', () => {
  test('107 bytes fit, 108 do not, and bytes are counted, not letters', () => {
    expect(checkSocketPath('a'.repeat(107), 'x')).toHaveLength(107)
    expect(() => checkSocketPath('a'.repeat(108), '--socket-path')).toThrow(
      "--socket-path: the path has 108 bytes and a unix socket's has at most 107. Give a shorter one"
    )
    expect(() => checkSocketPath('ä'.repeat(54), 'x')).toThrow('108 bytes')
    expect(() => checkSocketPath('a\0b', 'x')).toThrow('NUL')
  })
})
