/**
 * docs/api.md: what package.json exports to programs and device modules, with the docstrings of the source.
 * `npm run docs` writes it, test/docs.test.ts holds it to the code.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type ExportedDeclarations, type JSDoc, type JSDocableNode, Node, Project } from 'ts-morph'

const root = join(fileURLToPath(new URL('.', import.meta.url)), '../..')
export const apiPath = join(root, 'docs/api.md')

/** What one imports → its source, in the order of the page. */
const MODULES: Readonly<Record<string, string>> = {
  'virtiod/device': 'src/device/index.ts',
  'virtiod/device/virtio-blk': 'src/device/virtio-blk.ts',
  'virtiod/device/virtio-net': 'src/device/virtio-net.ts',
  'virtiod/testing': 'src/testing/index.ts',
  virtiod: 'src/index.ts',
}

/** Modules whose numbers are the specification's: named in one list, since each has its meaning from there. */
const CONSTANTS = /^[A-Z][A-Z0-9_]*$/

/** What has a heading on the page. */
const headings = new Set<string>()

interface Member {
  readonly signature: string
  readonly text: string
}

/** The page. */
export function apiPage(): string {
  headings.clear()
  const project = new Project({ tsConfigFilePath: join(root, 'tsconfig.json'), skipAddingFilesFromTsConfig: true })
  const modules = Object.entries(MODULES).map(([specifier, path]) => {
    const exported = [...project.addSourceFileAtPath(join(root, path)).getExportedDeclarations()]
    for (const [name] of exported) headings.add(name)
    return { specifier, path, exported }
  })
  const sections = modules.map(({ specifier, path, exported }) => {
    const constants = exported.filter(([name]) => CONSTANTS.test(name) && name !== 'API_VERSION')
    const rest = exported.filter((entry) => !constants.includes(entry))
    const parts = [`## \`${specifier}\``, linked(headComment(join(root, path)))]
    if (constants.length > 0) {
      const list = constants.map(([name]) => `\`${name}\``).join(', ')
      parts.push(`Numbers and layouts with the names of the specification: ${list}.`)
    }
    // How one begins comes first.
    rest.sort(([a], [b]) => Number(b === 'defineDevice') - Number(a === 'defineDevice'))
    for (const [name, [declaration]] of rest) parts.push(describe(name, declaration!))
    return parts.filter((part) => part !== '').join('\n\n')
  })
  return `# API reference

Made from the docstrings by \`npm run docs\`. How to begin: [a device in ten minutes](../devices/README.md); what happens to a request: [its life](life-of-a-request.md).

${sections.join('\n\n')}
`
}

/** The comment at the head of a file. */
function headComment(path: string): string {
  const comment = /^\/\*\*([\s\S]*?)\*\//.exec(readFileSync(path, 'utf8'))?.[1] ?? ''
  return comment.replace(/^\s*\* ?/gm, '').trim()
}

function describe(name: string, declaration: ExportedDeclarations): string {
  const kind = kindOf(declaration)
  const parts = [`### ${name}`, signature(name, kind, declaration), documentation(declaration)]
  const members = membersOf(declaration).map(({ signature, text }) => {
    const detail = text === '' ? '' : `<br>${text.replace(/\n+(?=- )/g, '<br>').replace(/\s*\n\s*/g, ' ')}`
    return `- \`${signature}\`${detail}`
  })
  if (members.length > 0) parts.push(members.join('\n'))
  return parts.filter((part) => part !== '').join('\n\n')
}

function kindOf(declaration: ExportedDeclarations): string {
  if (Node.isInterfaceDeclaration(declaration)) return 'interface'
  if (Node.isClassDeclaration(declaration)) return 'class'
  if (Node.isFunctionDeclaration(declaration)) return 'function'
  return Node.isTypeAliasDeclaration(declaration) ? 'type' : 'const'
}

