#!/usr/bin/env node
/*
 * The launcher. Old JavaScript on purpose, and nothing imported before the check: with a Node that is too old, virtiod's
 * own files don't even parse.
 */
var version = process.versions.node.split('.')
var major = Number(version[0])

// Shared memory that is mapped from outside (node_api_create_external_sharedarraybuffer) came with 24.16.
if (major < 24 || (major === 24 && Number(version[1]) < 16)) {
  process.stderr.write(
    'virtiod: it needs Node 24.16 or newer, and this is ' +
      process.version +
      '. Install one from https://nodejs.org; ' +
      'in a checkout "npm install" brings one along, and "npm start" and "npm run virtiod -- ..." use it.\n'
  )
  process.exitCode = 2
} else {
  import('node:fs')
    .then((fs) => {
      // A checkout runs its TypeScript, whatever an old build left in dist/; a package has only dist/.
      var source = new URL('../src/cli/main.ts', import.meta.url)
      return import(fs.existsSync(source) ? source.href : '../dist/src/cli/main.js')
    })
    .catch((error) => {
      process.stderr.write('virtiod: ' + ((error && error.stack) || error) + '\n')
      process.exitCode = 1
    })
}
