/**
 * The queue half of the network card: which handler a virtqueue gets. Queue 2i receives (to the guest), queue 2i + 1
 * transmits, and behind the pairs is the control queue (virtio 1.3 §5.1.2).
 */
import { hasFeature, type QueueContext, type QueueHandler, type ReceiveHandler } from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'
import { CaptureWriter } from './capture.ts'
import { ControlQueue } from './control-queue.ts'
import { headerSize } from './header.ts'
import { NetCounters, type NetQueueData } from './shared.ts'
import { SwitchLink } from './switch.ts'
import { SwitchControl } from './switch-control.ts'
import { SwitchReceive } from './switch-receive.ts'
import { TapLink } from './tap-link.ts'
import { TapReceive } from './tap-receive.ts'
import { Transmitter } from './transmit.ts'

export function createQueueHandler(context: QueueContext, data: NetQueueData): QueueHandler | ReceiveHandler {
  const { queueIndex, features } = context
  const { pairs, place } = data
  // Without MQ the control queue follows the first pair, whatever the device has.
  const usable = hasFeature(features, net.VIRTIO_NET_F_MQ) ? pairs : 1
  const used = drivesPairs(features) ? data.pairsInUse : pairs
  if (queueIndex === 2 * usable) {
    return place === undefined ? new ControlQueue(context, pairs) : new SwitchControl(context, place, pairs, used)
  }
  const counters = new NetCounters(data.counters, queueIndex)
  const ring = data.captures[queueIndex]
  const capture = ring === undefined ? undefined : new CaptureWriter(ring)
  const pair = queueIndex >>> 1
  if (place !== undefined) {
    if (queueIndex % 2 === 0)
      return new SwitchReceive(context, place, used, pair, data.offloads ?? features, counters, capture)
    const link = new SwitchLink(context, place, used, pair)
    return new Transmitter(context, link, counters, capture)
  }
  const fd = data.tapFds[pair]!
  if (queueIndex % 2 === 0) return new TapReceive(context, fd, data.mtu, counters, capture)
  return new Transmitter(context, new TapLink(context, fd, headerSize(features), counters), counters, capture)
}

/** The driver says by the control queue on how many pairs it receives, and starts with one. QEMU enables rings instead. */
function drivesPairs(features: bigint): boolean {
  return hasFeature(features, net.VIRTIO_NET_F_CTRL_VQ) && hasFeature(features, net.VIRTIO_NET_F_MQ)
}
