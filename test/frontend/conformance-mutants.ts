/**
 * virtiod with a fault in it, so that every kind of conformance case is seen to fail: each row replaces one piece of
 * source text while it is loaded (conformance-preload.ts), and says which cases have to notice. Rows of one set run in
 * one process, so their faults must leave what all cases need alone: a session, and a request on a ring.
 *
 * A row whose text is not found any more fails the test that is for it: give it a text that is there.
 */
import type { Outcome } from '../../src/frontend/conformance/index.ts'

export interface Mutant {
  readonly set: string
  /** From the root of the repository. */
  readonly file: string
  /** It stands there exactly once. */
  readonly text: string
  readonly instead: string
  /** Cases that have to come out like this. */
  readonly cases: Readonly<Record<string, Outcome>>
}

/** What a set runs as, beside `blk`. */
export const SET_DEVICES: Readonly<Record<string, 'net'>> = { net: 'net' }

export const MUTANTS: readonly Mutant[] = [
  // ---- messages, negotiation, config space
  {
    set: 'protocol',
    file: 'src/vhost-user/requests.ts',
    text: 'query(0, (session) => wire.u64(session.host.features))',
    instead: 'query(0, (session) => wire.u64(session.host.features & ~(session.rings.anyStarted ? 1n << 28n : 0n)))',
    cases: { 'features-stable': 'fail' },
  },
  {
    set: 'protocol',
    file: 'src/vhost-user/session.ts',
    text: 'const extra = features & ~this.host.features',
    instead: 'const extra = 0n',
    cases: { 'features-unknown-refused': 'warn' },
  },
  {
    set: 'protocol',
    file: 'src/vhost-user/session.ts',
    text: 'const extra = features & ~this.offeredProtocolFeatures',
    instead: 'const extra = 0n',
    cases: { 'protocol-features-unknown-refused': 'warn' },
  },
  {
    set: 'protocol',
    file: 'src/vhost-user/session.ts',
    text: 'has(wire.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS) &&',
    instead: 'false &&',
    cases: { 'protocol-inband-alone': 'warn' },
  },
  {
    set: 'protocol',
    file: 'src/vhost-user/dispatch.ts',
    text: 'const row = checked(REQUESTS[request], ',
    instead: 'const row = checked(REQUESTS[request] ?? REQUESTS[3], ',
    cases: { 'msg-unknown-request': 'fail' },
  },
  {
    set: 'protocol',
    file: 'src/vhost-user/session.ts',
    text: 'return space.subarray(offset, offset + size)',
    instead: 'return space.subarray(0, size)',
    cases: { 'config-offset': 'fail' },
  },
  {
    set: 'protocol',
    file: 'src/vhost-user/session.ts',
    text: 'if (offset + size > wire.VHOST_USER_MAX_CONFIG_SIZE) return undefined',
    instead: '',
    cases: { 'config-beyond': 'fail' },
  },
  {
    set: 'protocol',
    file: 'src/vhost-user/session.ts',
    text: '!(await this.host.writeConfig(offset, bytes, migration))',
    instead: 'false',
    cases: { 'config-read-only-field': 'fail', 'config-writeback': 'fail' },
  },
  {
    set: 'protocol',
    file: 'src/vhost-user/requests.ts',
    text: '[wire.VHOST_USER_RESET_OWNER]: effect(0, () => {}),',
    instead: '[wire.VHOST_USER_RESET_OWNER]: effect(0, (session) => session.resetDevice()),',
    cases: { 'reset-owner': 'warn' },
  },
  {
    set: 'stray replies',
    file: 'src/vhost-user/dispatch.ts',
    text: 'const acknowledge = message.needReply && ',
    instead: 'const acknowledge = (message.needReply || request === 10) && ',
    cases: { 'msg-no-reply-unasked': 'fail', 'ack-set-vring-kick': 'fail', 'ack-set-vring-addr': 'fail' },
  },
  {
    set: 'stray replies',
    file: 'src/vhost-user/dispatch.ts',
    text: 'if (reply instanceof Uint8Array) connection.reply(request, reply)',
    instead:
      'if (reply instanceof Uint8Array) { connection.reply(request, reply)\nif (message.needReply) connection.reply(request, u64(0n)) }',
    cases: { 'msg-need-reply-of-replies': 'fail' },
  },
  {
    set: 'fds',
    file: 'src/vhost-user/connection.ts',
    text: 'for (const fd of this.take()) native.close(fd)',
    instead: 'this.take()',
    cases: {
      'mem-remove-fd': 'fail',
      'fd-leak-unasked': 'warn',
      'fd-leak-unknown-request': 'warn',
      'fd-leak-sessions': 'warn',
      'fd-leak-memory': 'warn',
      'fd-many': 'warn',
    },
  },
  {
    set: 'fds',
    file: 'src/vhost-user/vrings.ts',
    text: 'ring.errIgnored = fd < 0',
    instead: 'ring.errFd = native.dup(fd)',
    cases: { 'fd-leak-exchanged': 'warn' },
  },

  // ---- memory
  {
    set: 'memory',
    file: 'src/vhost-user/memory-exchange.ts',
    text: "throw new ProtocolError('ERR_PROTOCOL_MEMORY', 'no such region')",
    instead: 'return',
    cases: { 'mem-remove-unknown': 'fail' },
  },
  {
    set: 'memory',
    file: 'src/vhost-user/memory-table.ts',
    text: "throw memoryError('two regions overlap in guest memory')",
    instead: 'continue',
    cases: { 'mem-overlap-guest': 'warn' },
  },
  {
    set: 'memory removal',
    file: 'src/vhost-user/memory-table.ts',
    text: 'BigInt(uva) === userAddress && BigInt(length) === size',
    instead: 'BigInt(uva) === userAddress + 1n && BigInt(length) === size',
    cases: {
      'mem-remove': 'fail',
      'mem-remove-busy': 'fail',
      'mem-remove-ignores-offset': 'fail',
      'ack-rem-mem-reg': 'fail',
    },
  },
  {
    set: 'memory',
    file: 'src/virtio/chain.ts',
    text: 'const take = Math.min(left, region.end - at)',
    instead: 'if (left > region.end - at) return false\nconst take = left',
    cases: { 'mem-straddle': 'fail' },
  },
  {
    set: 'user addresses',
    file: 'src/vhost-user/memory-table.ts',
    text: 'return region.gpa + (address - region.uva)',
    instead: 'return this.regions.length === 2 && address < 2 ** 40 ? address : region.gpa + (address - region.uva)',
    cases: { 'mem-user-addresses': 'fail' },
  },

  // ---- rings as the control plane sees them
  {
    set: 'vrings',
    file: 'src/vhost-user/vrings.ts',
    text: 'ring.enabled = enable === 1',
    instead: 'if (ring.started) ring.enabled = enable === 1',
    cases: { 'vring-order-enable-first': 'fail', 'vring-enable-before-features': 'fail' },
  },
  {
    set: 'vrings',
    file: 'src/vhost-user/vrings.ts',
    text: 'return ring.enabled || !this.#negotiated.has(VHOST_USER_F_PROTOCOL_FEATURES)',
    instead: 'return ring.enabled',
    cases: { 'features-without-protocol': 'fail' },
  },
  {
    set: 'vrings',
    file: 'src/vhost-user/vrings.ts',
    text: 'return ring.base ?? firstBase(packed)',
    instead: 'return (ring.base ?? firstBase(packed)) ^ 1',
    cases: { 'vring-stop-value': 'fail', 'packed-stop-value': 'fail', 'vring-stop-restart': 'fail' },
  },
  {
    set: 'vrings',
    file: 'src/vhost-user/vrings.ts',
    text: 'else if (ring.started) await this.#host.setCall(ring.index, fd)',
    instead: '',
    cases: { 'vring-call-exchanged': 'fail' },
  },
  {
    set: 'vrings',
    file: 'src/vhost-user/vrings.ts',
    text: 'else await this.#host.setKick(ring.index, fd)',
    instead: '',
    cases: { 'vring-kick-exchanged': 'fail' },
  },
  {
    set: 'vrings',
    file: 'src/vhost-user/vrings.ts',
    text: 'const ring = this.all[index]\n    if (ring !== undefined) return ring',
    instead: 'return this.all[index] ?? (this.all[0] as RingState)',
    cases: {
      'vring-index-num': 'fail',
      'vring-index-base': 'fail',
      'vring-index-enable': 'fail',
      'vring-index-65535': 'fail',
    },
  },
  {
    set: 'no drain',
    file: 'src/engine/queue.ts',
    text: 'if (keep) this.#abandon()',
    instead: 'if (keep || !keep) this.#abandon()',
    cases: { 'vring-stop-drains': 'fail', 'packed-stop-drains': 'fail' },
  },
  {
    set: 'kick needed',
    file: 'src/engine/queue-notifications.ts',
    text: 'this.kickless = start.kickFd < 0 && !start.inband',
    instead: 'this.kickless = false',
    cases: { 'vring-no-kick-fd': 'warn' },
  },

  // ---- split rings
  {
    set: 'split',
    file: 'src/virtio/split-ring.ts',
    text: 'this.#used32[slot + 1] = written',
    instead: 'this.#used32[slot + 1] = 0; this.#used32[slot + 2] = 0xdead',
    cases: { 'split-used-length': 'warn', 'blk-used-length': 'warn', 'split-writes-in-bounds': 'fail' },
  },
  {
    set: 'split',
    file: 'src/virtio/split-ring.ts',
    text: 'this.#used32[slot] = head\n',
    instead: 'this.#used32[slot] = head; this.#descriptors[head * 4 + 3] = 0\n',
    cases: { 'split-readable-untouched': 'fail' },
  },
  {
    set: 'split',
    file: 'src/virtio/split-ring.ts',
    text: 'return this.addTable(chain, gpa, length, true)',
    instead: "return walked > 0 ? this.fail('ERR_RING_INDIRECT') : this.addTable(chain, gpa, length, false)",
    cases: { 'split-indirect-after-direct': 'fail', 'split-indirect-next-anywhere': 'fail' },
  },
  {
    set: 'split',
    file: 'src/virtio/split-ring.ts',
    text: 'index = flagsAndNext >>> 16',
    instead: 'index = index + 1',
    cases: { 'split-next-anywhere': 'fail' },
  },
  {
    set: 'split',
    file: 'src/virtio/split-ring.ts',
    text: 'this.#lastAvail = (this.#lastAvail + 1) & 0xffff',
    instead: 'this.#lastAvail = (this.#lastAvail + 1) & 0x7fff',
    cases: { 'vring-base-near-wrap': 'fail', 'split-index-wrap': 'fail' },
  },
  {
    set: 'split',
    file: 'src/virtio/split-ring.ts',
    text: 'if (this.#eventIdx) return\n    this.#used16[0] = VIRTQ_USED_F_NO_NOTIFY',
    instead: 'this.#used16[0] = VIRTQ_USED_F_NO_NOTIFY',
    cases: { 'split-used-flags': 'fail' },
  },
  {
    set: 'split',
    file: 'src/virtio/ring-base.ts',
    text: 'if (this.inOrder) this.order!.enter(chain.head)',
    instead: '',
    cases: { 'split-in-order': 'fail', 'packed-in-order': 'fail' },
  },

  // ---- calls and kicks
  {
    set: 'calls',
    file: 'src/virtio/split-ring.ts',
    text: 'return first || ((now - event - 1) & 0xffff) < ((now - before) & 0xffff)',
    instead: 'return first || now === ((event + 1) & 0xffff)',
    cases: { 'call-batch-over-used-event': 'fail' },
  },
  {
    set: 'calls',
    file: 'src/virtio/split-ring.ts',
    text: 'return (Atomics.load(this.#avail, 0) & VIRTQ_AVAIL_F_NO_INTERRUPT) === 0',
    instead: 'return true',
    cases: { 'call-unwanted-flags': 'warn' },
  },
  {
    set: 'calls',
    file: 'src/virtio/packed-format.ts',
    text: 'if (mode === RING_EVENT_FLAGS_DISABLE) return false',
    instead: 'if (mode === RING_EVENT_FLAGS_DISABLE) return true',
    cases: { 'call-unwanted-packed-flags': 'warn', 'call-packed-enable-with-event-idx': 'fail' },
  },
  {
    set: 'calls',
    file: 'src/virtio/packed-format.ts',
    text: 'return (wanted - before + 2 * size) % (2 * size) < slots',
    instead: 'return wanted === before',
    cases: { 'call-packed-driver-event': 'fail' },
  },
  {
    set: 'calls',
    file: 'src/engine/queue-notifications.ts',
    text: 'this.#messenger.callDue(this)',
    instead: '',
    cases: { 'inband-kick-call': 'fail' },
  },
  {
    set: 'lost calls',
    file: 'src/engine/queue.ts',
    text: 'if (this.vring.publish()) this.notifications.call()',
    instead: 'if (this.vring.publish() && this.#completed % 16 !== 0) this.notifications.call()',
    cases: {
      'call-wanted-flags': 'fail',
      'call-wanted-event-idx': 'fail',
      'call-wanted-packed-desc': 'fail',
      'call-used-event': 'fail',
    },
  },
  {
    set: 'lost calls',
    file: 'src/virtio/split-ring.ts',
    text: 'if (this.#eventIdx) {\n      const event',
    instead:
      'if (this.#eventIdx) {\n      if ((Atomics.load(this.#avail, 0) & 1) !== 0) return false\n      const event',
    cases: { 'call-flag-ignored': 'fail' },
  },
  {
    set: 'lost calls',
    file: 'src/virtio/split-ring.ts',
    text: 'return (Atomics.load(this.#avail, 0) & VIRTQ_AVAIL_F_NO_INTERRUPT) === 0',
    instead: 'return this.#avail[2 + this.size] === this.#usedIdx - 1',
    cases: { 'call-event-ignored': 'fail' },
  },
  {
    set: 'lost kicks',
    file: 'src/virtio/split-ring.ts',
    text: 'if (this.#eventIdx) Atomics.store(this.#used16, 2 + 4 * this.size, this.#lastAvail)',
    instead:
      'if (this.#eventIdx) Atomics.store(this.#used16, 2 + 4 * this.size, this.#lastAvail > 20 ? 0 : this.#lastAvail)',
    cases: { 'kick-unwanted-event-idx': 'fail', 'call-after-idle-event-idx': 'fail' },
  },

  // ---- packed rings
  {
    set: 'packed',
    file: 'src/virtio/packed-ring.ts',
    text: 'const chain = this.claim(this.#scratch[count * 4 - 1]! & 0xffff)',
    instead: 'const chain = this.claim(this.#scratch[3]! & 0xffff)',
    cases: { 'packed-id-of-last': 'fail' },
  },
  {
    set: 'packed',
    file: 'src/virtio/packed-ring.ts',
    text: "if (!this.#indirect || count !== 1) return this.fail('ERR_RING_INDIRECT')",
    instead: "if (!this.#indirect || count !== 1 || (flags & 2) !== 0) return this.fail('ERR_RING_INDIRECT')",
    cases: { 'packed-indirect-reserved': 'fail' },
  },
  {
    set: 'packed',
    file: 'src/virtio/packed-ring.ts',
    text: 'this.#words[at * 4 + 2] = written',
    instead: 'this.#words[at * 4 + 2] = 0',
    cases: { 'packed-used-write-flag': 'warn' },
  },
  {
    set: 'packed wrap',
    file: 'src/virtio/packed-ring.ts',
    text: 'this.#usedWrap ^= 1',
    instead: 'if (this.size > 20) this.#usedWrap ^= 1',
    cases: { 'packed-wrap': 'fail' },
  },
  {
    set: 'packed',
    file: 'src/vhost-user/ring-state.ts',
    text: 'export function checkSize(size: number, packed: boolean): void {',
    instead: 'export function checkSize(size: number, _packed: boolean): void {\n  const packed = false',
    cases: { 'packed-size-any': 'fail' },
  },

  // ---- disks
  {
    set: 'blk',
    file: 'devices/blk/queue.ts',
    text: 'return this.#fail(chain, shared.OTHER, shared.UNSUPPORTED, blk.VIRTIO_BLK_S_UNSUPP)',
    instead: 'return this.#fail(chain, shared.OTHER, shared.UNSUPPORTED, blk.VIRTIO_BLK_S_IOERR)',
    cases: { 'blk-unknown-type': 'fail', 'blk-type-not-offered': 'fail', 'blk-zone-requests': 'fail' },
  },
  {
    set: 'blk',
    file: 'devices/blk/queue.ts',
    text: 'case blk.VIRTIO_BLK_T_FLUSH:',
    instead: 'case 0x7777:',
    cases: { 'blk-flush': 'fail' },
  },
  {
    set: 'blk',
    file: 'devices/blk/queue.ts',
    text: 'chain.copyTo(0, this.#data.serial, 0, length)',
    instead: 'chain.copyTo(0, this.#data.serial, 0, 5)',
    cases: { 'blk-get-id': 'fail' },
  },
  {
    set: 'blk',
    file: 'devices/blk/queue.ts',
    text: 'if ((flags & ~known) !== 0) return',
    instead: 'if ((flags & ~known) === -1) return',
    cases: { 'blk-discard-flags': 'fail', 'blk-write-zeroes-flags': 'fail' },
  },
  {
    set: 'blk',
    file: 'devices/blk/queue.ts',
    text: 'this.#context.complete(chain, 1, operation, 0)',
    instead: 'this.#context.complete(chain, chain.writable, operation, 0)',
    cases: { 'blk-error-used-length': 'fail' },
  },
  {
    set: 'blk',
    file: 'devices/blk/queue.ts',
    text: 'if (write) io.write(chain, this.#file, offset + done,',
    instead: 'if (write) io.write(chain, this.#file, offset + done - 512,',
    cases: { 'blk-write': 'fail', 'blk-write-framing': 'fail', 'blk-discard': 'fail' },
  },
  {
    set: 'blk',
    file: 'devices/blk/queue.ts',
    text: 'if (length === 0) return this.#succeed(chain, operation, 0, 0)',
    instead:
      'if (length === 65536) return this.#succeed(chain, operation, length, length)\nif (length === 0) return this.#succeed(chain, operation, 0, 0)',
    cases: { 'blk-read': 'fail' },
  },

  // ---- network cards
  {
    set: 'net',
    file: 'devices/net/control-queue.ts',
    text: 'ok ? net.VIRTIO_NET_OK : net.VIRTIO_NET_ERR',
    instead: 'net.VIRTIO_NET_OK',
    cases: { 'net-control-unknown': 'fail', 'net-control-short': 'warn', 'net-control-pairs': 'warn' },
  },
  {
    set: 'net',
    file: 'devices/net/transmit.ts',
    text: 'this.#counters.drop(DROP_DISABLED)\n    this.#context.give(chain, 0)',
    instead: 'this.#transmit(chain)\n    this.#context.give(chain, 7)',
    cases: { 'net-transmit-disabled': 'fail' },
  },
  {
    set: 'net',
    file: 'devices/net/receiver.ts',
    text: 'let word2 = buffers << 16',
    instead: 'let word2 = 0',
    cases: {
      'net-receive': 'fail',
      'net-receive-single': 'fail',
      'net-receive-mergeable': 'fail',
      'net-receive-packed': 'fail',
    },
  },
  {
    set: 'net',
    file: 'src/engine/queue.ts',
    text: 'this.#active = this.enabled && ',
    instead: 'this.#active = ',
    cases: { 'net-receive-disabled': 'fail' },
  },
  {
    set: 'net',
    file: 'devices/net/index.ts',
    text: 'if (mtu < MIN_MTU || mtu > MAX_MTU) return false',
    instead: 'if (mtu < 0) return false\nreturn true',
    cases: { 'net-mtu': 'fail' },
  },

  // ---- in-flight tracking
  {
    set: 'inflight',
    file: 'src/virtio/split-inflight.ts',
    text: 'this.#endBatch(usedIdx)\n    const heads',
    instead: 'const heads',
    cases: { 'inflight-batch-split': 'fail' },
  },
  {
    set: 'inflight',
    file: 'src/virtio/split-inflight.ts',
    text: 'this.#words[word] = counter[0]!',
    instead: 'this.#words[word] = 7',
    cases: { 'inflight-marks-split': 'fail' },
  },
  {
    set: 'inflight',
    file: 'src/virtio/packed-inflight.ts',
    text: 'const head = published ? free : oldFree',
    instead: 'const head = oldFree',
    cases: { 'inflight-commit-packed': 'fail' },
  },
  {
    set: 'inflight marks',
    file: 'src/virtio/split-inflight.ts',
    text: '// From here on a process that dies has the chain in flight. It must be before anything is done for the chain.\n    this.#bytes[SPLIT_HEADER + head * SPLIT_ENTRY] = 1',
    instead: '',
    cases: { 'inflight-marks-busy-split': 'fail' },
  },
  {
    set: 'inflight marks',
    file: 'src/virtio/split-inflight.ts',
    text: 'if (this.#bytes[SPLIT_HEADER + head * SPLIT_ENTRY] === 1) heads.push(head)',
    instead: '',
    cases: { 'inflight-resubmit-split': 'fail' },
  },
  {
    set: 'inflight marks',
    file: 'src/virtio/packed-inflight.ts',
    text: 'const head = published ? free : oldFree',
    instead: 'const head = free',
    cases: { 'inflight-rollback-packed': 'fail' },
  },

  // ---- dirty log
  {
    set: 'log',
    file: 'src/virtio/dirty-log.ts',
    text: 'Atomics.or(this.#bits, byte,',
    instead: 'Atomics.store(this.#bits, byte,',
    cases: { 'log-keeps-bits': 'fail' },
  },
  {
    set: 'log',
    file: 'src/virtio/split-ring.ts',
    text: 'if (this.logAddress >= 0) this.log!.mark(this.logAddress + offset, length)',
    instead: '',
    cases: { 'log-used-ring': 'fail', 'log-used-ring-address': 'warn' },
  },
  {
    set: 'log',
    file: 'src/virtio/packed-ring.ts',
    text: 'if (this.logAddress < 0) return\n    const offset',
    instead: 'return\n    const offset',
    cases: { 'log-packed': 'fail' },
  },
  {
    set: 'no log',
    file: 'src/virtio/dirty-log.ts',
    text: 'for (let segment = chain.readableCount; segment < chain.count && left > 0; segment++) {',
    instead: 'for (let segment = chain.count - 1; segment < chain.count && left > 0; segment++) {',
    cases: { 'log-data': 'fail', 'log-after-clearing': 'fail', 'log-offset': 'fail', 'log-stopped': 'fail' },
  },
  {
    set: 'much log',
    file: 'src/virtio/dirty-log.ts',
    text: '(0xff << first) & (0xff >>> (8 - behind))',
    instead: '0xff',
    cases: { 'log-precise': 'warn' },
  },
  {
    set: 'much log',
    file: 'src/vhost-user/session.ts',
    text: 'await this.log.enable((features & LOGGING) !== 0n)',
    instead: 'await this.log.enable(true)',
    cases: { 'log-off': 'warn' },
  },

  // ---- vIOMMU
  {
    set: 'iommu',
    file: 'src/engine/session-state.ts',
    text: 'iotlb.invalidate(address, size)',
    instead: '',
    cases: { 'iommu-invalidate': 'fail' },
  },
  {
    set: 'iommu',
    file: 'src/vhost-user/memory-exchange.ts',
    text: "if (regions === undefined) throw iotlbError('an entry outside of the memory regions')",
    instead: 'if (regions === undefined) return',
    cases: { 'iommu-update-outside': 'fail' },
  },
  {
    set: 'iommu',
    file: 'src/vhost-user/memory-exchange.ts',
    text: 'access: permissions,',
    instead: 'access: 3,',
    cases: { 'iommu-permissions': 'fail' },
  },

  // ---- status, reset, state
  {
    set: 'migration',
    file: 'src/vhost-user/negotiated.ts',
    text: 'this.#status = status & ~VIRTIO_CONFIG_S_NEEDS_RESET',
    instead: 'this.#status = 0xb',
    cases: { 'status-kept': 'fail', 'status-reset': 'fail' },
  },
  {
    set: 'migration',
    file: 'src/vhost-user/session.ts',
    text: 'await this.rings.reset()',
    instead: '',
    cases: { 'reset-device': 'fail' },
  },
  {
    set: 'migration',
    file: 'src/vhost-user/session.ts',
    text: '(state) => this.host.loadState(state)',
    instead: 'async () => {}',
    cases: { 'device-state-garbage': 'warn' },
  },
  {
    set: 'migration',
    file: 'src/vhost-user/session.ts',
    text: 'phase !== wire.VHOST_TRANSFER_STATE_PHASE_STOPPED ||',
    instead: '',
    cases: { 'device-state-bad-parameters': 'warn' },
  },
  {
    set: 'state',
    file: 'src/vhost-user/requests.ts',
    text: 'return wire.u64(BigInt(wire.VHOST_USER_DEVICE_STATE_NOFD_MASK))',
    instead: 'return wire.u64(0n)',
    cases: { 'device-state-reply': 'fail', 'device-state-save': 'fail', 'device-state-load': 'fail' },
  },

  // ---- hostile rings
  {
    set: 'hostile',
    file: 'src/virtio/split-ring.ts',
    text: "if (((seen - this.#lastAvail) & 0xffff) > this.size) return this.fail('ERR_RING_INDEX')",
    instead: '',
    cases: { 'ring-avail-jump': 'warn' },
  },
  {
    set: 'hostile',
    file: 'src/vhost-user/session.ts',
    text: 'ringBroke(index: number): void {',
    instead: 'ringBroke(index: number): void {\n    if (index >= 0) return',
    cases: { 'ring-err-signalled': 'warn' },
  },
]
