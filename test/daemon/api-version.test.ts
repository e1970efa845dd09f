import { existsSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import blk from '../../devices/blk/index.ts'
import type { DaemonConfig } from '../../src/daemon/config.ts'
import { Daemon } from '../../src/daemon/daemon.ts'
import { createLogger } from '../../src/daemon/log.ts'

test('a device that was written for another version of the contract is refused before a socket is bound', async () => {
  const path = join(tmpdir(), `virtiod-api-${process.pid}.sock`)
  const config = {
    logLevel: 'silent',
    iothreads: 1,
    pollMaxUs: 0,
    devices: [{ name: 'old0', definition: { ...blk, apiVersion: 0 }, options: {}, socket: { path } }],
  } as unknown as DaemonConfig
  await expect(Daemon.start(config, createLogger('silent'))).rejects.toMatchObject({
    name: 'DeviceError',
    code: 'ERR_DEVICE_API_VERSION',
    message: 'the device blk is written for version 0 of the contract, this is version 1',
  })
  expect(existsSync(path)).toBe(false)
})
