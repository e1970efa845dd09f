/** What a migration or a handover carries over of the SCSI device: what the driver switched and has not been told yet. */
import { ATTENTIONS, type ScsiState } from './shared.ts'

const ALL_ATTENTIONS = 2 ** ATTENTIONS.length - 1

export function saveState(state: ScsiState): Uint8Array {
  const { senseSize, cdbSize, missed } = state
  const units = state.units.flatMap(({ generation, writeback, stopped, attentions }, lun) =>
    generation === 0 ? [] : [{ lun, writeback, stopped, attentions }]
  )
  return new TextEncoder().encode(JSON.stringify({ senseSize, cdbSize, missed, units }))
}

/** @throws Error when it is no state of this device, having changed nothing */
export function loadState(state: ScsiState, bytes: Uint8Array): void {
  const saved = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes)) as Record<string, unknown> | null
  const { senseSize, cdbSize, missed, units } = saved ?? {}
  if (!isSenseSize(senseSize) || !isCdbSize(cdbSize) || typeof missed !== 'boolean' || !Array.isArray(units))
    throw new Error('no state of a SCSI device')
  const known = (units as unknown[]).map((value) => {
    const { lun, writeback, stopped, attentions } = (value ?? {}) as Record<string, unknown>
    const unit = typeof lun === 'number' ? state.units[lun] : undefined
    if (unit === undefined || unit.generation === 0)
      throw new Error(`the guest has a logical unit ${String(lun)}, this device has not`)
    if (typeof writeback !== 'boolean' || typeof stopped !== 'boolean' || !Number.isInteger(attentions))
      throw new Error(`no state of a logical unit: ${String(lun)}`)
    return { unit, writeback, stopped, attentions: attentions as number }
  })
  state.senseSize = senseSize
  state.cdbSize = cdbSize
  state.missed = missed
  for (const { unit, writeback, stopped, attentions } of known) {
    unit.writeback = writeback
    unit.stopped = stopped
    unit.attentions = attentions & ALL_ATTENTIONS
  }
}

/** What a driver may write to `sense_size`: sense data has at most 252 bytes (SPC-4 §4.5.1). */
export function isSenseSize(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) <= 252
}

/** … and to `cdb_size`: a CDB has at most 260 bytes (SPC-4 §4.2.3); all that are known have room in 16. */
export function isCdbSize(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 16 && (value as number) <= 260
}
