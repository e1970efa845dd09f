/**
 * What `virtiod new` writes: a device that a stock QEMU attaches, its tests, and what npm and TypeScript need. Text only; a
 * test generates it, compiles it and runs it.
 */

export interface NewDevice {
  /** Of the package: lower-case letters, digits and single dashes. */
  readonly name: string
  /** What package.json says for virtiod: a range of versions, or `file:` and a path. */
  readonly virtiod: string
}

/** File names → contents. */
export function newFiles({ name, virtiod }: NewDevice): Readonly<Record<string, string>> {
  // What metrics and the configuration call it: no dashes there.
  const device = name.replaceAll('-', '')
  return {
    'package.json': `${JSON.stringify(packageJson(name, virtiod), null, 2)}\n`,
    'tsconfig.json': `${JSON.stringify(tsconfig, null, 2)}\n`,
    '.gitignore': 'node_modules/\n*.sock\n',
    'device.ts': deviceTs(name, device),
    'device.test.ts': testTs(device),
    'README.md': readme(name, device),
  }
}

function packageJson(name: string, virtiod: string): object {
  return {
    name,
    version: '0.1.0',
    private: true,
    type: 'module',
    engines: { node: '>=24.16' },
    scripts: {
      start: `virtiod device ./device.ts --socket-path ${name}.sock --watch`,
      test: 'node --test',
      check: 'tsc',
      'guest-kernel': 'node -e "import(\'virtiod/testing\').then((it) => it.fetchGuestKernel(console.log))"',
    },
    dependencies: { valibot: '^1.5.0', virtiod },
    devDependencies: { '@types/node': '>=24', typescript: '>=5.9' },
  }
}

const tsconfig = {
  compilerOptions: {
    target: 'es2024',
    lib: ['esnext'],
    types: ['node'],
    module: 'nodenext',
    noEmit: true,
    strict: true,
    noUncheckedIndexedAccess: true,
    erasableSyntaxOnly: true,
    verbatimModuleSyntax: true,
    allowImportingTsExtensions: true,
    skipLibCheck: true,
  },
  include: ['*.ts'],
}

function deviceTs(name: string, device: string): string {
  return `/**
 * ${name}: an entropy source that throws dice. A guest's kernel takes it for a hardware random number generator:
 *
 *   virtiod device ./device.ts --socket-path ${name}.sock --option sides=20 --watch
 *   dd if=/dev/hwrng bs=16 count=1 | od -An -tu1                                      (in the guest)
 */
import * as v from 'valibot'
import { defineDevice } from 'virtiod/device'

/** What \`saveState\` returned, of this or another version of this file. */
const state = v.object({ thrown: v.number() })

export default defineDevice({
  apiVersion: 1,
  name: '${device}',
  // Says which driver the guest loads: 4 is an entropy source (virtio 1.3 §5.4), with one queue.
  virtioId: 4,
  queues: [{ name: 'requests' }],
  options: v.strictObject({
    sides: v.optional(
      v.pipe(v.number(), v.integer(), v.minValue(2), v.maxValue(255), v.description('How many sides a die has')),
      6
    ),
  }),
  metrics: [{ name: 'thrown_total', type: 'counter', labels: [], help: 'Dice thrown' }],
  qemu: { driver: 'vhost-user-rng-pci', properties: {} },

  create({ options, log, metric }) {
    const thrown = metric('thrown_total')
    return {
      // A chain is a request: what the driver wants us to read, and room for the answer. It goes back to the driver when
      // this promise resolves, with what was written by then.
      async handle(chain) {
        const { writer } = chain
        while (writer.remaining > 0) writer.u8(1 + Math.floor(Math.random() * options.sides))
        chain.operation('request', writer.written)
        thrown.add(writer.written)
      },
      // For --watch, migration and handover: the counter goes on.
      saveState: () => ({ thrown: thrown.value }),
      loadState(saved) {
        thrown.set(v.parse(state, saved).thrown)
      },
      close: () => log.info({ thrown: thrown.value }, 'no more dice'),
    }
  },
})
`
}

