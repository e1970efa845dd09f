/**
 * A simulated device with state: a thermometer with a heater. The guest sees them as files, as Linux' sysfs shows
 * sensors: it is a virtio-fs device (virtio 1.3 §5.11), whose requests are those of FUSE. In between is physics, run by
 * a timer.
 *
 *   virtiod device ./thermometer.ts --socket-path thermo.sock --watch
 *   mount -t virtiofs thermo /mnt                           in the guest
 *   cat /mnt/temperature                                    in thousandths of a degree Celsius
 *   echo 1 > /mnt/heater                                    it gets warmer
 *
 * Change the physics below while the guest looks on: temperature and heater stay what they are. A sensor of your own is
 * one more entry of `files`.
 */
import * as v from 'valibot'
import { ChainError, type ChainReader, defineDevice } from 'virtiod/device'

/** Milliseconds between two steps of the physics. */
const INTERVAL = 100

const state = v.strictObject({ temperature: v.pipe(v.number(), v.finite()), heater: v.boolean() })

const number = (description: string, min: number, max: number, fallback: number) =>
  v.optional(v.pipe(v.number(), v.minValue(min), v.maxValue(max), v.description(description)), fallback)

interface SensorFile {
  readonly name: string
  read(): string
  /** Returns false when that can't be written. Without it the file is read-only. */
  write?(text: string): boolean
}

export default defineDevice({
  apiVersion: 1,
  name: 'thermometer',
  virtioId: 26,
  options: v.strictObject({
    ambient: number('Degrees around it; where it begins', -100, 1000, 20),
    heater: number('Degrees that the heater adds in the end', 0, 1000, 60),
    'time-constant': number('Seconds to 63 % of the way to where it ends', 1, 100_000, 30),
  }),
  queues: [{ name: 'hiprio' }, { name: 'requests' }],
  metrics: [
    { name: 'temperature_celsius', type: 'gauge', labels: [], help: 'The temperature' },
    { name: 'heater_on', type: 'gauge', labels: [], help: '1 while the heater is on' },
  ],
  qemu: { driver: 'vhost-user-fs-pci', properties: { tag: 'thermo' } },

  create(context) {
    const { options } = context
    let temperature = options.ambient
    let heater = false

    const timer = setInterval(() => {
      const goal = options.ambient + (heater ? options.heater : 0)
      temperature += (goal - temperature) * (INTERVAL / 1000 / options['time-constant'])
      context.metric('temperature_celsius').set(temperature)
      context.metric('heater_on').set(heater ? 1 : 0)
    }, INTERVAL)

    const files: SensorFile[] = [
      { name: 'temperature', read: () => `${Math.round(temperature * 1000)}\n` },
      {
        name: 'heater',
        read: () => `${heater ? 1 : 0}\n`,
        write(text) {
          if (!/^[01]\n?$/.test(text)) return false
          heater = text.startsWith('1')
          return true
        },
      },
    ]

    return {
      handle(chain) {
        const { reader, writer } = chain
        // struct fuse_in_header: len, opcode, unique, nodeid, and whose request it is.
        const opcode = reader.skip(4).u32()
        const unique = reader.u64()
        const node = reader.u64()
        if (opcode === FORGET || opcode === BATCH_FORGET) return
        const answer = answerTo(files, opcode, Number(node), reader.skip(16))
        const [error, body] = typeof answer === 'number' ? [answer, struct()] : [0, answer]
        // The guest's fault, not this device's: it breaks the ring, and the session goes on.
        if (writer.length < 16 + body.length) throw new ChainError(`an answer has ${16 + body.length} bytes`)
        writer
          .u32(16 + body.length)
          .u32(-error >>> 0)
          .u64(unique)
          .bytes(body)
      },
      /** Nobody is there to switch it off. */
      reset() {
        heater = false
      },
      saveState: () => ({ temperature, heater }),
      loadState(saved) {
        ;({ temperature, heater } = v.parse(state, saved))
      },
      close: () => clearInterval(timer),
    }
  },
})

// FUSE (linux: include/uapi/linux/fuse.h), as far as a directory of small files needs it. Node 1 is the directory, 2
// the first file. What a request says is read by `reader`, which breaks the ring when it is too short.

