/**
 * A process that dies between two stores, without a process: inside `trapped`, new typed arrays over a watched buffer
 * are proxies that count the stores of single elements, and throw `Killed` in place of the one that was never reached.
 * What the buffers have then is what `kill -9` at that point leaves. (Bulk operations such as `fill` are not counted.)
 */

export class Killed extends Error {}

const NAMES = ['Uint8Array', 'Uint16Array', 'Uint32Array', 'Int32Array', 'Float64Array'] as const

export class StoreTrap {
  /** Stores that are still done. */
  left = Number.POSITIVE_INFINITY
  /** Stores that were done. */
  done = 0
  readonly #buffers: ReadonlySet<unknown>
  /** By proxy. */
  readonly #views = new WeakMap<object, object>()

  constructor(...buffers: ArrayBufferLike[]) {
    this.#buffers = new Set(buffers)
  }

  /** A store that the test does itself, as one of the process. */
  store(): void {
    if (this.left <= 0) throw new Killed('killed')
    this.left--
    this.done++
  }

  /** Runs `work`, whose new views of the buffers are watched from then on. Those take `Atomics` only in here. */
  trapped<T>(work: () => T): T {
    const globals = globalThis as unknown as Record<string, unknown>
    const originals = NAMES.map((name) => globals[name])
    NAMES.forEach((name, i) => {
      globals[name] = this.#constructorFor(originals[i] as new (...args: unknown[]) => object)
    })
    const atomics = globals['Atomics']
    globals['Atomics'] = this.#atomics()
    try {
      return work()
    } finally {
      globals['Atomics'] = atomics
      NAMES.forEach((name, i) => {
        globals[name] = originals[i]
      })
    }
  }

  #atomics(): object {
    const { load, store } = Atomics
    const real = (view: object) => (this.#views.get(view) ?? view) as Int32Array
    return {
      load: (view: object, index: number) => load(real(view), index),
      store: (view: object, index: number, value: number) => {
        if (this.#views.has(view)) this.store()
        return store(real(view), index, value)
      },
    }
  }

  #constructorFor(original: new (...args: unknown[]) => object): object {
    return new Proxy(original, {
      construct: (target, args) => {
        const view = new target(...args)
        return this.#buffers.has(args[0]) ? this.#watch(view) : view
      },
    })
  }

  #watch(view: object): object {
    const proxy = new Proxy(view, {
      get: (target, key) => {
        const value = Reflect.get(target, key, target)
        return typeof value === 'function' ? value.bind(target) : value
      },
      set: (target, key, value) => {
        this.store()
        return Reflect.set(target, key, value, target)
      },
    })
    this.#views.set(proxy, view)
    return proxy
  }
}

/** mulberry32 */
export function random(seed: number): (below: number) => number {
  let state = seed
  return (below) => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return Math.floor((((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * below)
  }
}
