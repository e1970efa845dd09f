import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { expect, it } from 'vitest'

it('the whole surface is clean under AddressSanitizer and UndefinedBehaviorSanitizer', { timeout: 180_000 }, ({
  skip,
}) => {
  const run = spawnSync('sh', [fileURLToPath(new URL('./asan.sh', import.meta.url))], {
    encoding: 'utf8',
    timeout: 170_000,
    env: { ...process.env, NODE_OPTIONS: '' },
  })
  if (run.status === 77) skip(run.stdout.trim())
  expect(run.stderr).not.toMatch(/Sanitizer|runtime error/)
  expect(run).toMatchObject({ status: 0, signal: null, stdout: expect.stringMatching(/exercised\n$/) })
})
