/** Plays what a fuzzer has found and written to a file. The name says which fuzzer it was. */
import { basename } from 'node:path'
import { replay } from './protocol.ts'
import { runProgram } from './pure.ts'
import { type RingGame, replayGames } from './rings.ts'
import type { Scenario } from './scenario.ts'

/** @returns what went wrong, undefined = nothing */
export async function play(path: string, content: string): Promise<Error | undefined> {
  const [kind] = basename(path).split('-')
  switch (kind) {
    case 'protocol':
      return replay(JSON.parse(content) as Scenario[])
    case 'ring':
      return replayGames(JSON.parse(content) as RingGame[])
    case 'pure':
      try {
        runProgram(Buffer.from(content.trim(), 'hex'))
        return undefined
      } catch (error) {
        return error as Error
      }
    default:
      throw new TypeError(`${path}: its name begins neither with protocol- nor with ring- nor with pure-`)
  }
}
