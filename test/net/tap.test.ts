/** The control half of the network card on real taps, good ones and bad ones: tap-scenarios.ts, each in its own namespace. */
import { describe, expect, test } from 'vitest'
import { runInNamespace, whyNoNamespace } from '../native/network.ts'
import { scenarios } from './tap-scenarios.ts'

const module = JSON.stringify(new URL('./tap-scenarios.ts', import.meta.url).href)

/** Somebody without a name, without groups, without capabilities. */
const NOBODY = 65534
const DROP = `exec setpriv --reuid=${NOBODY} --regid=${NOBODY} --clear-groups --inh-caps=-all --bounding-set=-all "$@"`

// Another user is to be had by root only.
const isRoot = process.getuid?.() === 0

describe.skipIf(whyNoNamespace() !== undefined)('taps', () => {
  for (const [name, { setup = '', nobody = false }] of Object.entries(scenarios)) {
    test.skipIf(nobody && !isRoot)(name, () => {
      const source = `const { scenarios } = await import(${module}); await scenarios[${JSON.stringify(name)}].run()`
      // sysfs of this namespace.
      const script = ['mount -t sysfs sysfs /sys', `NOBODY=${NOBODY}`, setup, nobody ? DROP : 'exec "$@"'].filter(
        Boolean
      )
      const { status, signal, stderr } = runInNamespace(source, script.join('\n'))
      expect({ status, signal, stderr }).toEqual({ status: 0, signal: null, stderr: '' })
    })
  }
})
