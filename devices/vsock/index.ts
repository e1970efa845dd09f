/**
 * virtio-vsock (virtio 1.3 §5.10): stream connections between programs of the guest and unix sockets of the host, as Firecracker,
 * cloud-hypervisor and vhost-device-vsock have them.
 */
import { closeSync } from 'node:fs'
import { defineDevice } from '../../src/device/index.ts'
import { dial } from './dial.ts'
import { HostListener } from './listener.ts'
import { Multiplexer } from './multiplexer.ts'
import { vsockOptions } from './options.ts'
import { VIRTIO_ID_VSOCK, VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, VIRTIO_VSOCK_F_STREAM } from './packet.ts'
import { portsOf } from './state.ts'

const RX = 0
const TX = 1
const EVENT = 2
/** `struct virtio_vsock_event` */
const EVENT_SIZE = 4

export default defineDevice({
  apiVersion: 1,
  name: 'vsock',
  virtioId: VIRTIO_ID_VSOCK,
  options: vsockOptions,
  queues: [{ name: 'rx', kind: 'buffers' }, { name: 'tx' }, { name: 'event', kind: 'buffers' }],
  // No SEQPACKET: Node has no sockets of the host that keep the bounds of messages.
  features: 1n << BigInt(VIRTIO_VSOCK_F_STREAM),
  config(options) {
    const bytes = new Uint8Array(8)
    new DataView(bytes.buffer).setBigUint64(0, BigInt(options['guest-cid']), true)
    return bytes
  },
  operations: ['transmit', 'receive', 'event'],
  errors: ['malformed', 'refused', 'violation'],
  metrics: [
    { name: 'connections', type: 'gauge', labels: [], help: 'Connections between guest and host' },
    { name: 'connections_total', type: 'counter', labels: ['from'], help: 'Connections that were asked for' },
    { name: 'bytes_total', type: 'counter', labels: ['to'], help: 'Payload of all connections in bytes' },
    {
      name: 'resets_total',
      type: 'counter',
      labels: [],
      help: 'Packets that refuse or end a connection (RST) to the guest',
    },
  ],
  qemu: { driver: 'vhost-user-vsock-pci', properties: {} },

  async create({ options, host, queues, metric, signal }) {
    const path = options['uds-path']
    const multiplexer = new Multiplexer(queues[RX]!, {
      guestCid: BigInt(options['guest-cid']),
      bufferSize: options['buffer-size'],
      maxConnections: options['max-connections'],
      dial: (port) => dial(`${path}_${port}`, signal),
      metrics: {
        connections: metric('connections'),
        fromGuest: metric('connections_total', { from: 'guest' }),
        fromHost: metric('connections_total', { from: 'host' }),
        bytesToHost: metric('bytes_total', { to: 'host' }),
        bytesToGuest: metric('bytes_total', { to: 'guest' }),
        resets: metric('resets_total'),
      },
    })
    const listener = new HostListener(
      path,
      (socket, port, early) => multiplexer.connect(socket, port, early),
      (pending) => pending + multiplexer.size < options['max-connections']
    )
    const handoverKey = `vsock:${host.name}`
    /** Until the predecessor has let go, host programs are its. */
    let inherited = host.handover.take(handoverKey)?.fds[0]
    if (inherited === undefined) await listener.bind()
    host.handover.keep(handoverKey, [inherited ?? listener.fd], {})

    /** Of the driver that is there now. */
    let driver = new AbortController()

    return {
      handle(chain, queue) {
        if (queue.index === TX) multiplexer.receive(chain)
      },
      queueActive(queue, active) {
        if (queue.index === RX && active) multiplexer.restarted()
      },
      reset() {
        driver.abort()
        driver = new AbortController()
        multiplexer.reset()
      },
      saveState: () => ({ connections: multiplexer.save() }),
      /** Connections end with the process that has their sockets: the guest has to hear it. */
      async loadState(state) {
        const ended = portsOf(state)
        if (inherited !== undefined) await listener.adopt(inherited)
        inherited = undefined
        multiplexer.end(ended)
        queues[EVENT]!.next(driver.signal).then(
          (chain) => {
            // Nobody would catch what a write into too small a buffer throws, and the chain would stay taken.
            if (chain.writer.length < EVENT_SIZE) chain.error('malformed')
            else chain.writer.u32(VIRTIO_VSOCK_EVENT_TRANSPORT_RESET)
            chain.operation('event')
            chain.complete()
          },
          () => {}
        )
      },
      async close() {
        host.handover.forget(handoverKey)
        multiplexer.close()
        if (inherited === undefined) await listener.close()
        else closeSync(inherited)
      },
    }
  },
})
