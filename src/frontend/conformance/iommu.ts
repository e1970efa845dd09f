/** Cases about the vIOMMU: misses, updates, invalidations, permissions. */
import {
  readIotlb,
  VHOST_IOTLB_ACCESS_FAIL,
  VHOST_IOTLB_MISS,
  VHOST_IOTLB_UPDATE,
  VHOST_USER_BACKEND_IOTLB_MSG,
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
} from '../../vhost-user/wire.ts'
import { VIRTIO_F_ACCESS_PLATFORM } from '../../virtio/constants.ts'
import { FrontendError } from '../errors.ts'
import { layouts } from '../memory.ts'
import { type ConformanceCase, expect, Violation } from './case.ts'
import type { Context } from './context.ts'
import type { Guest, Ring } from './guest.ts'

const IOMMU = 'vhost-user.rst "IOMMU support"'
const needs = { features: [VIRTIO_F_ACCESS_PLATFORM], protocol: [VHOST_USER_PROTOCOL_F_BACKEND_REQ] } as const
const blkNeeds = { ...needs, device: 'blk' } as const
const PAGE = 4096

function running(context: Context, granule = PAGE): { guest: Guest; ring: Ring } {
  return context.running({ memory: layouts.single(32 * 2 ** 20), iommu: { granule } })
}

