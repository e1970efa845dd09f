/** `virtiod device MODULE`: serves a device of somebody's own, which is one file or an npm package. */
import { parseArgs } from 'node:util'
import * as v from 'valibot'
import { type DaemonConfig, daemonPart, listenerPart, moduleHelp, moduleKeys } from '../../daemon/config.ts'
import { MODULE_TYPE } from '../../daemon/devices.ts'
import { configuredModule } from '../../daemon/module-config.ts'
import { checkValues, type OptionInfo, optionsOf } from '../../daemon/option-table.ts'
import { daemonOptions, listenerOptions } from '../../daemon/options.ts'
import { ConfigError } from '../../device/errors.ts'
import type { ParsedArguments } from '../arguments.ts'
import type { Command } from '../command.ts'
import { checkOnly, checkOptions } from './check.ts'

export const moduleOptions = v.strictObject({
  option: v.exactOptional(
    v.pipe(
      v.array(v.string()),
      v.description('An option of the module; once for each, and again for each item of a list'),
      v.metadata({ placeholder: 'KEY=VALUE', unset: 'none' })
    )
  ),
  watch: moduleKeys.entries.watch,
  name: v.exactOptional(
    v.pipe(
      v.string(),
      v.regex(/^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$/, 'Give 1 to 64 letters, digits, dots, underscores and hyphens'),
      v.description("The device's name in metrics and logs"),
      v.metadata({ placeholder: 'NAME', unset: "the module's and 0, as in counter0" })
    )
  ),
})

const description =
  'Serve a device of your own: MODULE is a TypeScript or JavaScript file (./my-device.ts) or the name of an npm package ' +
  'whose default export is a device, as defineDevice of virtiod/device makes it. It runs on a thread of its own: when it ' +
  'fails, its session ends and it starts again. "virtiod device MODULE --help" lists the options of the module.'

/** @param args for the help: of which module */
export async function moduleCommand(args: readonly string[]): Promise<Command> {
  const scopes = [
    { title: 'Module options', table: moduleOptions },
    { title: 'Listener options', table: listenerOptions },
    { title: 'Daemon options', table: daemonOptions },
    { title: 'Program options', table: checkOptions },
  ]
  const flags = args.slice(0, args.includes('--') ? args.indexOf('--') : args.length)
  const asksHelp = flags.includes('--help') || flags.includes('-h')
  const module = asksHelp
    ? firstWord(
        args,
        scopes.flatMap(({ table }) => optionsOf(table))
      )
    : undefined
  return {
    name: MODULE_TYPE,
    description,
    usage: ['MODULE --socket-path PATH [options]', 'MODULE --fd N [options]'],
    positionals: [{ name: 'MODULE', description: 'a device module: a path, or the name of an npm package' }],
    scopes,
    ...(module !== undefined && { moduleOptions: { module, options: await optionsOfModule(module) } }),
    run: async (input) => {
      const config = await configFromModule(input)
      if (input.values['check-config'] === true) return checkOnly(config)
      const [{ serve }, { createLogger }] = await Promise.all([import('../serve.ts'), import('../../daemon/log.ts')])
      return serve(config, createLogger(config.logLevel))
    },
  }
}

/** @throws ConfigError */
export async function configFromModule({ values, positionals }: ParsedArguments): Promise<DaemonConfig> {
  const label = (name: string): string => `--${name}`
  const own = checkValues(moduleOptions, values, label) as v.InferOutput<typeof moduleOptions>
  const part = daemonPart(values, label)
  const socket = listenerPart(values, label)
  const module = positionals[0]!
  const configured = await configuredModule({
    module,
    directory: process.cwd(),
    given: { values: keyValues(own.option ?? []), text: true, label: '--option ', where: moduleHelp(module) },
    watch: own.watch,
  })
  const name = own.name ?? `${configured.definition.name}0`
  return { ...part, devices: [{ ...configured, name, socket }] }
}

/** `['size=1M', 'tag=a', 'tag=b']` → `{ size: '1M', tag: ['a', 'b'] }`. @throws ConfigError */
function keyValues(words: readonly string[]): Record<string, string | string[]> {
  const values: Record<string, string | string[]> = {}
  for (const word of words) {
    const at = word.indexOf('=')
    if (at < 1) {
      const problem = `${JSON.stringify(word)} has no ${at === 0 ? 'name' : '"="'}`
      throw new ConfigError('ERR_OPTION_VALUE', '--option', problem, 'Give it as --option KEY=VALUE.')
    }
    const [name, value] = [word.slice(0, at), word.slice(at + 1)]
    const before = Object.hasOwn(values, name) ? values[name] : undefined
    values[name] = before === undefined ? value : [before, value].flat()
  }
  return values
}

/** The first argument that is neither an option nor an option's value. */
function firstWord(args: readonly string[], infos: readonly OptionInfo[]): string | undefined {
  const options = infos.map(({ name, kind }) => [name, { type: kind === 'flag' ? 'boolean' : 'string' }] as const)
  const { positionals } = parseArgs({
    args: [...args],
    options: { ...Object.fromEntries(options), help: { type: 'boolean', short: 'h' } },
    strict: false,
    allowPositionals: true,
  })
  return positionals[0]
}

async function optionsOfModule(module: string): Promise<readonly OptionInfo[]> {
  const [{ describe }, { moduleAddress }] = await Promise.all([
    import('../../daemon/module-describe.ts'),
    import('../../daemon/module-config.ts'),
  ])
  return (await describe({ address: moduleAddress(module, process.cwd()), given: undefined })).shape.options
}
