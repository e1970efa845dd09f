/** The control queue of a card on a switch: what it commands takes effect on the switch, at once. */
import type { QueueContext } from '../../src/device/index.ts'
import { ControlQueue } from './control-queue.ts'
import type { NetReport, SwitchPlace } from './shared.ts'
import { Switch, type SwitchPort } from './switch.ts'

export class SwitchControl extends ControlQueue {
  readonly #hub: Switch
  readonly #port: SwitchPort
  readonly #context: QueueContext

  constructor(context: QueueContext, place: SwitchPlace, pairs: number) {
    super(context, pairs, (report) => this.#apply(report))
    const { hub, port } = Switch.join(context, place, 1)
    this.#hub = hub
    this.#port = port
    this.#context = context
  }

  close(): void {
    this.#hub.leave(this.#port)
  }

  #apply(report: NetReport): void {
    if (report.kind === 'pairs') this.#port.pairs = report.pairs
    else if (report.kind === 'offloads') {
      for (const receiver of this.#port.receivers) receiver?.setOffloads(report.features)
    } else this.#context.report(report)
  }
}