function testTs(device: string): string {
  return `/** npm test: the device alone, behind a socket, and in a Linux guest. */
import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { connect, missingPrerequisites, runGuest, startVirtiod, testDevice, vhostUserArgs } from 'virtiod/testing'
import device from './device.ts'

const REQUESTS = 0

function areDice(bytes: Uint8Array, sides: number): boolean {
  return bytes.length > 0 && bytes.every((byte) => byte >= 1 && byte <= sides)
}

test('throws dice of six sides, or as many as it is told', async () => {
  await using six = await testDevice(device)
  const { bytes, written } = await six.request(REQUESTS, [], 64)
  assert.equal(written, 64)
  assert.ok(areDice(bytes, 6))
  await using two = await testDevice(device, { options: { sides: 2 } })
  assert.ok(areDice((await two.request(REQUESTS, [], 64)).bytes, 2))
  await assert.rejects(testDevice(device, { options: { sides: 1 } }), /--sides/)
})

test('counts them, and goes on counting after a reload', async () => {
  await using before = await testDevice(device)
  await before.request(REQUESTS, [], 10)
  await using after = await testDevice(device)
  await after.loadState(await before.saveState())
  await after.request(REQUESTS, [], 5)
  assert.deepEqual(after.metrics(), { thrown_total: 15 })
})

const directory = mkdtempSync(join(tmpdir(), '${device}-'))
const socketPath = join(directory, 'socket')
let daemon: Awaited<ReturnType<typeof startVirtiod>>
before(async () => {
  const module = join(import.meta.dirname, 'device.ts')
  daemon = await startVirtiod(['device', module, '--socket-path', socketPath, '--option', 'sides=20'])
})
after(async () => {
  await daemon?.stop()
  rmSync(directory, { recursive: true, force: true })
})

test('does so behind a socket, many requests at once', () => {
  using front = connect(socketPath)
  const requests = Array.from({ length: 100 }, () => front.submit(REQUESTS, [], 16))
  front.wait()
  for (const { reply } of requests) assert.ok(reply !== undefined && areDice(reply.bytes, 20))
})

// "npm run guest-kernel" downloads the kernel, once.
test('is the guest’s random number generator', { skip: missingPrerequisites().join(', ') || false }, async () => {
  const { output, exitCode } = await runGuest({
    qemuArgs: vhostUserArgs(socketPath, 'vhost-user-rng-pci'),
    modules: ['virtio_rng'],
    script: 'dd if=/dev/hwrng bs=16 count=1 2> /dev/null | od -An -tu1',
  })
  assert.equal(exitCode, 0)
  const dice = output.trim().split(/\\s+/).map(Number)
  assert.equal(dice.length, 16)
  assert.ok(areDice(Uint8Array.from(dice), 20))
})
`
}

function readme(name: string, device: string): string {
  return `# ${name}

A virtio device for [virtiod](https://www.npmjs.com/package/virtiod): an entropy source that throws dice.

| | |
| --- | --- |
| \`npm test\` | the device alone, behind a socket, and in a Linux guest (when QEMU is there, and \`npm run guest-kernel\` was run once) |
| \`npm run check\` | TypeScript |
| \`npm start\` | serves it on \`${name}.sock\`; the module is reloaded when you save it |

QEMU attaches it with

\`\`\`sh
qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem \\
  -chardev socket,id=${device},path=${name}.sock -device vhost-user-rng-pci,chardev=${device} …
\`\`\`

and in the guest \`dd if=/dev/hwrng bs=16 count=1 | od -An -tu1\` shows dice.

\`device.ts\` is the whole device. Another kind of device is another \`virtioId\`, other queues and another driver in the
guest; virtiod's \`devices/README.md\` tells which.
`
}
