/**
 * `node --import`ed into virtiod: puts the faults of one set of conformance-mutants.ts into the sources as they are
 * loaded, in the main thread and in its workers. MUTANTS names the set.
 */
import { registerHooks } from 'node:module'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { MUTANTS } from './conformance-mutants.ts'

const root = join(import.meta.dirname, '../..')
const set = process.env['MUTANTS']
const byUrl = Map.groupBy(
  MUTANTS.filter((one) => one.set === set),
  ({ file }) => pathToFileURL(join(root, file)).href
)

registerHooks({
  load: (url, context, next) => {
    const loaded = next(url, context)
    const mutants = byUrl.get(url)
    if (mutants === undefined) return loaded
    let source = Buffer.from(loaded.source as Uint8Array).toString()
    for (const { text, instead } of mutants) source = source.replace(text, () => instead)
    return { ...loaded, source }
  },
})
