/**
 * The transcripts of examples/devices/README.md, so that what a user reads there is what a test has typed. Owns their
 * language: `$` is a command of the host, `#` one of the guest, everything else is output, in which `…` stands for
 * anything. Each section has a directory of its own, with a copy of its module.
 */
import { execFileSync } from 'node:child_process'
import { copyFileSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type Guest, type GuestOptions, startGuest, startVirtiod, type VirtiodProcess } from 'virtiod/testing'
import { expect } from 'vitest'

const examples = fileURLToPath(new URL('../../../examples/devices/', import.meta.url))

export interface Step {
  readonly where: 'host' | 'guest'
  readonly command: string
  /** What the transcript shows below it. */
  readonly output: string
}

/** The steps of the section about this file. */
export function transcript(file: string): Step[] {
  const text = readFileSync(join(examples, 'README.md'), 'utf8')
  const section = text.split(/^## /m).find((part) => part.startsWith(`${file}\n`)) ?? ''
  const lines = [...section.matchAll(/^```console\n([\s\S]*?)^```$/gm)].flatMap((match) =>
    match[1]!.trimEnd().split('\n')
  )
  const steps: { where: 'host' | 'guest'; command: string; output: string[] }[] = []
  for (const line of lines) {
    if (line.startsWith('$ ')) steps.push({ where: 'host', command: line.slice(2), output: [] })
    else if (line.startsWith('# ')) steps.push({ where: 'guest', command: line.slice(2), output: [] })
    else steps.at(-1)!.output.push(line)
  }
  return steps.map((step) => ({ ...step, output: step.output.join('\n') }))
}

/** A section that is being played. */
export class Stage implements AsyncDisposable {
  readonly directory = mkdtempSync(join(tmpdir(), 'virtiod-example-'))
  readonly daemons: VirtiodProcess[] = []
  readonly #guestOptions: Omit<GuestOptions, 'qemuArgs'>
  #guest: Guest | undefined

  constructor(file: string, guestOptions: Omit<GuestOptions, 'qemuArgs'>) {
    copyFileSync(join(examples, file), join(this.directory, file))
    this.#guestOptions = guestOptions
  }

  get guest(): Guest {
    if (this.#guest === undefined) throw new Error('the transcript has not started a guest')
    return this.#guest
  }

  async play(steps: readonly Step[]): Promise<void> {
    for (const step of steps) {
      const output = step.where === 'host' ? await this.#host(step.command) : await this.#inGuest(step.command)
      expect(`${step.command}\n${output}`.trimEnd()).toMatch(pattern(`${step.command}\n${step.output}`))
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#guest?.kill()
    for (const daemon of this.daemons) await daemon.stop('SIGKILL')
    rmSync(this.directory, { recursive: true, force: true })
  }

  async #host(command: string): Promise<string> {
    if (command.startsWith('QEMU ')) {
      // QEMU 7.2 without KVM crashes when a vhost-user card or file system uses MSI-X: README.md, in `vectors=0`.
      const line = command
        .replaceAll(/\bpath=/g, `path=${this.directory}/`)
        .replaceAll(/(virtio-net|vhost-user-fs)-pci,/g, '$1-pci,vectors=0,')
      const words = line.split(' ').slice(1)
      this.#guest = await startGuest({ ...this.#guestOptions, qemuArgs: words })
    } else if (/^virtiod .* &$/.test(command)) {
      // An absolute path: another test's daemon listens on the same relative one.
      const line = command.replace('--socket-path ', `--socket-path ${this.directory}/`)
      this.daemons.push(await startVirtiod(line.split(' ').slice(1, -1), { cwd: this.directory }))
    } else if (command === 'kill -9 %1') await this.daemons[0]?.stop('SIGKILL')
    else return execFileSync('sh', ['-c', command], { cwd: this.directory, encoding: 'utf8' })
    return ''
  }

  async #inGuest(command: string): Promise<string> {
    // Tools of the host are called there by their paths, and name themselves so.
    return (await this.guest.run(command)).output.replaceAll(/^\/bin\//gm, '')
  }
}

function pattern(text: string): RegExp {
  const escaped = text.trimEnd().replaceAll(/[.*+?^${}()|[\]\\]/g, '\\$&')
  // A line of nothing else may stand for no line at all.
  return new RegExp(`^${escaped.replaceAll(/\n…(?=\n|$)/g, '(?:\\n[^]*?)?').replaceAll('…', '[^]*?')}$`)
}
