/**
 * What a migration or a handover carries of a network card: JSON, so that versions can add to it. Unknown keys are
 * ignored.
 */

export interface NetState {
  /** As negotiated. */
  readonly features: bigint
  readonly mac: Uint8Array
  readonly announcing: boolean
  /** What the driver commanded by a control queue that is ours. */
  readonly pairsInUse: number
  readonly offloads: bigint | undefined
  /** A capture has been started: who takes over continues its file. */
  readonly capturing: boolean
}

export function encodeState({ features, mac, offloads, ...state }: NetState): Uint8Array {
  const bits = { features: features.toString(16), offloads: offloads?.toString(16) ?? null }
  return new TextEncoder().encode(JSON.stringify({ ...state, ...bits, mac: Buffer.from(mac).toString('hex') }))
}

/** @param pairs that the card has @throws Error when it is no state of such a card */
export function decodeState(bytes: Uint8Array, pairs: number): NetState {
  const parsed: unknown = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes))
  const { features, mac, announcing, pairsInUse, offloads, capturing } = (parsed ?? {}) as Record<string, unknown>
  const wrong = (what: string): Error => new Error(`no state of this network card: ${what}`)
  const bits = (value: unknown): bigint => {
    if (typeof value !== 'string' || !/^[0-9a-f]{1,16}$/.test(value)) throw wrong('feature bits')
    return BigInt(`0x${value}`)
  }
  if (typeof mac !== 'string' || !/^([0-9a-f]{2}){6}$/.test(mac)) throw wrong('its MAC address')
  const inUse = Number(pairsInUse)
  if (!Number.isInteger(inUse) || inUse < 1 || inUse > pairs) throw wrong(`${pairsInUse} of ${pairs} queue pairs`)
  return {
    features: bits(features),
    mac: Buffer.from(mac, 'hex'),
    announcing: announcing === true,
    pairsInUse: inUse,
    offloads: offloads === null ? undefined : bits(offloads),
    capturing: capturing === true,
  }
}
