/** The metrics of an async device: the values behind {@link DeviceContext.metric}. */
import type { Metric } from './define.ts'
import type { DeviceMetric, DeviceSample } from './index.ts'

type Labels = Readonly<Record<string, string | number>>

/** One combination of labels. */
class Value implements Metric {
  readonly #metric: DeviceMetric
  readonly #labels: Labels
  #value = 0

  constructor(metric: DeviceMetric, labels: Labels) {
    this.#metric = metric
    this.#labels = labels
  }

  get value(): number {
    return this.#value
  }

  add(amount = 1): void {
    this.set(this.#value + amount)
  }

  set(value: number): void {
    const { name, type } = this.#metric
    if (!Number.isFinite(value)) throw new RangeError(`metric ${name}: ${String(value)} is not a finite number`)
    if (type === 'counter' && value < this.#value)
      throw new RangeError(`metric ${name}: a counter cannot go from ${this.#value} to ${value}, make it a gauge`)
    this.#value = value
  }

  sample(): DeviceSample {
    return { metric: this.#metric.name, labels: this.#labels, value: this.#value }
  }
}

export class AsyncMetrics {
  readonly #metrics: ReadonlyMap<string, DeviceMetric>
  /** By name and labels, in the order in which they were first asked for. */
  readonly #values = new Map<string, Value>()

  constructor(metrics: readonly DeviceMetric[]) {
    this.#metrics = new Map(metrics.map((metric) => [metric.name, metric]))
    // What has no labels is there from the start, as 0: a counter that appears at its first event hides that event.
    for (const { name, labels } of metrics) if (labels.length === 0) this.metric(name, {})
  }

  /** @throws TypeError when there is no such metric, or it has other labels */
  metric(name: string, labels: Labels): Metric {
    const metric = this.#metrics.get(name)
    if (metric === undefined) {
      const known = [...this.#metrics.keys()].join(', ') || 'none'
      throw new TypeError(`metric: there is no '${name}' in the device's metrics: ${known}`)
    }
    const given = Object.keys(labels)
    if (given.length !== metric.labels.length || !metric.labels.every((label) => Object.hasOwn(labels, label))) {
      const list = (names: readonly string[]): string => (names.length === 0 ? 'no labels' : names.join(', '))
      throw new TypeError(`metric ${name} has ${list(metric.labels)}; given: ${list(given)}`)
    }
    const values = metric.labels.map((label) => String(labels[label]))
    const key = JSON.stringify([name, ...values])
    let value = this.#values.get(key)
    if (value === undefined) {
      value = new Value(metric, Object.fromEntries(metric.labels.map((label, i) => [label, values[i]!])))
      this.#values.set(key, value)
    }
    return value
  }

  samples(): DeviceSample[] {
    return [...this.#values.values()].map((value) => value.sample())
  }
}
