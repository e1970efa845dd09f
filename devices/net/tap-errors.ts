/** Why a tap can't be opened, in the operator's words: from an errno of opening it to a problem and what to do. */
import { getSystemErrorName } from 'node:util'

const EBADFD = -77

/** `EPERM` for -1. */
export function errorName(result: number): string {
  // Node doesn't know this one.
  return result === EBADFD ? 'EBADFD' : getSystemErrorName(result)
}

/** What a ConfigError is made of, but for the option. */
export type Refusal = readonly [code: string, problem: string, fix: string]

/**
 * @param exists there was a link of that name before
 * @param pairs as many queues were asked for
 * @param result -errno of opening it
 */
export function openRefusal(name: string, exists: boolean, pairs: number, result: number): Refusal {
  const code = errorName(result)
  switch (code) {
    case 'EACCES':
    case 'EPERM':
      return ['ERR_NET_TAP_PERMISSION', permissionProblem(name, exists, code), permissionFix(name, exists, pairs)]
    case 'ENOENT':
    case 'ENXIO':
    case 'ENODEV': {
      const fix =
        'Load the module (modprobe tun), or pass the device into the container; a --switch without --uplink needs neither.'
      return ['ERR_NET_TAP_DEVICE', `there is no /dev/net/tun (${code})`, fix]
    }
    case 'EBUSY': {
      const problem = `${name} is in use, by another process or another device`
      return [
        'ERR_NET_TAP_BUSY',
        problem,
        `Stop the other one (ip -d link show ${name} tells about it), or give another name.`,
      ]
    }
    case 'E2BIG':
      return ['ERR_NET_TAP_QUEUES', `${name} has no queue left for ${pairs} pairs`, 'Give fewer --queue-pairs.']
    case 'EINVAL':
      if (!exists) break
      return ['ERR_NET_TAP_KIND', `${name} is a link of another kind, no tap`, 'Give the name of a tap, or a new one.']
  }
  const fix = 'Give a name of 1 to 15 characters that is a tap or free.'
  return ['ERR_NET_TAP_OPEN', `the tap ${name} can't be opened (${code})`, fix]
}

function permissionProblem(name: string, exists: boolean, code: string): string {
  if (code === 'EACCES') return `this user may not open /dev/net/tun (${code})`
  return `this user may not ${exists ? 'open' : 'create'} the tap ${name} (${code})`
}

function permissionFix(name: string, exists: boolean, pairs: number): string {
  const queues = pairs > 1 ? ' multi_queue' : ''
  const add = `ip tuntap add ${name} mode tap vnet_hdr${queues} user ${process.getuid?.() ?? 'USER'}`
  const make = exists ? `ip link delete ${name} && ${add}` : add
  return `Be root, have CAP_NET_ADMIN, or let root make it for you: ${make} && ip link set ${name} up; a --switch without --uplink needs none of this.`
}
