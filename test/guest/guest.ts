/**
 * Guests for our own tests: what `virtiod/testing` has, with the disk's tools and modules unless a test asks for others.
 */

import type { Guest, GuestOptions, GuestResult } from '../../src/testing/guest.ts'
import * as testing from '../../src/testing/guest.ts'

export { Guest, GuestError, type GuestOptions, type GuestResult, startFirmware } from '../../src/testing/guest.ts'
export { spawnTied } from '../../src/testing/tied.ts'

/** Boots a guest, runs the script, waits until it has powered off. */
export function runGuest(options: GuestOptions & { readonly script: string }): Promise<GuestResult> {
  return testing.runGuest({ kind: 'disk', ...options })
}

/** Boots a guest and returns when its script begins (or when it takes commands). */
export function startGuest(options: GuestOptions): Promise<Guest> {
  return testing.startGuest({ kind: 'disk', ...options })
}
