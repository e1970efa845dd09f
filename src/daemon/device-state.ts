/** The state of a device that may have none: `Device.saveState` and `loadState` go together or are both missing. */
import type { Device } from '../device/index.ts'

/** Empty: there is none. */
export function saveStateOf(device: Device): Uint8Array | Promise<Uint8Array> {
  return device.saveState?.() ?? new Uint8Array(0)
}

/** @throws an Error when the state is none of this device's */
export function loadStateOf(device: Device, state: Uint8Array): void | Promise<void> {
  if (device.loadState !== undefined) return device.loadState(state)
  if (state.length > 0) throw new Error(`${state.length} bytes of state for a device that has none`)
}
