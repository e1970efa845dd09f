/** The queue half: which handler serves which virtqueue (virtio 1.3 §5.6.2). */
import type { QueueContext, QueueHandler, ReceiveHandler } from '../../src/device/index.ts'
import { VIRTIO_SCSI_CONTROL_QUEUE, VIRTIO_SCSI_EVENT_QUEUE } from '../../src/device/virtio-scsi.ts'
import { ControlQueue } from './control-queue.ts'
import { EventQueue } from './event-queue.ts'
import { RequestQueue } from './request-queue.ts'
import type { ScsiQueueData } from './shared.ts'

export function createQueueHandler(context: QueueContext, data: ScsiQueueData): QueueHandler | ReceiveHandler {
  if (context.queueIndex === VIRTIO_SCSI_CONTROL_QUEUE) return new ControlQueue(context, data)
  if (context.queueIndex === VIRTIO_SCSI_EVENT_QUEUE) return new EventQueue(context, data)
  return new RequestQueue(context, data)
}
