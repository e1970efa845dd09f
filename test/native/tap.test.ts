import { describe, expect, it } from 'vitest'
import { native } from '../../src/native.ts'
import { answerInNamespace, whyNoNamespace } from './network.ts'
import { EBADF, EINVAL, ENAMETOOLONG, ENOENT } from './support.ts'

const EPERM = 1
const EACCES = 13
const EBUSY = 16
const ENODEV = 19
const ENOTTY = 25
const ELOOP = 40
const EBADFD = 77
const EOPNOTSUPP = 95

const IFF_TAP = 0x2
const IFF_MULTI_QUEUE = 0x100
const IFF_DETACH_QUEUE = 0x400
const IFF_NO_PI = 0x1000
const IFF_VNET_HDR = 0x4000
const IFF_UP = 1
const IFF_BROADCAST = 2
const TUN_F_CSUM = 1
const TUN_F_TSO4 = 2

const LONG = 'x'.repeat(16)
const outside = whyNoNamespace()

describe('wrong arguments', () => {
  it('of a wrong type or too short are TypeErrors', () => {
    const loose = native as unknown as Record<string, (...args: unknown[]) => unknown>
    const calls: [string, unknown[]][] = [
      ['tapOpen', [1, false]],
      ['tapOpen', ['t']],
      ['tapInfo', [0, new Int32Array(2)]],
      ['tapInfo', [0, new Float64Array(3)]],
      ['tapSetHeaderSize', [0, 1.5]],
      ['tapSetOffload', [0, -1]],
      ['tapSetQueue', [0, 1]],
      ['linkInfo', ['lo', new Int32Array(10)]],
      ['linkSetUp', ['lo']],
      ['linkSetMtu', ['lo', '1500']],
      ['bridgeAdd', ['br0']],
      ['packetSocket', ['lo', 0]],
    ]
    for (const [name, args] of calls) expect(() => loose[name]?.(...args), `${name} ${args}`).toThrow(TypeError)
  })

  it('names that no link has are refused before the kernel cuts them', () => {
    const out = new Int32Array(11)
    const named: ((name: string) => number)[] = [
      (name) => native.linkInfo(name, out),
      (name) => native.linkSetUp(name, true),
      (name) => native.linkSetMtu(name, 1500),
      (name) => native.bridgeAdd(name, 'lo'),
      (name) => native.bridgeAdd('lo', name),
      (name) => native.packetSocket(name, false),
    ]
    for (const call of named) {
      expect(call(LONG)).toBe(-ENAMETOOLONG)
      expect(call('lo\0')).toBe(-EINVAL)
      expect(call('')).toBe(-ENODEV)
    }
    expect(native.tapOpen(LONG, false)).toBe(-ENAMETOOLONG)
    expect(native.tapOpen('lo\0', false)).toBe(-EINVAL)
  })

  it('fds that are no taps', () => {
    const out = new Int32Array(3)
    const event = native.eventfd(0)
    for (const [fd, error] of [
      [-1, -EBADF],
      [99_999, -EBADF],
      [event, -ENOTTY],
    ] as const) {
      expect(native.tapInfo(fd, out)).toBe(error)
      expect(native.tapSetHeaderSize(fd, 12)).toBe(error)
      expect(native.tapSetOffload(fd, 0)).toBe(error)
      expect(native.tapSetQueue(fd, true)).toBe(error)
    }
    native.close(event)
  })
})

