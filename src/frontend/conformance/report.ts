/**
 * The words of a conformance run, for people: a line per case, a summary, the table of all cases. It must not run
 * anything.
 */
import type { CaseResult, ConformanceCase, Needs } from './case.ts'
import { GROUPS } from './case.ts'
import { type ConformanceResult, featureName, protocolName, select } from './run.ts'

/** One case: outcome, level, id, citation, what was seen; below it the rule, when it does not hold. */
export function formatResult(result: CaseResult): string {
  const { outcome, level, id, cites, seen, expected, rule } = result
  const loud = outcome === 'pass' || outcome === 'skip' ? outcome : outcome.toUpperCase()
  const head = `${loud.padEnd(5)}  ${level.padEnd(6)}  ${id.padEnd(32)}  [${cites}]`
  if (outcome === 'pass' || outcome === 'skip') return `${head}  ${seen}`
  return [
    head,
    `       rule:     ${rule}`,
    ...(expected === undefined || expected === rule ? [] : [`       expected: ${expected}`]),
    `       seen:     ${seen}`,
  ].join('\n')
}

/** The closing lines. */
export function formatSummary(result: ConformanceResult): string {
  const { counts, backend, device, aborted } = result
  const verdict = aborted
    ? 'stopped early'
    : result.conforms
      ? 'every MUST that applies holds'
      : 'not every MUST that applies holds'
  return [
    `${backend}, virtio-${device}, features ${result.features}, protocol features ${result.protocolFeatures}`,
    `${counts.pass} passed, ${counts.fail} failed, ${counts.warn} warnings, ${counts.error} errors, ` +
      `${counts.skip} skipped: ${verdict}`,
  ].join('\n')
}

/** All cases as Markdown, a table per group: `virtiod conformance --list`. */
export function formatList(cases?: readonly ConformanceCase[]): string {
  const chosen = select(cases === undefined ? {} : { cases })
  const sections = Object.entries(GROUPS).map(([group, title]) => {
    const rows = chosen
      .filter((one) => one.group === group)
      .map(
        (one) => `| \`${one.id}\` | ${one.level} | ${cell(one.rule)} | ${cell(one.cites)} | ${cell(needsText(one))} |`
      )
    if (rows.length === 0) return undefined
    return [
      `### ${group}: ${title}`,
      '',
      '| Case | Level | A correct back-end | Where it says so | Needs |',
      '| --- | --- | --- | --- | --- |',
      ...rows,
    ].join('\n')
  })
  return `${sections.filter((one) => one !== undefined).join('\n\n')}\n`
}

function needsText({ needs = {}, destructive }: ConformanceCase): string {
  const words = needsWords(needs)
  if (destructive) words.push('`--destructive`')
  return words.join(', ')
}

function needsWords(needs: Needs): string[] {
  const short = (name: string): string =>
    name.replace(/^(VIRTIO|VHOST_USER_PROTOCOL|VHOST_USER|VHOST)_(BLK_|NET_)?F_/, '')
  return [
    ...(needs.device === undefined ? [] : [needs.device]),
    ...(needs.features ?? []).map((bit) => short(featureName(bit, needs.device ?? 'blk'))),
    ...(needs.protocol ?? []).map((bit) => short(protocolName(bit))),
    ...(needs.queues === undefined ? [] : [`${needs.queues} rings`]),
    ...(needs.fds ? ['/proc/PID/fd'] : []),
    ...(needs.wire ? ['frames that come in'] : []),
  ]
}

function cell(text: string): string {
  return text.replaceAll('|', '\\|')
}
