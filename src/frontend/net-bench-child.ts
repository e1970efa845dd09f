/**
 * One measurement in a process of its own: `node net-bench-child.ts SOCKETS-AS-JSON OPTIONS-AS-JSON` prints the result as
 * JSON. The comparison pins it to a processor, and its compiled code starts fresh each time. Without sockets it prints how
 * many packets/s it puts into a tap.
 */
import type { NetBenchOptions } from './net-bench.ts'
import { netBench, netSourceLimit } from './net-bench.ts'

const [, , socketsText = '[]', optionsText = '{}'] = process.argv
const sockets = JSON.parse(socketsText) as [string]
const options = JSON.parse(optionsText) as NetBenchOptions
const result = sockets.length > 0 ? netBench(sockets, options) : netSourceLimit(options)
process.stdout.write(JSON.stringify(result))
