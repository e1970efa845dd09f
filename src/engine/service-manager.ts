/** What sd_notify(3) does: tells the service manager, over the datagram socket that it named in $NOTIFY_SOCKET. */
import { native } from '../native.ts'

/**
 * Tells the service manager, if there is one, e.g. `{ READY: 1, STATUS: 'serving 2 devices' }`. One that doesn't listen
 * can't be helped: the result is ignored, as sd_notify(3) recommends.
 */
export function notifyServiceManager(
  variables: Readonly<Record<string, string | number>>,
  address = process.env['NOTIFY_SOCKET']
): void {
  if (address === undefined || address === '') return
  const lines = Object.entries(variables).map(([name, value]) => `${name}=${String(value).replaceAll('\n', ' ')}`)
  native.sendDatagram(address, Buffer.from(lines.join('\n')))
}

/** CLOCK_MONOTONIC in microseconds, as `MONOTONIC_USEC` wants it. */
export function monotonicMicroseconds(): number {
  return Number(process.hrtime.bigint() / 1000n)
}
