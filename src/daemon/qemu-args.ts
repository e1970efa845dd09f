/**
 * QEMU arguments that attach what is served. Pure: names, sockets and device properties in, arguments out. Vhost-user
 * needs guest memory that the back-end can map, hence the shared memfd.
 */
import type { QemuDevice } from '../device/index.ts'

export interface QemuAttachment {
  /** The device's name: chardev and device ids are made from it. */
  readonly name: string
  readonly socketPath: string
  readonly device: QemuDevice
}

/**
 * Option and value pairs, in order. `reconnect` only for disks and network cards: QEMU connects such a chardev in the
 * background, and its other devices don't wait for that: 7.2 does not start ("Failed to set msg fds").
 * @param memory the guest's memory as QEMU writes it, e.g. `1G`
 */
export function qemuArguments(
  attachments: readonly QemuAttachment[],
  memory: string
): [option: string, value: string][] {
  const lines: [string, string][] = [
    ['-m', memory],
    ['-object', `memory-backend-memfd,id=virtiod-memory,size=${memory},share=on`],
    ['-numa', 'node,memdev=virtiod-memory'],
  ]
  for (const { name, socketPath, device } of attachments) {
    const chardev = `virtiod-${name}`
    const reconnect = device.netdev !== undefined || device.driver.startsWith('vhost-user-blk-') ? ',reconnect=1' : ''
    lines.push(['-chardev', `socket,id=${chardev},path=${escapeComma(socketPath)}${reconnect}`])
    if (device.netdev === undefined) {
      lines.push(['-device', `${device.driver},chardev=${chardev}${list(device.properties)}`])
      continue
    }
    lines.push(['-netdev', `vhost-user,id=${chardev},chardev=${chardev}${list(device.netdev)}`])
    lines.push(['-device', `${device.driver},netdev=${chardev}${list(device.properties)}`])
  }
  return lines
}

function list(properties: Readonly<Record<string, string | number>>): string {
  return Object.entries(properties)
    .map(([key, value]) => `,${key}=${escapeComma(String(value))}`)
    .join('')
}

/** One pair per line, ready to paste behind `qemu-system-x86_64 \`. */
export function formatQemuArguments(lines: readonly (readonly [string, string])[]): string {
  return `${lines.map(([option, value]) => `  ${option} ${shellQuote(value)}`).join(' \\\n')}\n`
}

/** QEMU's option parser wants a comma in a value doubled. */
function escapeComma(value: string): string {
  return value.replaceAll(',', ',,')
}

/** Quotes for a POSIX shell, only where it is needed. */
export function shellQuote(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`
}
