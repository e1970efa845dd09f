/**
 * How the tests run. Everything here is a real process, socket or file: forks, because worker_threads inside worker
 * threads would share one process's fds and CPU time. Two files at a time: most of them wait for a guest or a timer half of
 * their time, and with more they would be late for each other on the two processors of a CI machine.
 */
import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

const source = (path: string): string => `${fileURLToPath(new URL('src/', import.meta.url))}${path}`

/** Files that hold virtiod to a time or a size of memory. */
const BUDGETS = process.env['VIRTIOD_LONG'] === undefined ? ['test/package.test.ts'] : []

export default defineConfig({
  // What package.json exports, without a build: examples and their tests import virtiod as strangers do.
  resolve: {
    alias: [
      { find: /^virtiod\/(device\/.+)$/, replacement: source('$1.ts') },
      { find: /^virtiod\/(device|testing)$/, replacement: source('$1/index.ts') },
      { find: /^virtiod$/, replacement: source('index.ts') },
    ],
  },
  test: {
    globalSetup: ['test/setup/prerequisites.ts'],
    pool: 'forks',
    // For what hangs. Under the load of a busy machine single tests have taken 50 s.
    testTimeout: 90_000,
    hookTimeout: 90_000,
    projects: [
      {
        extends: true,
        test: {
          name: 'tests',
          // What takes minutes of its own stands in *.long.test.ts: npm run test:long.
          include: [process.env['VIRTIOD_LONG'] === undefined ? 'test/**/!(*.long).test.ts' : 'test/**/*.long.test.ts'],
          exclude: BUDGETS,
          maxWorkers: 2,
        },
      },
      // Then, with the machine to themselves.
      { extends: true, test: { name: 'budgets', include: BUDGETS, maxWorkers: 1, sequence: { groupOrder: 1 } } },
    ],
  },
})
