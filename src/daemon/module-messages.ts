/** What the control thread and the threads of a device module say to one another, as guests of an iothread. */
import type { DeviceLogger, DeviceSample, InheritedFiles, QemuDevice } from '../device/index.ts'
import type { ModuleAddress } from './module-load.ts'
import type { GivenOptions } from './module-options.ts'
import type { ModuleShape, OpenShape } from './module-shape.ts'

/** What a thread is started with. */
export interface ModuleThreadData {
  readonly address: ModuleAddress
}

export type ModuleCall =
  /** Answers a {@link Described}; rejects with what kept the module from being loaded. Options are checked. */
  | { readonly kind: 'describe'; readonly given: GivenOptions }
  /** Answers an {@link Opened}. `observer`: it only looks (observer.ts). */
  | {
      readonly kind: 'open'
      readonly name: string
      readonly observer: boolean
      readonly inherited: readonly (readonly [key: string, files: InheritedFiles])[]
    }
  /** The others are methods of `Device`, and answered by an {@link Answer}. */
  | { readonly kind: 'writeConfig'; readonly offset: number; readonly bytes: Uint8Array }
  | { readonly kind: 'negotiated'; readonly features: bigint }
  | { readonly kind: 'reset' | 'letGo' | 'takeBack' | 'takeOver' | 'saveState' | 'refresh' | 'close' }
  | { readonly kind: 'loadState'; readonly state: Uint8Array }
  | { readonly kind: 'ringActive'; readonly index: number; readonly active: boolean }
  | { readonly kind: 'reported'; readonly index: number; readonly message: unknown }
  | { readonly kind: 'setMtu'; readonly mtu: number }
  | { readonly kind: 'announce'; readonly mac: Uint8Array }
  /** Answered by `DeviceSample`s, not by an {@link Answer}. */
  | { readonly kind: 'samples' }
  /** Not answered by anything: aborts `DeviceHost.signal`. */
  | { readonly kind: 'abort' }

export interface Described {
  readonly shape: ModuleShape
  /** `GivenOptions.values`, converted. */
  readonly values: Readonly<Record<string, unknown>>
  /** As `DeviceDefinition.qemu` tells it. */
  readonly qemu?: QemuDevice
}

/** What `Device` shows without being asked, after each call: the control thread's copy of it. */
export interface Mirror {
  readonly config: Uint8Array
  readonly queueData: unknown
}

export interface Opened extends Mirror {
  readonly shape: OpenShape
  readonly network: boolean
  readonly qemu?: QemuDevice
}

export interface Answer extends Mirror {
  /** What the method returned. */
  readonly value: unknown
}

export type Samples = readonly DeviceSample[]

/** What a module's thread says by itself: what a device may ask of its `DeviceHost`. */
export type ModuleReport =
  /** Before `describe` is answered, also when the module can't be loaded: URLs of the files of its own that it consists of. */
  | { readonly kind: 'imported'; readonly files: readonly string[] }
  /** Its code threw where nobody catches: the thread ends, unless the module listens for that itself. */
  | { readonly kind: 'uncaught'; readonly origin: NodeJS.UncaughtExceptionOrigin }
  | { readonly kind: 'log'; readonly level: keyof DeviceLogger; readonly details: object; readonly message: string }
  | { readonly kind: 'send'; readonly index: number; readonly message: unknown }
  /** The config space changed by itself. */
  | ({ readonly kind: 'configChanged' } & Mirror)
  | { readonly kind: 'keep'; readonly key: string; readonly fds: readonly number[]; readonly facts: unknown }
  | { readonly kind: 'forget' | 'took'; readonly key: string }