describe.skipIf(outside !== undefined)('taps', () => {
  it('are made with a virtio-net header, non-blocking, and closed on exec', () => {
    const answer = answerInNamespace(`
      import { readFileSync } from 'node:fs'
      const out = new Int32Array(3)
      const fd = native.tapOpen('t0', false)
      const name = native.tapInfo(fd, out)
      const flags = parseInt(/flags:\\s+(\\d+)/.exec(readFileSync('/proc/self/fdinfo/' + fd, 'utf8'))[1], 8)
      const known = out[2]
      const chosen = native.tapInfo(native.tapOpen('', false), new Int32Array(3))
      const counted = native.tapInfo(native.tapOpen('net%d', false), new Int32Array(3))
      native.close(fd)
      const gone = native.linkInfo('t0', new Int32Array(11))
      console.log(JSON.stringify({ name, flags: out[0], header: out[1], known, open: flags & 0o2004003, chosen, counted, gone }))
    `) as { known: number }
    expect(answer).toEqual({
      name: 't0',
      flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
      header: 10,
      known: expect.any(Number),
      open: 0o2004002,
      chosen: 'tap0',
      counted: 'net0',
      gone: -ENODEV,
    })
    const wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE
    expect(answer.known & wanted).toBe(wanted)
  })

  it('take header sizes and offloads, and refuse those that there are not', () => {
    const answer = answerInNamespace(`
      const out = new Int32Array(3)
      const fd = native.tapOpen('t0', false)
      const offload = (flags) => native.tapSetOffload(fd, flags)
      const result = [native.tapSetHeaderSize(fd, 12), native.tapSetHeaderSize(fd, 9), native.tapInfo(fd, out), out[1]]
      console.log(JSON.stringify([...result, offload(0), offload(${TUN_F_CSUM | TUN_F_TSO4}), offload(${TUN_F_TSO4}), offload(0x80000000)]))
    `)
    expect(answer).toEqual([0, -EINVAL, 't0', 12, 0, 0, -EINVAL, -EINVAL])
  })

  it('have as many queues as were opened, attached or not', () => {
    const answer = answerInNamespace(`
      const out = new Int32Array(3)
      const first = native.tapOpen('m0', true)
      const second = native.tapOpen('m0', true)
      const queues = () => /numqueues (\\d+) numdisabled (\\d+)/.exec(ip('-d link show m0')).slice(1).join()
      const seen = [first < second, queues(), native.tapSetQueue(second, true), native.tapSetQueue(second, false), queues()]
      seen.push(native.tapInfo(second, out), out[0], native.tapSetQueue(second, false), native.tapSetQueue(second, true), queues())
      native.close(second)
      const single = native.tapOpen('t0', false)
      console.log(JSON.stringify([...seen, queues(), native.tapSetQueue(single, false)]))
    `)
    const flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE
    const detached = [-EINVAL, 0, '1,1', 'm0', flags | IFF_DETACH_QUEUE, -EINVAL, 0, '2,0']
    expect(answer).toEqual([true, '2,0', ...detached, '1,0', -EINVAL])
  })

  it('that exist are attached to, if they are of the same kind and free', () => {
    const answer = answerInNamespace(`
      ip('tuntap add mode tap name single')
      ip('tuntap add mode tap multi_queue name multi')
      ip('tuntap add mode tun name point')
      const held = native.tapOpen('held', false)
      const before = support.openFds().join()
      const failed = [['held', false], ['held', true], ['single', true], ['multi', false], ['point', false], ['lo', false], ['a/b', false]]
        .map(([name, multi]) => native.tapOpen(name, multi))
      const closed = support.openFds().join() === before
      const again = native.tapOpen('single', false)
      native.tapSetHeaderSize(again, 12)
      native.close(again)
      const out = new Int32Array(3)
      const reopened = native.tapOpen('single', false)
      console.log(JSON.stringify({ failed, closed, name: native.tapInfo(reopened, out), header: out[1], multi: native.tapOpen('multi', true) > 0 }))
    `)
    expect(answer).toEqual({
      failed: [-EBUSY, ...new Array(6).fill(-EINVAL)],
      closed: true,
      name: 'single',
      header: 12,
      multi: true,
    })
  })

  it('are refused without the privilege, the device or its permission', () => {
    const source = (call: string) => `
      const before = support.openFds().join()
      const results = [${call}]
      console.log(JSON.stringify([...results, support.openFds().join() === before]))`
    const open = source(`native.tapOpen('t0', false)`)
    const without = (capabilities: string) => `exec setpriv --bounding-set ${capabilities} -- "$@"`
    expect(
      answerInNamespace(
        source(`native.tapOpen('t0', false), native.packetSocket('lo', true), native.linkSetUp('lo', true),
          native.linkSetMtu('lo', 1400),
          native.bridgeAdd('lo', 'lo'), native.linkInfo('lo', new Int32Array(11))`),
        without('-net_admin,-net_raw')
      )
    ).toEqual([...new Array(5).fill(-EPERM), 0, true])
    // Device nodes cannot be made in a user namespace; a plain file can lack a permission as well.
    const empty = 'mount -t tmpfs none /dev/net'
    const file = `${empty}; : >/dev/net/tun`
    expect(answerInNamespace(open, `${empty}; exec "$@"`)).toEqual([-ENOENT, true])
    expect(answerInNamespace(open, `${file}; exec "$@"`)).toEqual([-ENOTTY, true])
    const refused = `${file}; chmod 000 /dev/net/tun; ${without('-dac_override,-dac_read_search')}`
    expect(answerInNamespace(open, refused)).toEqual([-EACCES, true])
  })

  it('are told from /dev/net/tun that is attached to nothing', () => {
    const answer = answerInNamespace(`
      import { openSync } from 'node:fs'
      const fd = openSync('/dev/net/tun', 'r+')
      console.log(JSON.stringify([native.tapInfo(fd, new Int32Array(3)), native.tapSetHeaderSize(fd, 12), native.tapSetOffload(fd, 0)]))
    `)
    expect(answer).toEqual([-EBADFD, -EBADFD, -EBADFD])
  })
})

