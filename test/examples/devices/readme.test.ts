/** What examples/devices/ says about itself. That its transcripts are true is shown by each example's own test. */
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import type { DeviceDefinition } from 'virtiod/device'
import { describe, expect, test } from 'vitest'
import { transcript } from './transcript.ts'

const directory = fileURLToPath(new URL('../../../examples/devices/', import.meta.url))
const readme = readFileSync(`${directory}README.md`, 'utf8')
const modules = readdirSync(directory).filter((name) => name.endsWith('.ts'))

test('the README has a row for each example, in the order of its sections', () => {
  const rows = [...readme.matchAll(/^\| \[(\S+)\]\((\S+)\)/gm)].map((match) => match[1]!)
  expect(rows).toEqual([...readme.matchAll(/^## (\S+\.ts)$/gm)].map((match) => match[1]))
  expect(rows.toSorted()).toEqual(modules)
})

describe.each(modules)('%s', (name) => {
  const source = readFileSync(`${directory}${name}`, 'utf8')

  test('has a transcript in which virtiod serves it to a guest', () => {
    const steps = transcript(name)
    expect(steps.some(({ command }) => command.startsWith(`virtiod device ./${name} --socket-path `))).toBe(true)
    expect(steps.some(({ command }) => command.startsWith('QEMU '))).toBe(true)
    expect(steps.some(({ where, output }) => where === 'guest' && output !== '')).toBe(true)
    expect(existsSync(fileURLToPath(new URL(name.replace('.ts', '.test.ts'), import.meta.url)))).toBe(true)
  })

  test('begins with how to run it, with options that it has', async () => {
    const [header = ''] = source.split('*/')
    expect(header).toContain(`virtiod device ./${name} --socket-path `)
    const { default: definition } = (await import(`${directory}${name}`)) as { default: DeviceDefinition }
    const known = 'entries' in definition.options ? Object.keys(definition.options.entries as object) : []
    for (const [, option] of header.matchAll(/--option (\w[\w-]*)=/g)) expect(known).toContain(option)
  })

  test('imports what strangers can', () => {
    const imports = [...source.matchAll(/from '([^']+)'/g)].map((match) => match[1]!)
    expect(imports.filter((it) => !/^(node:[\w/]+|valibot|virtiod\/device(\/virtio-(blk|net))?)$/.test(it))).toEqual([])
  })
})
