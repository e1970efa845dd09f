/** The entry of an iothread's worker. */
import { type MessagePort, workerData } from 'node:worker_threads'
import { Iothread } from './iothread.ts'
import type { IothreadOptions } from './messages.ts'

const { port, options } = workerData as { port: MessagePort; options: IothreadOptions }
await new Iothread(port, options).run()
