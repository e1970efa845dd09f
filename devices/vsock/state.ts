/** What a successor of the device has to know: the connections that the guest believes in. */
import * as v from 'valibot'

const port = v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(0xffff_ffff))
const state = v.object({ connections: v.array(v.tuple([port, port])) })

/** The ports [host, guest] of what `saveState` returned. @throws Error when it is no such state */
export function portsOf(saved: unknown): [number, number][] {
  const result = v.safeParse(state, saved)
  if (!result.success) throw new Error(`no state of a vsock: ${result.issues[0].message}`)
  return result.output.connections
}
