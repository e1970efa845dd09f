/** Errors of device modules in words. */
import { expect, test } from 'vitest'
import { errorText, failureText } from '../../src/daemon/module-failure.ts'
import { ConfigError, DeviceError } from '../../src/device/errors.ts'

const refused = new Error('connect ECONNREFUSED 127.0.0.1:1')

test.each<[what: string, error: unknown, text: string]>([
  ['an Error', new Error('no'), 'no'],
  ['of another class', new TypeError('no'), 'TypeError: no'],
  ['none', 'no', "not an Error was thrown: 'no'"],
  [
    'with a cause, as of fetch',
    new TypeError('fetch failed', { cause: refused }),
    'TypeError: fetch failed: connect ECONNREFUSED 127.0.0.1:1',
  ],
  [
    'whose cause has a code only, as of fetch with two addresses',
    new TypeError('fetch failed', { cause: Object.assign(new AggregateError([refused]), { code: 'ECONNREFUSED' }) }),
    'TypeError: fetch failed: ECONNREFUSED',
  ],
  [
    'that says it itself',
    new DeviceError('X', 'a.ts:3: RangeError: no', { cause: new RangeError('no') }),
    'a.ts:3: RangeError: no',
  ],
  ['whose causes have causes', new Error('a', { cause: new Error('b', { cause: new Error('c') }) }), 'a: b: c'],
  ['of the operator', new ConfigError('X', 'size', 'no', 'Fix.', { cause: refused }), 'ConfigError: size: no. Fix.'],
  ['with another cause than an error', new Error('a', { cause: 3 }), 'a'],
])('%s', (_, error, text) => {
  expect(errorText(error)).toBe(text)
})

test('one that is its own cause', () => {
  const error = new Error('a')
  const other = new Error('b', { cause: error })
  error.cause = other
  expect(errorText(error)).toMatch(/^a: b/)
})

test('without a place the file is named, and what was being done', () => {
  const error = new RangeError('no')
  error.stack = ''
  expect(failureText(error, 'open', 'x.ts')).toBe('x.ts: open: RangeError: no')
})
