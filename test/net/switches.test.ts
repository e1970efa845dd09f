/** Who is on which switch: ports, the uplink, and what devices must agree about. */
import { fstatSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { PORT_DROPS } from '../../devices/net/shared.ts'
import { joinSwitch, type SwitchRequest } from '../../devices/net/switches.ts'
import { ConfigError } from '../../src/device/index.ts'
import { FakeHost } from './fake-network.ts'

const lan = (change: Partial<SwitchRequest> = {}): SwitchRequest => ({
  name: 'lan',
  uplink: undefined,
  bridge: undefined,
  ...change,
})

function refusal(run: () => unknown): ConfigError {
  try {
    run()
  } catch (error) {
    if (error instanceof ConfigError) return error
    throw error
  }
  throw new Error('it was accepted')
}

describe('ports', () => {
  test('are numbered from 0, and freed', () => {
    const host = new FakeHost()
    const ports = [1, 2, 3].map(() => joinSwitch(host, lan()))
    expect(ports.map((port) => port.place.port)).toEqual([0, 1, 2])
    expect(ports.map((port) => port.first)).toEqual([true, false, false])
    new Float64Array(ports[1]!.place.counters)[PORT_DROPS + 1] = 9
    ports[1]!.leave()
    ports[0]!.leave()
    expect(ports[2]!.first).toBe(true)
    const again = joinSwitch(host, lan())
    const next = joinSwitch(host, lan())
    expect([again.number, next.number]).toEqual([0, 1])
    expect(new Float64Array(next.place.counters)[PORT_DROPS + 1]).toBe(0)
    expect(again.place.counters).toBe(ports[2]!.place.counters)
  })

  test('256 of them', () => {
    const host = new FakeHost()
    const ports = Array.from({ length: 256 }, () => joinSwitch(host, lan()))
    const error = refusal(() => joinSwitch(host, lan({ uplink: 'up0' })))
    expect(error).toMatchObject({ code: 'ERR_NET_SWITCH_PORTS', option: '--switch' })
    expect(host.calls).toEqual([])
    ports[77]!.leave()
    expect(joinSwitch(host, lan()).number).toBe(77)
  })

  test('of another switch and of another daemon are others', () => {
    const host = new FakeHost()
    const places = [joinSwitch(host, lan()), joinSwitch(host, lan({ name: 'wan' })), joinSwitch(new FakeHost(), lan())]
    expect(places.map(({ place }) => place.port)).toEqual([0, 0, 0])
    expect(new Set(places.map(({ place }) => place.counters)).size).toBe(3)
  })
})

describe('the uplink', () => {
  const isOpen = (fd: number): boolean => {
    try {
      return fstatSync(fd) !== undefined
    } catch {
      return false
    }
  }

  test('is opened once, seen by all, and closed with the last', () => {
    const host = new FakeHost()
    const before = joinSwitch(host, lan())
    expect(before.place.uplinkFd).toBe(-1)
    host.links.set('br0', { index: 9, up: true, mtu: 1500, mac: new Uint8Array(6), bridge: true, master: 0 })
    const first = joinSwitch(host, lan({ uplink: 'up0', bridge: 'br0' }))
    expect(host.calls.filter((call) => call.startsWith('bridge'))).toHaveLength(1)
    const { uplinkFd } = before.place
    expect(isOpen(uplinkFd)).toBe(true)
    const same = joinSwitch(host, lan({ uplink: 'up0' }))
    expect(same.place.uplinkFd).toBe(uplinkFd)
    first.leave()
    before.leave()
    expect(isOpen(uplinkFd)).toBe(true)
    same.leave()
    expect(isOpen(uplinkFd)).toBe(false)
    expect(joinSwitch(host, lan()).place.uplinkFd).toBe(-1)
  })

  test('takes every kind of packet, with headers of 12 bytes', () => {
    const host = new FakeHost()
    joinSwitch(host, lan({ uplink: 'up0' }))
    expect(host.calls.slice(-2)).toEqual(['header 12', `offloads ${0x7f}`])
  })

  test('devices have to agree', () => {
    const host = new FakeHost()
    joinSwitch(host, lan({ uplink: 'up0' }))
    const other = refusal(() => joinSwitch(host, lan({ uplink: 'up1' })))
    expect(other).toMatchObject({ code: 'ERR_NET_SWITCH_UPLINK', option: '--uplink' })
    expect(other.message).toContain('the switch lan has the uplink up0, by another device, and not up1')
    host.links.set('br0', { index: 9, up: true, mtu: 1500, mac: new Uint8Array(6), bridge: true, master: 0 })
    const bridge = refusal(() => joinSwitch(host, lan({ uplink: 'up0', bridge: 'br0' })))
    expect(bridge).toMatchObject({ code: 'ERR_NET_SWITCH_UPLINK', option: '--bridge' })
    expect(joinSwitch(host, lan()).number).toBe(1)
  })

  test('that can’t be had leaves no switch behind', () => {
    const host = new FakeHost()
    host.results.openTap = () => -1
    const error = refusal(() => joinSwitch(host, lan({ uplink: 'up0' })))
    expect(error).toMatchObject({ code: 'ERR_NET_TAP_PERMISSION', option: '--uplink' })
    delete host.results.openTap
    expect(joinSwitch(host, lan({ uplink: 'up1' })).number).toBe(0)
  })
})
