/**
 * A guest that writes and remembers what it wrote, while something happens to its back-end: on each processor one
 * process makes synced files on ext4 with their checksums, and another overwrites blocks past the page cache and
 * compares them at once. It owns the scripts and what must hold afterwards; it knows nothing of what happens meanwhile.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Guest } from './guest.ts'

/** Errors that the guest's kernel reports about the disk, and a request that took ages. */
export const diskErrors = /I\/O error|EXT4-fs (error|warning)|blk_update_request|hung task|blocked for more than/

/** Words that make QEMU connect again when the back-end went away; it tries once per second. */
export function reconnecting(args: readonly string[]): string[] {
  return args.map((arg) => (arg.startsWith('socket,') ? `${arg},reconnect=1` : arg))
}

export class WritingGuest {
  /** Where the guest runs now. */
  guest: Guest
  readonly #disk: string
  readonly #mount: string
  readonly #processes: number

  private constructor(guest: Guest, disk: string, processes: number) {
    this.guest = guest
    this.#disk = disk
    this.#mount = `/mnt-${disk}`
    this.#processes = processes
  }

  /** Makes a file system on the disk and begins to write; `cpus` pairs of processes. */
  static async start(guest: Guest, cpus: number, disk = 'vda'): Promise<WritingGuest> {
    const writing = new WritingGuest(guest, disk, 2 * cpus)
    const dir = writing.#mount
    // A process's state is in numbered files of a few sizes, so that it neither ends nor fills the disk.
    await guest.sh(`mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/${disk}
    mkdir -p ${dir} && mount /dev/${disk} ${dir}
    head -c 4194304 /dev/urandom > /tmp/noise
    cat > /tmp/files << 'END'
cd $1
i=0
while [ ! -e /tmp/stop ]; do
  n=$((i % 24))
  at=$(((i * 37) % 960))
  dd if=/tmp/noise of=f$2-$n bs=4k skip=$at count=$((1 + i % 61)) conv=fsync 2> /tmp/dd$2 ||
    echo "dd $n: $(cat /tmp/dd$2)" >> /tmp/failed
  sha256sum f$2-$n > s$2-$n
  i=$((i + 1))
  echo $i > /tmp/files$2
done
END
    cat > /tmp/blocks << 'END'
cd $1
cp /tmp/noise d$2
i=0
while [ ! -e /tmp/stop ]; do
  at=$(((i * 29) % 960))
  count=$((1 + i % 64))
  dd if=/tmp/noise of=d$2 bs=4k skip=$at seek=$(((i * 53) % 960)) count=$count oflag=direct conv=notrunc 2> /tmp/e$2 ||
    echo "direct write $i: $(cat /tmp/e$2)" >> /tmp/failed
  dd if=d$2 bs=4k skip=$(((i * 53) % 960)) count=$count iflag=direct of=/tmp/back$2 2> /dev/null
  dd if=/tmp/noise bs=4k skip=$at count=$count of=/tmp/want$2 2> /dev/null
  cmp /tmp/want$2 /tmp/back$2 >> /tmp/failed 2>&1 || echo "block $i of $2" >> /tmp/failed
  i=$((i + 1))
  echo $i > /tmp/blocks$2
done
END
    rm -f /tmp/stop /tmp/failed
    for cpu in $(seq 0 ${cpus - 1}); do
      mask=$(printf %x $((1 << cpu)))
      echo 0 > /tmp/files$cpu
      echo 0 > /tmp/blocks$cpu
      taskset $mask sh /tmp/files ${dir} $cpu > /dev/null 2>&1 &
      taskset $mask sh /tmp/blocks ${dir} $cpu > /dev/null 2>&1 &
    done`)
    return writing
  }

  /** Rounds that each process has done so far. */
  async rounds(): Promise<number[]> {
    for (;;) {
      const counts = (await this.guest.sh('cat /tmp/files[0-9]* /tmp/blocks[0-9]*')).split('\n').map(Number)
      // One of them was being written.
      if (counts.length === this.#processes && counts.every((count) => count >= 0)) return counts
    }
  }

  /** Waits until every process has done `more` rounds from now on. */
  async progress(more: number, timeoutMs = 40_000): Promise<void> {
    const before = await this.rounds()
    const deadline = performance.now() + timeoutMs
    for (;;) {
      const now = await this.rounds()
      if (now.every((count, i) => count >= (before[i] ?? 0) + more)) return
      if (performance.now() > deadline) throw new Error(`rounds ${before} became only ${now} in ${timeoutMs} ms`)
      await sleep(50)
    }
  }

  /** Ends the writing; everything must be there, on the disk itself, and the guest must have noticed nothing. */
  async finish(): Promise<void> {
    const dir = this.#mount
    const { output } = await this.guest.run(`touch /tmp/stop
    while ps | grep -E '[s]h /tmp/(files|blocks)' > /dev/null; do sleep 0.05; done
    cat /tmp/failed 2> /dev/null`)
    if (output.trim() !== '') throw new Error(`the guest's processes failed:\n${output}`)
    await this.guest.sh(`sync
    umount ${dir}
    e2fsck -fn /dev/${this.#disk} > /tmp/fsck 2>&1 || { cat /tmp/fsck; exit 1; }
    echo 3 > /proc/sys/vm/drop_caches
    mount /dev/${this.#disk} ${dir}
    cd ${dir}
    [ $(ls s* | wc -l) -ge 2 ]
    cat s* | sha256sum -c > /tmp/sums 2>&1 || { grep -v OK /tmp/sums; exit 1; }
    cd / && umount ${dir}`)
    const kernel = await this.guest.sh('dmesg')
    const found = kernel.split('\n').filter((line) => diskErrors.test(line))
    if (found.length > 0) throw new Error(`the guest's kernel complains:\n${found.join('\n')}`)
  }
}

/** Feature bits (virtio 1.3 §6) that a guest's driver and its disk have agreed on. */
export async function diskFeatures(guest: Guest, disk = 'vda'): Promise<Set<number>> {
  const text = await guest.sh(`cat /sys/block/${disk}/device/features`)
  return new Set([...text].flatMap((digit, bit) => (digit === '1' ? [bit] : [])))
}
