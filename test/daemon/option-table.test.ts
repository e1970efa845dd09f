/** Option tables: what is read out of a valibot schema, and how bad values are told. */
import * as v from 'valibot'
import { describe, expect, test } from 'vitest'
import {
  allowedValues,
  alternatives,
  checkNames,
  checkValues,
  optionsOf,
  suggest,
} from '../../src/daemon/option-table.ts'
import { ConfigError } from '../../src/device/errors.ts'

const table = v.strictObject({
  file: v.pipe(v.string(), v.description('The file'), v.metadata({ placeholder: 'PATH', path: true })),
  count: v.optional(v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(8)), 4),
  mode: v.exactOptional(v.picklist(['fast', 'safe', 'slow'])),
  size: v.exactOptional(v.picklist([512, 4096])),
  quiet: v.optional(v.boolean(), false),
  tag: v.exactOptional(v.pipe(v.string(), v.regex(/^[a-z]+$/, 'Give lower-case letters'))),
  names: v.optional(v.array(v.string()), []),
})
const label = (name: string): string => `--${name}`

function failure(run: () => unknown): { code: string; message: string } {
  try {
    run()
  } catch (error) {
    if (error instanceof ConfigError) return { code: error.code, message: error.message }
    throw error
  }
  throw new Error('it did not fail')
}

test('kinds, limits and texts come from the schema', () => {
  expect(optionsOf(table)).toMatchObject([
    { name: 'file', kind: 'text', required: true, placeholder: 'PATH', path: true, description: 'The file' },
    { name: 'count', kind: 'integer', required: false, fallback: 4, min: 1, max: 8, placeholder: 'N' },
    { name: 'mode', kind: 'choice', choices: ['fast', 'safe', 'slow'], fallback: undefined },
    { name: 'size', kind: 'choice', choices: [512, 4096] },
    { name: 'quiet', kind: 'flag', fallback: false },
    { name: 'tag', kind: 'text', path: false },
    { name: 'names', kind: 'list' },
  ])
})

test('good values pass and defaults are filled in', () => {
  expect(checkValues(table, { file: 'a', mode: 'safe', other: 1 }, label)).toEqual({
    file: 'a',
    mode: 'safe',
    count: 4,
    quiet: false,
    names: [],
  })
})

test.each([
  [{}, 'ERR_OPTION_REQUIRED', '--file: missing. It is required: the file.'],
  [{ file: 7 }, 'ERR_OPTION_VALUE', '--file: 7 is not allowed. Give text: write it in quotes, "7".'],
  [{ count: 0 }, 'ERR_OPTION_VALUE', '--count: 0 is out of range. Give an integer from 1 to 8.'],
  [{ count: 9 }, 'ERR_OPTION_VALUE', '--count: 9 is out of range. Give an integer from 1 to 8.'],
  [{ count: 1.5 }, 'ERR_OPTION_VALUE', '--count: 1.5 is not an integer. Give an integer from 1 to 8.'],
  [{ count: 'x' }, 'ERR_OPTION_VALUE', '--count: "x" is not an integer. Give an integer from 1 to 8.'],
  [
    { mode: 'saef' },
    'ERR_OPTION_VALUE',
    '--mode: "saef" is not allowed. Give one of fast, safe, slow. Did you mean safe?',
  ],
  [{ size: 1000 }, 'ERR_OPTION_VALUE', '--size: 1000 is not allowed. Give 512 or 4096.'],
  [{ quiet: 'yes' }, 'ERR_OPTION_VALUE', '--quiet: "yes" is not allowed. Give true or false.'],
  [{ tag: 'A' }, 'ERR_OPTION_VALUE', '--tag: "A" is not allowed. Give lower-case letters.'],
  [{ tag: null }, 'ERR_OPTION_VALUE', '--tag: null is not allowed. Give text.'],
])('%j is refused', (values, code, message) => {
  const given = 'file' in values || Object.keys(values).length === 0 ? values : { file: 'a', ...values }
  expect(failure(() => checkValues(table, given, label))).toEqual({ code, message })
})

test('a check over the whole table speaks in its own words', () => {
  const pair = v.pipe(
    v.strictObject({ a: v.exactOptional(v.boolean()), b: v.exactOptional(v.boolean()) }),
    v.check(({ a, b }) => !(a && b), 'Give a or b')
  )
  expect(failure(() => checkValues(pair, { a: true, b: true }, () => 'blk0')).message).toBe(
    'blk0: these options do not fit together. Give a or b.'
  )
})

test('a table says which of its options does not fit, and which is missing', () => {
  const either = v.pipe(
    v.strictObject({ a: v.exactOptional(v.string()), b: v.exactOptional(v.string()) }),
    v.rawCheck(({ dataset, addIssue }) => {
      if (!dataset.typed) return
      const input = dataset.value
      const given = input.a !== undefined && input.b !== undefined
      if (!given && (input.a ?? input.b) !== undefined) return
      const key = given ? 'b' : 'a'
      const message = given ? 'it excludes a. Give one' : 'missing. Give a for this. Or b'
      addIssue({ message, path: [{ type: 'object', origin: 'value', input, key, value: input[key] }] })
    }),
    v.metadata({ exactlyOne: ['a', 'b'] })
  )
  expect(checkValues(either, { b: 'x' }, label)).toEqual({ b: 'x' })
  expect(failure(() => checkValues(either, { a: 'x', b: 'y' }, label))).toEqual({
    code: 'ERR_OPTION_CONFLICT',
    message: '--b: it excludes a. Give one.',
  })
  expect(failure(() => checkValues(either, {}, label))).toEqual({
    code: 'ERR_OPTION_REQUIRED',
    message: '--a: missing. Give a for this. Or b.',
  })
  expect(alternatives(either)).toEqual(['a', 'b'])
  expect(alternatives(table)).toEqual([])
})

test('unknown names', () => {
  const known = ['blk-file', 'cache']
  checkNames(['cache'], known, label, 'option', 'x')
  expect(failure(() => checkNames(['blk-fil'], known, label, 'option', 'x'))).toEqual({
    code: 'ERR_OPTION_UNKNOWN',
    message: '--blk-fil: unknown option. Did you mean --blk-file?',
  })
  expect(failure(() => checkNames(['zzz'], known, label, 'key', 'Look there')).message).toBe(
    '--zzz: unknown key. Look there.'
  )
})

test('allowed values in words', () => {
  const infos = optionsOf(
    v.strictObject({
      a: v.pipe(v.number(), v.integer(), v.minValue(2)),
      b: v.number(),
      c: v.array(v.string()),
      d: v.pipe(v.number(), v.minValue(0), v.maxValue(0.5)),
    })
  )
  expect(infos.map(allowedValues)).toEqual(['an integer, at least 2', 'a number', 'a list', 'a number from 0 to 0.5'])
})

describe('suggestions', () => {
  const known = ['blk-file', 'num-queues', 'queue-size', 'read-only', 'cache', 'run', 'fd']

  test.each([
    ['blk-fiel', 'blk-file'],
    ['num-queue', 'num-queues'],
    ['readonly', 'read-only'],
    ['chace', 'cache'],
    ['rnu', 'run'],
    ['que', 'queue-size'],
    ['frobnicate', undefined],
    ['x', undefined],
    ['', undefined],
  ])('%s → %s', (name, expected) => {
    expect(suggest(name, known)).toBe(expected)
  })
})
