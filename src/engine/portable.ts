/**
 * Errors on their way between threads. A structured clone of an Error is its message and its stack; what tells who is
 * at fault, the class and the `code`, is lost. So they travel as plain data and become errors of the same class again.
 */
import { inspect } from 'node:util'
import { ChainError, ConfigError, DeviceError } from '../device/errors.ts'
import { RingError } from '../virtio/errors.ts'

/** An error as data that a message can carry. */
export interface PortableError {
  readonly name: string
  readonly message: string
  readonly stack: string
  /** Its own enumerable properties that are primitive: `code`, `errno`, `option`. */
  readonly properties: Readonly<Record<string, Primitive>>
  readonly cause?: PortableError
}

type Primitive = string | number | bigint | boolean

/** Errors caused by errors caused by errors: that deep, since a chain may close. */
const DEPTH = 8

/** The classes that a control thread tells apart. */
const CLASSES: Readonly<Record<string, { readonly prototype: Error }>> = {
  ChainError,
  ConfigError,
  DeviceError,
  RingError,
}

/** Whatever was thrown, as data. Never throws, though what it looks at may. */
export function portable(error: unknown): PortableError {
  try {
    return describe(error, DEPTH)
  } catch {
    return plain('an error was thrown that cannot be looked at')
  }
}

/** The error that `portable` described, as near to it as this thread can have it. */
export function revived({ name, message, stack, properties, cause }: PortableError): Error {
  const error = new Error(message, cause && { cause: revived(cause) })
  const known = Object.hasOwn(CLASSES, name) ? CLASSES[name] : undefined
  if (known !== undefined) Object.setPrototypeOf(error, known.prototype)
  for (const [key, value] of Object.entries({ ...properties, name, stack }))
    Object.defineProperty(error, key, { value, enumerable: key in properties, writable: true, configurable: true })
  return error
}

function describe(error: unknown, depth: number): PortableError {
  if (!(error instanceof Error)) return plain(`not an Error was thrown: ${inspect(error)}`)
  const properties: Record<string, Primitive> = {}
  for (const [key, value] of Object.entries(error))
    if (isPrimitive(value) && key !== 'message' && key !== 'stack') properties[key] = value
  const { name, message, stack, cause } = error
  return {
    name: String(name),
    message: String(message),
    stack: String(stack),
    properties,
    ...(cause !== undefined && depth > 0 && { cause: describe(cause, depth - 1) }),
  }
}

function plain(message: string): PortableError {
  const { name, stack = '' } = new Error(message)
  return { name, message, stack, properties: {} }
}

function isPrimitive(value: unknown): value is Primitive {
  return ['string', 'number', 'bigint', 'boolean'].includes(typeof value)
}
