/** The worker of worker.test.ts: waits in a ring for an eventfd, and stays or leaves as it is told. */
import { parentPort, workerData } from 'node:worker_threads'
import { native } from '../../src/native.ts'
import { OP, TestRing } from './support.ts'

const { emulate, event, after } = workerData as { emulate: boolean; event: number; after: string }
if (after === 'churn') {
  // Until it is terminated, which then hits the middle of any of these.
  parentPort?.postMessage('ready')
  for (;;) {
    const other = new TestRing(emulate)
    native.createWatcher(() => {}).add(event, 1)
    native.createWatcher(() => {}).close()
    native.allocate(4096)
    native.mapFile(native.memfd('churn', 4096, 0), 0, 4096, 0, 4096, true)
    native.fdInfo(event, new Float64Array(8))
    other.push({ op: OP.POLL_ADD, data: 1, fd: event, length: 1, extra: 1 })
    other.enter(1, 1)
    other.close()
    try {
      native.dup('no fd' as never)
    } catch {}
  }
}
const ring = new TestRing(emulate)
native.setThreadName('virtiod-test')
ring.push({ op: OP.POLL_ADD, data: 7, fd: event, length: 1, extra: 1 })
parentPort?.postMessage('ready')
if (after === 'loop') {
  ring.enter(1, 1, -1)
  for (;;) ring.enter(0, 1, 100)
}
const result = ring.enter(1, 1, -1)
let completions = ring.reap()
// Task work of libuv's own io_uring may interrupt the emulation's wait, and "1 consumed" hides -EINTR.
while (completions.length === 0) {
  ring.enter(0, 1, -1)
  completions = ring.reap()
}
parentPort?.postMessage({ result, completions })
if (after === 'return') ring.close()
else native.createWatcher(() => {}).add(event, 1)