export const iommuCases: readonly ConformanceCase[] = [
  {
    id: 'iommu-miss',
    group: 'iommu',
    level: 'MUST',
    rule: 'asks for translations that it does not have, of rings and of buffers, and goes on when they come',
    cites: `${IOMMU} ("the back-end sends IOTLB miss messages for the guest virtual memory areas it needs")`,
    needs,
    run: (context) => {
      const { guest, ring } = running(context)
      ring.run(10)
      ring.finishAll(ring.batch(60))
      const { misses, updates } = guest.session.iommu
      expect(misses > 0, 'misses', 'none')
      return `${misses} misses, ${updates} updates`
    },
  },
  {
    id: 'iommu-miss-message',
    group: 'iommu',
    level: 'MUST',
    rule: 'names in a miss an address that it was given, with the permissions that it needs',
    cites: 'vhost-user.rst "An IOTLB message", "VHOST_USER_BACKEND_IOTLB_MSG"',
    needs,
    run: (context) => {
      const guest = context.guest({ memory: layouts.single(32 * 2 ** 20), iommu: true })
      const { mappings } = guest.session.iommu
      const answer = guest.connection.onBackendRequest
      let seen = 0
      let wrong: string | undefined
      guest.connection.onBackendRequest = (message) => {
        if (message.request === VHOST_USER_BACKEND_IOTLB_MSG) {
          seen++
          const { payload } = message
          if (payload.length < 26) wrong = `a payload of ${payload.length} bytes`
          else {
            const miss = readIotlb(new DataView(payload.buffer, payload.byteOffset, payload.byteLength), 0)
            const known = mappings.some(({ iova, size }) => miss.iova >= iova && miss.iova < iova + size)
            if (miss.type !== VHOST_IOTLB_MISS && miss.type !== VHOST_IOTLB_ACCESS_FAIL) wrong = `type ${miss.type}`
            else if (!known) wrong = `address 0x${miss.iova.toString(16)}, which nobody gave it`
            else if (miss.permissions < 1 || miss.permissions > 3) wrong = `permissions ${miss.permissions}`
          }
        }
        return answer?.(message) ?? 1n
      }
      context.startCompanions(guest)
      guest.start(context.ringIndex).run(5)
      expect(seen > 0, 'a miss', 'none')
      expect(wrong === undefined, 'misses of type 1 for addresses it was given', wrong ?? '')
      return `${seen} misses`
    },
  },
  {
    id: 'iommu-late-answer',
    group: 'iommu',
    level: 'MUST',
    rule: 'waits for a translation without losing the request, however late it comes',
    cites: IOMMU,
    needs,
    run: (context) => {
      const { guest, ring } = running(context)
      ring.run()
      const { iommu } = guest.session
      for (let i = 0; i < 3; i++) {
        const [mapping] = iommu.mappings
        if (mapping === undefined) throw new Error('no mapping')
        iommu.answering = false
        iommu.invalidate(guest.connection, mapping.iova, mapping.size)
        const pending = ring.submit()
        ring.expectIdle('its translation has not come')
        iommu.answerLate(guest.connection)
        ring.finish(pending, 'the request, once the translation came')
      }
      return '3 times'
    },
  },
  {
    id: 'iommu-invalidate',
    group: 'iommu',
    level: 'MUST',
    rule: 'no longer uses a translation whose invalidation it acknowledged',
    cites: `${IOMMU} (invalidation)`,
    needs: blkNeeds,
    run: (context) => {
      const { guest, ring } = running(context)
      const { iommu } = guest.session
      const [first, second] = [guest.memory.allocate(PAGE, PAGE), guest.memory.allocate(PAGE, PAGE)]
      const iova = 2 ** 42
      const { firstBlock = new Uint8Array(0), blockSize = 512 } = context.facts.blk ?? {}
      for (const [i, target] of [first, second, first, second].entries()) {
        const other = target === first ? second : first
        first.bytes.fill(0x5c)
        second.bytes.fill(0x5c)
        iommu.unmap(guest.connection, iova, PAGE)
        iommu.map({ iova, gpa: target.gpa, size: PAGE, permissions: 3 })
        const length = Math.min(blockSize, PAGE)
        const request = ring.requests.submitForeign(0, 0, [
          { address: iova, length, writable: true, untranslated: true },
        ])
        ring.requests.wait(request)
        const what = `read ${i + 1}`
        expect(request.status === 0, `${what}: status OK`, `${request.status}`)
        const arrived = Buffer.compare(target.bytes.subarray(0, length), firstBlock.subarray(0, length)) === 0
        expect(arrived, `${what}: the data where the address leads`, 'it is not there')
        const clean = other.bytes.every((byte) => byte === 0x5c)
        expect(clean, `${what}: nothing where it led before`, 'something was written there')
      }
      return 'one address, four times another page'
    },
  },
  {
    id: 'iommu-invalidate-busy',
    group: 'iommu',
    level: 'MUST',
    rule: 'acknowledges invalidations while requests are under way, and completes those',
    cites: IOMMU,
    needs,
    run: (context) => {
      const { guest, ring } = running(context)
      const { iommu } = guest.session
      const [mapping] = iommu.mappings
      if (mapping === undefined) throw new Error('no mapping')
      for (let i = 0; i < 20; i++) {
        const pending = ring.batch(40)
        iommu.invalidate(guest.connection, mapping.iova, mapping.size)
        ring.finishAll(pending)
      }
      return '20 times'
    },
  },
  {
    id: 'iommu-permissions',
    group: 'iommu',
    level: 'MUST',
    rule: 'does not write where its translation allows reading only',
    cites: 'vhost-user.rst "An IOTLB message" (permissions flags)',
    needs: blkNeeds,
    run: (context) => {
      const { guest, ring } = running(context)
      ring.run()
      const { iommu } = guest.session
      const page = guest.memory.allocate(PAGE, PAGE)
      page.bytes.fill(0x5c)
      const iova = 2 ** 42
      iommu.map({ iova, gpa: page.gpa, size: PAGE, permissions: 1 })
      guest.connection.iotlbUpdate(BigInt(iova), BigInt(PAGE), guest.memory.uva(page.gpa), 1)
      const request = ring.requests.submitForeign(0, 0, [
        { address: iova, length: 512, writable: true, untranslated: true },
      ])
      let seen = `status ${request.status}`
      try {
        ring.requests.wait(request, 300)
        seen = `answered with status ${request.status}`
      } catch (error) {
        if (!(error instanceof FrontendError)) throw error
        seen = error.failure === 'timeout' ? 'the request waits' : error.failure
      }
      expect(
        page.bytes.every((byte) => byte === 0x5c),
        'the page as it was',
        'it was written to'
      )
      return seen
    },
  },
  {
    id: 'iommu-pages',
    group: 'iommu',
    level: 'MUST',
    rule: 'serves a buffer over many translations of one page each, which lie anywhere',
    cites: IOMMU,
    needs: blkNeeds,
    run: (context) => {
      const { guest, ring } = running(context)
      const { iommu } = guest.session
      const { blockSize = 512, capacity = 0 } = context.facts.blk ?? {}
      const pages = Math.min(16, Math.floor((capacity * 512) / PAGE))
      expect(pages > 0, 'a disk of at least a page', `${capacity} sectors`)
      const length = Math.floor((pages * PAGE) / blockSize) * blockSize
      const plain = ring.requests.read(0, length)
      const area = guest.memory.allocate(pages * PAGE, PAGE)
      const iova = 2 ** 42
      // The pages of the buffer lie backwards in guest memory.
      for (let i = 0; i < pages; i++)
        iommu.map({ iova: iova + i * PAGE, gpa: area.gpa + (pages - 1 - i) * PAGE, size: PAGE, permissions: 3 })
      const request = ring.requests.submitForeign(0, 0, [{ address: iova, length, writable: true, untranslated: true }])
      ring.requests.wait(request)
      expect(request.status === 0, 'status OK', `${request.status}`)
      for (let i = 0; i < pages; i++) {
        const at = (pages - 1 - i) * PAGE
        const same = Buffer.compare(area.bytes.subarray(at, at + PAGE), plain.subarray(i * PAGE, (i + 1) * PAGE)) === 0
        expect(same, `page ${i + 1} of the data where its translation leads`, 'other bytes')
      }
      return `${pages} pages`
    },
  },
  {
    id: 'iommu-update-outside',
    group: 'iommu',
    level: 'MUST',
    rule: 'answers an update that leads outside the shared memory with a value other than 0',
    cites: `${IOMMU} ("On success, the back-end is expected to reply with a zero payload, non-zero otherwise")`,
    needs,
    run: (context) => {
      const { guest } = running(context)
      try {
        guest.connection.iotlb({
          iova: 2n ** 42n,
          size: 4096n,
          userAddress: 2n ** 46n + 4096n,
          permissions: 3,
          type: VHOST_IOTLB_UPDATE,
        })
      } catch (error) {
        if (error instanceof FrontendError && (error.failure === 'nack' || error.failure === 'closed'))
          return error.failure === 'nack' ? 'refused' : 'closed'
        throw error
      }
      throw new Violation('a reply other than 0', 'the reply 0')
    },
  },
]
