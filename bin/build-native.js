/*
 * npm's install script: builds the native addon with cmake-js, in about five seconds; when it is built already, in a
 * tenth of one. Says in one sentence what is missing, where cmake's own words would be a page.
 */
import { spawnSync } from 'node:child_process'
import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))

/** Any command of each row will do. */
const tools = [
  ['cmake', ['cmake']],
  ['a C++ compiler', [process.env.CXX, 'c++', 'g++', 'clang++']],
  ['make or ninja', ['make', 'gmake', 'ninja']],
]

function fail(problem) {
  process.stderr.write(
    `virtiod: the native addon cannot be built: ${problem}. It needs cmake, make and a C++17 compiler ` +
      '(Debian, Ubuntu: apt-get install g++ make cmake); then run "npm rebuild virtiod", in a checkout "npm run build:native".\n'
  )
  process.exit(1)
}

const missing = tools
  .filter(([, commands]) => !commands.some((command) => command && !spawnSync(command, ['--version']).error))
  .map(([name]) => name)
if (missing.length > 0)
  fail(`${new Intl.ListFormat('en').format(missing)} ${missing.length === 1 ? 'is' : 'are'} not installed`)

const cmakeJs = createRequire(import.meta.url).resolve('cmake-js/bin/cmake-js')
const { status } = spawnSync(process.execPath, [cmakeJs, 'compile'], { cwd: root, stdio: 'inherit' })
if (status !== 0) fail('the compiler said why above')