describe.skipIf(outside !== undefined)('links', () => {
  it('tell what they are and take changes', () => {
    const answer = answerInNamespace(`
      const out = new Int32Array(11)
      const look = (name) => [native.linkInfo(name, out), ...out]
      native.tapOpen('t0', false)
      ip('link set t0 address 02:11:22:33:44:ff')
      const results = [native.linkSetMtu('t0', 9000)]
      const down = look('t0')
      results.push(native.linkSetUp('t0', true))
      const up = look('t0')
      results.push(native.linkSetUp('t0', false))
      console.log(JSON.stringify({ results, down, up, again: look('t0'), lo: look('lo'), shown: ip('-o link show t0') }))
    `) as Record<string, number[]> & { shown: string }
    expect(answer['results']).toEqual([0, 0, 0])
    expect(answer.shown).toMatch(/: t0: .* mtu 9000 .*02:11:22:33:44:ff/)
    const index = Number.parseInt(answer.shown, 10)
    const rest = [9000, 2, 0x11, 0x22, 0x33, 0x44, 0xff, 0, 0]
    expect(answer['down']).toEqual([0, index, expect.any(Number), ...rest])
    expect(answer['up']).toEqual([0, index, expect.any(Number), ...rest])
    expect((answer['down']?.[2] ?? 0) & (IFF_UP | IFF_BROADCAST)).toBe(IFF_BROADCAST)
    expect((answer['up']?.[2] ?? 0) & (IFF_UP | IFF_BROADCAST)).toBe(IFF_UP | IFF_BROADCAST)
    expect(answer['again']).toEqual(answer['down'])
    expect(answer['lo']).toEqual([0, 1, expect.any(Number), 65536, 0, 0, 0, 0, 0, 0, 0, 0])
  })

  it('go on a bridge, once', () => {
    const answer = answerInNamespace(`
      const out = new Int32Array(11)
      ip('link add br0 type bridge')
      ip('link add br1 type bridge')
      native.tapOpen('t0', false)
      native.tapOpen('t1', false)
      const before = support.openFds().join()
      const pairs = [['br0', 't0'], ['br0', 't0'], ['br1', 't0'], ['t1', 't0'], ['none', 't0'], ['br0', 'none'], ['br0', 'br1'], ['br0', 'lo']]
      const results = pairs.map(([bridge, name]) => native.bridgeAdd(bridge, name))
      const look = (name) => (native.linkInfo(name, out), { index: out[0], bridge: out[9], master: out[10] })
      console.log(JSON.stringify({ results, br0: look('br0'), t0: look('t0'), t1: look('t1'), closed: support.openFds().join() === before }))
    `) as { br0: { index: number } }
    expect(answer).toEqual({
      results: [0, -EBUSY, -EBUSY, -EOPNOTSUPP, -ENODEV, -ENODEV, -ELOOP, -EINVAL],
      br0: { index: expect.any(Number), bridge: 1, master: 0 },
      t0: { index: expect.any(Number), bridge: 0, master: answer.br0.index },
      t1: { index: expect.any(Number), bridge: 0, master: 0 },
      closed: true,
    })
    expect(answer.br0.index).toBeGreaterThan(1)
  })

  it('refuse what they cannot take, and names that nobody has', () => {
    const answer = answerInNamespace(`
      native.tapOpen('t0', false)
      const before = support.openFds().join()
      const refused = [native.linkSetMtu('t0', 1e6), native.linkSetMtu('t0', 10), native.linkSetMtu('t0', -1)]
      const absent = [native.linkInfo('none', new Int32Array(11)), native.linkSetUp('none', true), native.linkSetMtu('none', 1500), native.packetSocket('none', true)]
      // An ioctl would cut these off at the colon.
      absent.push(native.linkInfo('t0:1', new Int32Array(11)), native.linkSetUp('t0:1', true), native.linkSetMtu('t0:1', 1400), native.packetSocket('t0:1', true), native.bridgeAdd('t0:1', 'lo'), native.bridgeAdd('t0', 'lo:1'))
      console.log(JSON.stringify({ refused, absent, closed: support.openFds().join() === before }))
    `)
    expect(answer).toEqual({
      refused: [-EINVAL, -EINVAL, -EINVAL],
      absent: new Array(10).fill(-ENODEV),
      closed: true,
    })
  })

  it('are those of the thread, and need no fd that stays', () => {
    const answer = answerInNamespace(`
      native.tapOpen('t0', false)
      const out = new Int32Array(11)
      native.linkInfo('t0', out)
      const before = support.openFds().join()
      for (let i = 0; i < 20; i++) {
        native.linkInfo('t0', out)
        native.linkSetUp('t0', i % 2 === 0)
        native.linkSetMtu('t0', 1500 + i)
        native.close(native.packetSocket('t0', i % 2 === 0))
        native.close(native.tapOpen('t' + i, i % 2 === 1))
      }
      native.linkInfo('t0', out)
      console.log(JSON.stringify([support.openFds().join() === before, out[2], ip('-o link').trim().split('\\n').length]))
    `)
    expect(answer).toEqual([true, 1519, 2])
    expect(native.linkInfo('t0', new Int32Array(11))).toBe(-ENODEV)
  })
})
