/**
 * One measurement in a process of its own: `node net-bench-child.ts SOCKETS-AS-JSON OPTIONS-AS-JSON` prints the result as
 * JSON. The comparison pins it to a processor, and its compiled code starts fresh each time.
 */
import type { NetBenchOptions } from './net-bench.ts'
import { netBench } from './net-bench.ts'

const [, , sockets = '[]', options = '{}'] = process.argv
process.stdout.write(JSON.stringify(netBench(JSON.parse(sockets) as [string], JSON.parse(options) as NetBenchOptions)))