function signature(name: string, kind: string, declaration: ExportedDeclarations): string {
  if (Node.isInterfaceDeclaration(declaration) || Node.isClassDeclaration(declaration)) {
    const parameters = declaration.getTypeParameters().map((parameter) => parameter.getText())
    const base = Node.isClassDeclaration(declaration)
      ? [declaration.getExtends()?.getText()]
      : declaration.getExtends().map((clause) => clause.getText())
    const bases = base.filter((text) => text !== undefined)
    return code(
      `${kind} ${name}${parameters.length > 0 ? `<${parameters.join(', ')}>` : ''}${bases.length > 0 ? ` extends ${bases.join(', ')}` : ''}`
    )
  }
  if (Node.isFunctionDeclaration(declaration)) {
    const body = declaration.getBody()
    const whole = declaration.getText(false)
    const text = body === undefined ? whole : whole.slice(0, whole.length - body.getText().length)
    return code(text.replace(/^export (async )?/, '').trim())
  }
  if (Node.isTypeAliasDeclaration(declaration)) return code(declaration.getText(false).replace(/^export /, ''))
  const type = Node.isVariableDeclaration(declaration) ? declaration.getType().getText(declaration) : ''
  return code(`const ${name}: ${type}`)
}

function code(text: string): string {
  return `\`\`\`ts\n${text}\n\`\`\``
}

function membersOf(declaration: ExportedDeclarations): Member[] {
  if (Node.isInterfaceDeclaration(declaration)) {
    return declaration
      .getMembers()
      .filter(isPublic)
      .map((member) => ({
        signature: oneLine(member.getText(false).replace(/^\/\*\*[\s\S]*?\*\/\s*/, '')),
        text: Node.isJSDocable(member) ? documentation(member) : '',
      }))
  }
  if (!Node.isClassDeclaration(declaration)) return []
  const members = [
    ...declaration.getConstructors(),
    ...declaration.getStaticMembers(),
    ...declaration.getInstanceMembers(),
  ]
  return members
    .filter(isPublic)
    .filter(
      (member) =>
        !member
          .getText()
          .replace(/^\/\*\*[\s\S]*?\*\/\s*/, '')
          .match(/^(static |readonly |async |get )*#|^private /)
    )
    .map((member) => {
      const whole = member.getText(false).replace(/^\/\*\*[\s\S]*?\*\/\s*/, '')
      const body = Node.isBodyable(member) ? member.getBody()?.getText() : undefined
      const head = body === undefined ? whole.replace(/ = [\s\S]*$/, '') : whole.slice(0, whole.length - body.length)
      return { signature: oneLine(head), text: Node.isJSDocable(member) ? documentation(member) : '' }
    })
}

/** What is not marked `@internal`. */
function isPublic(member: Node): boolean {
  return (
    !Node.isJSDocable(member) || !(member as JSDocableNode).getJsDocs().some((doc) => /@internal/.test(doc.getText()))
  )
}

function oneLine(text: string): string {
  return text.replace(/\s+/g, ' ').replace(/\( /g, '(').replace(/,? \)/g, ')').trim()
}

/** A docstring as Markdown: its text, then what it says of parameters, the result and errors. */
function documentation(node: ExportedDeclarations | Node): string {
  // A constant's docstring hangs on its statement.
  const owner = Node.isVariableDeclaration(node) ? node.getVariableStatement() : node
  const docs = owner !== undefined && Node.isJSDocable(owner) ? (owner as JSDocableNode).getJsDocs() : []
  return linked(docs.map(oneDoc).join('\n\n').trim())
}

function oneDoc(doc: JSDoc): string {
  const comment = doc.getInnerText().replace(/[ \t]+$/gm, '')
  // Behind a block of code a tag is a paragraph of its own.
  const before = comment.includes('```') ? '\n\n' : ' '
  return comment
    .replace(/\s*@param (\S+)\s+/g, `${before}*$1*: `)
    .replace(/\s*@returns?\s+/g, `${before}*Returns* `)
    .replace(/\s*@throws\s+/g, `${before}*Throws* `)
    .trim()
}

/** `{@link X}` becomes a link to X's heading, `{@link X.member}` as well; what has no heading is a word of code. */
function linked(text: string): string {
  return text.replace(/\{@link\s+([A-Za-z_]+)((?:\.[A-Za-z_]+)*)\s*\}/g, (_, name: string, member: string) => {
    const word = `\`${name}${member}\``
    return headings.has(name) ? `[${word}](#${name.toLowerCase()})` : word
  })
}
