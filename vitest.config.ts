/**
 * How the tests run. Everything here is a real process, socket or file: forks, because worker_threads inside worker
 * threads would share one process's fds and CPU time; one file at a time where tests compete for the two or so
 * processors of a CI machine.
 */
import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    // What takes minutes of its own stands in *.long.test.ts: npm run test:long.
    include: [process.env['VIRTIOD_LONG'] === undefined ? 'test/**/!(*.long).test.ts' : 'test/**/*.long.test.ts'],
    globalSetup: ['test/setup/prerequisites.ts'],
    pool: 'forks',
    fileParallelism: false,
    testTimeout: 30_000,
    hookTimeout: 30_000,
  },
})
