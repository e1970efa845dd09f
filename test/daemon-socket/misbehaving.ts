/**
 * A virtiod that fails as a new process: started for a handover it plays its part up to where the file `mode` in its
 * directory says, and dies or hangs there. Without that file, and when not started for a handover, it is virtiod.
 */
import { existsSync, readFileSync } from 'node:fs'

const fd = process.env['VIRTIOD_HANDOVER_FD']
if (fd === undefined || !existsSync('mode')) await import('../../src/cli/main.ts')
else await misbehave(Number(fd), readFileSync('mode', 'utf8'))

async function misbehave(channelFd: number, mode: string): Promise<void> {
  const { FdChannel } = await import('../../src/vhost-user/fd-channel.ts')
  const channel = new FdChannel(channelFd)
  const at = async (stage: string): Promise<void> => {
    if (mode === `die ${stage}`) process.kill(process.pid, 'SIGKILL')
    if (mode === `hang ${stage}`) await new Promise((resolve) => setTimeout(resolve, 60_000))
  }
  const hear = async (): Promise<string> => {
    const received = await channel.receive()
    return (received?.body as { kind: string } | undefined)?.kind ?? process.exit(0)
  }
  await hear()
  await at('before ready')
  await channel.send({ kind: 'ready' })
  await hear()
  await at('with a device')
  while ((await hear()) !== 'end');
  await at('with everything')
  await channel.send({ kind: 'prepared' })
  await at('prepared')
  await hear()
  await at('told to commit')
}
