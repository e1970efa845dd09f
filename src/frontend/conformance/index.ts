/** The conformance suite, for the command and for programs. */
export { type CaseResult, type ConformanceCase, GROUPS, type Group, type Level, type Outcome } from './case.ts'
export { CASES } from './cases.ts'
export { formatList, formatResult, formatSummary } from './report.ts'
export { type ConformanceOptions, type ConformanceResult, conformance } from './run.ts'
