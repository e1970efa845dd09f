/** README.md says what the code says: options, commands, metrics, error codes. `npm run docs` brings it up to date. */
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'
import { ERROR_CODES } from '../src/daemon/error-codes.ts'
import { apiPage, apiPath } from './docs/api.ts'
import { conformancePage, conformancePath, metricTable, readmePath, readSection, tables } from './docs/tables.ts'

const root = join(fileURLToPath(new URL('.', import.meta.url)), '..')

describe('README.md', () => {
  test('has every table as the code makes it (npm run docs)', async () => {
    const readme = readFileSync(readmePath, 'utf8')
    for (const [name, text] of Object.entries(await tables())) {
      expect(readSection(readme, name), `section ${name}`).toBe(text)
    }
  })

  test('docs/conformance.md has the cases of the suite (npm run docs)', () => {
    expect(readFileSync(conformancePath, 'utf8')).toBe(conformancePage())
  })

  test('docs/api.md has the exports and their docstrings (npm run docs)', () => {
    expect(readFileSync(apiPath, 'utf8')).toBe(apiPage())
  })

  test("devices' own metrics stand below virtiod's", () => {
    const packets = { name: 'packets_total', type: 'counter', labels: ['queue', 'direction'], help: 'Packets' } as const
    const rows = metricTable([{ name: 'net', metrics: [packets] }, { name: 'blk' }]).split('\n')
    expect(rows.at(-1)).toBe('| `virtiod_net_packets_total` | counter | `device`, `queue`, `direction` | Packets |')
    expect(rows.slice(0, -1).join('\n')).toBe(metricTable([]))
  })

  test('a difference is found', () => {
    expect(readSection('a\n<!-- x -->\n\n| b |\n\n<!-- /x -->\n', 'x')).toBe('| b |')
    expect(readSection('a\n<!-- x -->\n', 'x')).toBeUndefined()
  })
})

describe('error codes', () => {
  const NODE_CODES = [
    'ERR_PARSE_ARGS',
    'ERR_MODULE_NOT_FOUND',
    'ERR_UNSUPPORTED_NODE_MODULES_TYPE_STRIPPING',
    'ERR_UNSUPPORTED_TYPESCRIPT_SYNTAX',
  ]
  const used = new Set(
    ['src', 'devices'].flatMap((folder) =>
      readdirSync(join(root, folder), { recursive: true, withFileTypes: true })
        .filter((entry) => entry.isFile() && entry.name.endsWith('.ts') && entry.name !== 'error-codes.ts')
        .flatMap((entry) => readFileSync(join(entry.parentPath, entry.name), 'utf8').match(/'ERR_[A-Z_]+'/g) ?? [])
        .map((quoted) => quoted.slice(1, -1))
        .filter((code) => !NODE_CODES.includes(code))
    )
  )

  test('every code that is thrown is in the registry, and the other way round', () => {
    expect([...used].sort()).toEqual(Object.keys(ERROR_CODES).sort())
  })
})
