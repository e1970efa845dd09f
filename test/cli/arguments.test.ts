/** What the command line makes of words, without a process. */
import * as v from 'valibot'
import { describe, expect, test } from 'vitest'
import { parseArguments } from '../../src/cli/arguments.ts'
import { parseSize } from '../../src/daemon/option-table.ts'
import { ConfigError } from '../../src/device/errors.ts'

const scopes = [
  {
    title: 'Options',
    table: v.strictObject({
      'blk-file': v.pipe(v.string(), v.metadata({ placeholder: 'PATH' })),
      count: v.exactOptional(v.number()),
      size: v.exactOptional(v.pipe(v.number(), v.metadata({ size: true }))),
      block: v.exactOptional(v.pipe(v.picklist([512, 4096]), v.metadata({ size: true }))),
      quiet: v.optional(v.boolean(), false),
      tag: v.optional(v.array(v.string()), []),
    }),
  },
]
const socket = [{ name: 'SOCKET', description: 'a socket' }]

function parse(line: string, positionals = socket.slice(1)): unknown {
  return parseArguments(line === '' ? [] : line.split(' '), scopes, positionals, 'test')
}

test.each([
  ['', {}],
  ['--blk-file a --quiet', { 'blk-file': 'a', quiet: true }],
  ['--blk-file=a', { 'blk-file': 'a' }],
  ['--blk-file=--quiet', { 'blk-file': '--quiet' }],
  ['--blk-file -', { 'blk-file': '-' }],
  ['--count 007', { count: 7 }],
  ['--count x', { count: 'x' }],
  ['--count 4K', { count: '4K' }],
  ['--size 4K --block 4k', { size: 4096, block: 4096 }],
  ['--tag a --tag b', { tag: ['a', 'b'] }],
])('%s', (line, values) => {
  expect(parse(line)).toEqual({ values, positionals: [] })
})

test('positionals stand anywhere', () => {
  expect(parse('--quiet a.sock --count 1', socket)).toEqual({
    values: { quiet: true, count: 1 },
    positionals: ['a.sock'],
  })
  expect(parse('-- --quiet', socket)).toEqual({ values: {}, positionals: ['--quiet'] })
})

test.each([
  ['--blk-fil a', 'ERR_OPTION_UNKNOWN', '--blk-fil: unknown option. Did you mean --blk-file?'],
  ['--xyz', 'ERR_OPTION_UNKNOWN', '--xyz: unknown option. "virtiod test --help" lists the options.'],
  ['-q', 'ERR_OPTION_UNKNOWN', '-q: unknown option. "virtiod test --help" lists the options.'],
  ['--blk-file', 'ERR_OPTION_VALUE_MISSING', '--blk-file: its value is missing. Give it as --blk-file PATH.'],
  ['--blk-file --quiet', 'ERR_OPTION_VALUE_MISSING', '--blk-file: its value is missing. Give it as --blk-file PATH.'],
  ['--blk-file=', 'ERR_OPTION_VALUE_MISSING', '--blk-file: its value is missing. Give it as --blk-file PATH.'],
  ['--quiet --quiet', 'ERR_OPTION_DUPLICATE', '--quiet: given twice. Give it once.'],
  ['--count 1 --count=2', 'ERR_OPTION_DUPLICATE', '--count: given twice. Give it once.'],
  ['--quiet=true', 'ERR_OPTION_VALUE', '--quiet: it takes no value. Give --quiet alone, or leave it out.'],
  ['blk-file x', 'ERR_ARGUMENT', 'blk-file: unexpected argument. Did you mean --blk-file?'],
  ['zzzzzzzz', 'ERR_ARGUMENT', 'zzzzzzzz: unexpected argument. "virtiod test --help" shows what it takes.'],
])('%s is refused', (line, code, message) => {
  expect(() => parse(line)).toThrow(expect.objectContaining({ name: 'ConfigError', code, message }))
})

test('what may be repeated becomes an array when it is', () => {
  const repeat = (line: string): unknown => parseArguments(line.split(' '), scopes, [], 'test', ['blk-file']).values
  expect(repeat('--blk-file a')).toEqual({ 'blk-file': 'a' })
  expect(repeat('--blk-file a --quiet --blk-file=b --blk-file c')).toEqual({ 'blk-file': ['a', 'b', 'c'], quiet: true })
  expect(() => repeat('--count 1 --count 2')).toThrow('--count: given twice. Give it once.')
})

test('a missing positional', () => {
  expect(() => parse('', socket)).toThrow(ConfigError)
  expect(() => parse('', socket)).toThrow('SOCKET: missing. Give a socket; "virtiod test --help" tells more.')
})

describe('sizes', () => {
  test.each([
    ['0', 0],
    ['512', 512],
    ['4k', 4096],
    ['64KiB', 65536],
    ['1M', 2 ** 20],
    ['2gb', 2 ** 31],
    ['1T', 2 ** 40],
    ['', undefined],
    ['-1', undefined],
    ['1.5G', undefined],
    ['K', undefined],
    ['4X', undefined],
    ['999999999999T', undefined],
  ])('%s', (text, bytes) => {
    expect(parseSize(text)).toBe(bytes)
  })
})
