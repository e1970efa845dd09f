/**
 * A front-end in a process of its own, to be frozen, thawed and killed: it runs a verifying load on a back-end's socket
 * until its standard input ends, then checks the whole disk. Its output: "ready", then a line with what it did.
 */
import { GuestMemory, layouts } from '../../src/frontend/memory.ts'
import { Session } from '../../src/frontend/session.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { VIRTIO_BLK_F_WRITE_ZEROES } from '../../src/virtio/blk.ts'
import { VIRTIO_F_INDIRECT_DESC } from '../../src/virtio/constants.ts'
import { CrashLoad } from './load.ts'
import { DiskModel } from './model.ts'

const [socket = '', sectors = '8192', format = 'split'] = process.argv.slice(2)
const memory = new GuestMemory(layouts.single(16 * 2 ** 20))
const session = Session.open(socket, { memory, queues: 2, packed: format === 'packed' })
const queues = session.queues.map((queue) => ({
  driver: queue.driver,
  interrupted: () => queue.index % 2 === 0 || queue.takeCalls() > 0,
}))
const load = new CrashLoad(memory, queues, new DiskModel(1, Number(sectors)), {
  depth: 16,
  seed: 1,
  indirect: session.has(VIRTIO_F_INDIRECT_DESC),
  zeroes: session.has(VIRTIO_BLK_F_WRITE_ZEROES),
})

let ended = false
process.stdin.resume().once('end', () => {
  ended = true
})

function step(issue: boolean): void {
  if (load.step(issue) === 0) sleepMs(0.02)
}

process.stdout.write('ready\n')
while (!ended) {
  for (let i = 0; i < 200; i++) step(true)
  await new Promise((resolve) => setImmediate(resolve))
}
// Not more than a while: what is stuck is stuck.
const deadline = performance.now() + 20_000
const untilEmpty = (): void => {
  while (load.inFlight > 0) {
    step(false)
    if (performance.now() > deadline) throw new Error(`stuck:\n${load.describe()}`)
  }
}
untilEmpty()
for (let at = 0; at < Number(sectors); ) {
  if (load.issueRead(at, 128)) at += 128
  load.step(false)
}
untilEmpty()
session.close()
process.stdout.write(`${load.counts.completed} requests, all right\n`)
