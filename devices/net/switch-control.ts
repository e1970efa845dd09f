/** The control queue of a card on a switch: what it commands takes effect on the switch, at once. */
import type { QueueContext } from '../../src/device/index.ts'
import { ControlQueue } from './control-queue.ts'
import type { NetReport, SwitchPlace } from './shared.ts'
import { Switch, type SwitchPort } from './switch.ts'

export class SwitchControl extends ControlQueue {
  readonly #hub: Switch
  readonly #port: SwitchPort

  /** @param used pairs that the driver receives on already */
  constructor(context: QueueContext, place: SwitchPlace, pairs: number, used: number) {
    super(context, pairs)
    const { hub, port } = Switch.join(context, place, used)
    this.#hub = hub
    this.#port = port
  }

  close(): void {
    this.#hub.leave(this.#port)
  }

  /** The control half keeps it, for when the rings start again. */
  protected override apply(report: NetReport): boolean {
    this.context.report(report)
    const port = this.#port
    if (report.kind === 'pairs') {
      port.pairs = report.pairs
      for (const [pair, receiver] of port.receivers.entries()) if (pair >= report.pairs) receiver?.giveUp()
    } else if (report.kind === 'offloads') {
      for (const receiver of port.receivers) receiver?.setOffloads(report.features)
    }
    return true
  }
}
