/**
 * One measurement in a process of its own: `node bench-child.ts SOCKET OPTIONS-AS-JSON` prints the result as JSON. The
 * comparison pins it to a processor, and its compiled code starts fresh each time.
 */

import type { BenchOptions } from './bench.ts'
import { bench } from './bench.ts'

const [, , socketPath = '', options = '{}'] = process.argv
process.stdout.write(JSON.stringify(bench(socketPath, JSON.parse(options) as BenchOptions)))
