/** QEMU arguments: what is printed can be pasted. */
import { execFileSync } from 'node:child_process'
import { expect, test } from 'vitest'
import { formatQemuArguments, qemuArguments, shellQuote } from '../../src/daemon/qemu-args.ts'

const device = { driver: 'vhost-user-blk-pci', properties: { 'num-queues': 4, 'queue-size': 256 } }

test('memory once, a chardev and a device each', () => {
  const lines = qemuArguments(
    [
      { name: 'blk0', socketPath: '/run/a.sock', device },
      { name: 'data', socketPath: '/run/b,c.sock', device: { driver: 'vhost-user-blk-pci', properties: {} } },
    ],
    '2G'
  )
  expect(lines).toEqual([
    ['-m', '2G'],
    ['-object', 'memory-backend-memfd,id=virtiod-memory,size=2G,share=on'],
    ['-numa', 'node,memdev=virtiod-memory'],
    ['-chardev', 'socket,id=virtiod-blk0,path=/run/a.sock,reconnect=1'],
    ['-device', 'vhost-user-blk-pci,chardev=virtiod-blk0,num-queues=4,queue-size=256'],
    ['-chardev', 'socket,id=virtiod-data,path=/run/b,,c.sock,reconnect=1'],
    ['-device', 'vhost-user-blk-pci,chardev=virtiod-data'],
  ])
})

test('a network card hangs on a netdev', () => {
  const card = { driver: 'virtio-net-pci', properties: { mac: '52:54:00:00:00:01', mq: 'on' }, netdev: { queues: 4 } }
  expect(qemuArguments([{ name: 'net0', socketPath: '/run/n.sock', device: card }], '1G').slice(3)).toEqual([
    ['-chardev', 'socket,id=virtiod-net0,path=/run/n.sock,reconnect=1'],
    ['-netdev', 'vhost-user,id=virtiod-net0,chardev=virtiod-net0,queues=4'],
    ['-device', 'virtio-net-pci,netdev=virtiod-net0,mac=52:54:00:00:00:01,mq=on'],
  ])
})

test('reconnect=1 only where QEMU starts with it', () => {
  const rng = { driver: 'vhost-user-rng-pci', properties: {} }
  expect(qemuArguments([{ name: 'rng0', socketPath: '/run/r.sock', device: rng }], '1G').slice(3)).toEqual([
    ['-chardev', 'socket,id=virtiod-rng0,path=/run/r.sock'],
    ['-device', 'vhost-user-rng-pci,chardev=virtiod-rng0'],
  ])
})

test('a shell reads the text as the same words', () => {
  const lines = qemuArguments([{ name: 'blk0', socketPath: "/tmp/it's a $dir/`x`.sock", device }], '1G')
  const words = execFileSync('sh', ['-c', `printf '%s\\n' \\\n${formatQemuArguments(lines)}`], { encoding: 'utf8' })
  expect(words.trimEnd().split('\n')).toEqual(lines.flat())
})

test('quotes only where they are needed', () => {
  expect(shellQuote('a=b,c:d/e.f')).toBe('a=b,c:d/e.f')
  expect(shellQuote("a'b c")).toBe(`'a'\\''b c'`)
  expect(shellQuote('')).toBe("''")
})
