/** The archive format of an initramfs. */

/** One thing in an archive. */
export type CpioEntry = { readonly name: string } & (
  | { readonly data: string | Uint8Array; readonly mode?: number }
  | { readonly directory: true }
  | { readonly link: string }
  | { readonly device: readonly [major: number, minor: number] }
)

/**
 * A cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst), padded to 512
 * bytes.
 */
export function cpio(entries: readonly CpioEntry[]): Buffer {
  const parts: Buffer[] = []
  let size = 0
  let inode = 1
  const push = (part: Buffer, align: number): void => {
    const padding = -part.length & (align - 1)
    parts.push(part, Buffer.alloc(padding))
    size += part.length + padding
  }
  const add = (name: string, mode: number, data: Buffer, device: readonly [number, number] = [0, 0]): void => {
    const fields = [inode++, mode, 0, 0, 1, 0, data.length, 0, 0, device[0], device[1], name.length + 1, 0]
    const header = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}${name}\0`
    push(Buffer.from(header, 'latin1'), 4)
    push(data, 4)
  }
  for (const entry of entries) {
    if ('directory' in entry) add(entry.name, 0o040755, Buffer.alloc(0))
    else if ('link' in entry) add(entry.name, 0o120777, Buffer.from(entry.link))
    else if ('device' in entry) add(entry.name, 0o020600, Buffer.alloc(0), entry.device)
    else add(entry.name, 0o100000 | (entry.mode ?? 0o644), Buffer.from(entry.data))
  }
  add('TRAILER!!!', 0, Buffer.alloc(0))
  push(Buffer.alloc(-size & 511), 1)
  return Buffer.concat(parts)
}
