/** `--check-config`: everything that a start would check, files included, without binding a socket. */
import * as v from 'valibot'
import type { DaemonConfig } from '../../daemon/config.ts'
import { EXIT_OK } from '../exit-codes.ts'

export const checkOptions = v.strictObject({
  'check-config': v.optional(
    v.pipe(v.boolean(), v.description('Check the options and open the files, then exit: 0 when all is well, 2 if not')),
    false
  ),
})

/** @throws ConfigError for what a start would refuse */
export async function checkOnly(config: DaemonConfig): Promise<number> {
  const [{ Daemon }, { createLogger }] = await Promise.all([
    import('../../daemon/daemon.ts'),
    import('../../daemon/log.ts'),
  ])
  await Daemon.check(config, createLogger('silent'))
  const count = config.devices.length
  process.stdout.write(`configuration is valid: ${count} ${count === 1 ? 'device' : 'devices'}\n`)
  return EXIT_OK
}
