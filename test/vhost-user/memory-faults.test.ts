/** The SIGBUS guard has one eventfd for the whole process, and a program may run several daemons. */
import { writeSync } from 'node:fs'
import { expect, test, vi } from 'vitest'
import { native } from '../../src/native.ts'
import { MemoryFaults } from '../../src/vhost-user/memory-faults.ts'

/** As the guard does it. */
function fault(): void {
  writeSync(native.faultEventFd(), new BigUint64Array([1n]))
}

test('all that listen are told, until they no longer do', async () => {
  const first = vi.fn()
  const second = vi.fn()
  const third = vi.fn()
  const one = new MemoryFaults(first)
  {
    using _ = new MemoryFaults(second)
    fault()
    await vi.waitFor(() => expect(second).toHaveBeenCalledTimes(1))
    expect(first).toHaveBeenCalledTimes(1)
  }
  fault()
  await vi.waitFor(() => expect(first).toHaveBeenCalledTimes(2))
  one[Symbol.dispose]()
  one[Symbol.dispose]()
  // Nobody listened for a while.
  using _ = new MemoryFaults(third)
  fault()
  await vi.waitFor(() => expect(third).toHaveBeenCalled())
  expect(first).toHaveBeenCalledTimes(2)
  expect(second).toHaveBeenCalledTimes(1)
})
