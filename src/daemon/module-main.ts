/** The entry of a thread that a device module has for itself. */
import { type MessagePort, workerData } from 'node:worker_threads'
import { Iothread } from '../engine/iothread.ts'
import type { IothreadOptions } from '../engine/messages.ts'
import { type FailedModule, ModuleGuest } from './module-guest.ts'
import { installModuleHooks } from './module-hooks.ts'
import { type LoadedModule, loadModule } from './module-load.ts'
import type { ModuleThreadData } from './module-messages.ts'

interface Data {
  readonly port: MessagePort
  readonly options: IothreadOptions
  readonly guest: ModuleThreadData
}

const { port, options, guest } = workerData as Data
// Whether the thread may sleep in the kernel is the module's to say. That it can't be loaded is told who asks first.
const files = installModuleHooks(guest.address.specifier, guest.address.base)
const loaded: LoadedModule | FailedModule = await loadModule(guest.address, files).catch((error: unknown) => ({
  error,
  files,
}))
const eventLoop = 'error' in loaded || loaded.definition.eventLoop === true
await new Iothread(port, { ...options, eventLoop }, (thread) => new ModuleGuest(thread, loaded)).run()
