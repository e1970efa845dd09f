/** A device for tests of the short style, and what they have in common. */
import { setImmediate as turn } from 'node:timers/promises'
import { type DeviceContext, type DeviceDescription, type DeviceHandlers, defineDevice } from 'virtiod/device'
import { type TestDevice, type TestDeviceOptions, testDevice } from '../../src/testing/plain.ts'

export type Create = (context: DeviceContext<Record<string, never>>) => DeviceHandlers | Promise<DeviceHandlers>

/** A device of one queue of requests (0) and one of buffers (1). */
export function open(
  create: Create,
  settings?: TestDeviceOptions,
  fields?: Partial<DeviceDescription>
): Promise<TestDevice> {
  const definition = defineDevice({
    apiVersion: 1,
    name: 'sample',
    virtioId: 4,
    queues: [{ name: 'requests' }, { name: 'buffers', kind: 'buffers' }],
    operations: ['read', 'write'],
    errors: ['bad'],
    ...(fields as object),
    create,
  })
  return testDevice(definition, settings)
}

export const bytes = (...values: number[]): Uint8Array => Uint8Array.from(values)
export const text = new TextEncoder()

/** Lets rounds and promises run. */
export async function turns(count = 5): Promise<void> {
  for (let i = 0; i < count; i++) await turn()
}