const [LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS] = [1, 2, 3, 4, 14, 15, 16, 17]
const [RELEASE, INIT, OPENDIR, READDIR, RELEASEDIR, DESTROY, BATCH_FORGET] = [18, 26, 27, 28, 29, 38, 42]
const [ENOENT, EACCES, EINVAL, ENOSYS] = [2, 13, 22, 38]
const ROOT = 1
const O_ACCMODE = 3
/** Each read and write comes here, instead of the guest's page cache. */
const FOPEN_DIRECT_IO = 1
const MAX_WRITE = 4096

/** Returns the answer's body, or an errno. @param reader is behind the request's header */
function answerTo(files: readonly SensorFile[], opcode: number, node: number, reader: ChainReader): Buffer | number {
  const file = files[node - ROOT - 1]
  if (node !== ROOT && file === undefined && opcode !== INIT) return ENOENT
  switch (opcode) {
    case INIT:
      return struct([4, 7], [4, 31], [8, 0], [4, 0], [4, MAX_WRITE], [4, 1], [8, 0], [8, 0], [8, 0], [8, 0], [4, 0])
    case LOOKUP: {
      const name = Buffer.from(reader.bytes(Math.min(reader.remaining, 256)))
        .toString('latin1')
        .split('\0')[0]
      const index = files.findIndex((it) => it.name === name)
      if (node !== ROOT || index < 0) return ENOENT
      const found = ROOT + 1 + index
      return Buffer.concat([struct([8, found], [8, 0], [8, 0], [8, 0], [8, 0]), attributes(found, files[index])])
    }
    case GETATTR:
    case SETATTR:
      return Buffer.concat([struct([8, 0], [8, 0]), attributes(node, file)])
    case OPEN:
      if (file?.write === undefined && (reader.u32() & O_ACCMODE) !== 0) return EACCES
      return struct([8, 0], [4, FOPEN_DIRECT_IO], [4, 0])
    case OPENDIR:
      return struct([8, 0], [8, 0])
    case READ: {
      const offset = Number(reader.skip(8).u64())
      const size = reader.u32()
      return Buffer.from(file?.read() ?? '').subarray(offset, offset + size)
    }
    case WRITE: {
      const data = reader.skip(40).bytes(Math.min(reader.remaining, MAX_WRITE))
      return file?.write?.(Buffer.from(data).toString('latin1')) ? struct([4, data.length], [4, 0]) : EINVAL
    }
    case READDIR: {
      const offset = Number(reader.skip(8).u64())
      const size = reader.u32()
      let entries = struct()
      for (const [i, { name }] of files.entries()) {
        if (i < offset) continue
        const entry = struct([8, ROOT + 1 + i], [8, i + 1], [4, name.length], [4, 8])
        const next = Buffer.concat([entries, entry, Buffer.from(name), Buffer.alloc(-name.length & 7)])
        if (next.length > size) break
        entries = next
      }
      return entries
    }
    case STATFS:
      return Buffer.alloc(80)
    case RELEASE:
    case RELEASEDIR:
    case DESTROY:
      return struct()
    default:
      return ENOSYS
  }
}

/** struct fuse_attr. As in sysfs, all files have one page. */
function attributes(node: number, file: SensorFile | undefined): Buffer {
  const mode = file === undefined ? 0o040755 : file.write === undefined ? 0o100444 : 0o100644
  const size = file === undefined ? 0 : 4096
  const start = struct([8, node], [8, size], [8, 0], [8, 0], [8, 0], [8, 0], [4, 0], [4, 0], [4, 0])
  return Buffer.concat([start, struct([4, mode], [4, 1], [8, 0], [4, 0], [4, 4096], [4, 0])])
}

/** Little-endian numbers of 4 or 8 bytes, one behind the other. */
function struct(...fields: (readonly [bytes: 4 | 8, value: number])[]): Buffer<ArrayBuffer> {
  const bytes = Buffer.alloc(fields.reduce((sum, [size]) => sum + size, 0))
  let at = 0
  for (const [size, value] of fields) {
    bytes.writeUIntLE(value, at, 4)
    at += size
  }
  return bytes
}
