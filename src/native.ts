/**
 * The typed facade over the native addon: system calls, and the copies of {@link NativeRing.direct} and
 * {@link Native.copy}.
 *
 * Conventions of every function here:
 * - it never throws for a failing system call: it returns `-errno` (a small negative number), 0 or a positive result;
 *   only a wrong argument type throws a TypeError, which is a bug of the caller;
 * - an fd that it returns has FD_CLOEXEC set and is owned by the caller;
 * - an address is a number (user addresses are below 2^47, so a double holds them exactly).
 *
 * Only `engine/`, `vhost-user/` and `frontend/` import this file (test/architecture.test.ts holds that).
 */
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { getSystemErrorName } from 'node:util'

/** A mapping that this process owns until `release()`; see {@link Native.mapFile}. */
export interface NativeMapping {
  /** Where the data starts in this process (the HVA of byte 0 of `buffer`). */
  readonly address: number
  /** The mapped bytes. One SharedArrayBuffer per mapping; it may be posted to worker threads. */
  readonly buffer: SharedArrayBuffer
}

/** What {@link Native.ringSetup} returns: an io_uring (or its emulation by plain system calls), mapped. */
export interface NativeRing {
  /**
   * The ring's fd; for the emulation the fd of its epoll instance. Either is readable when completions can be reaped; of an
   * io_uring that is not `pollable` nobody is told when it becomes so.
   */
  readonly fd: number
  /** The submission and completion ring (IORING_FEAT_SINGLE_MMAP). All offsets below are byte offsets into it. */
  readonly rings: SharedArrayBuffer
  /** The submission queue entries, 64 bytes each, `sqEntries` of them. */
  readonly sqes: SharedArrayBuffer
  readonly sqEntries: number
  readonly cqEntries: number
  readonly sqHead: number
  readonly sqTail: number
  /** Offset of the SQ flags word (IORING_SQ_CQ_OVERFLOW 2, IORING_SQ_TASKRUN 4). */
  readonly sqFlags: number
  readonly cqHead: number
  readonly cqTail: number
  readonly cqOverflow: number
  /** Offset of the completion entries, 16 bytes each: u64 user_data, s32 res, u32 flags. */
  readonly cqes: number
  /** The IORING_SETUP_* flags that the kernel accepted; 0 for the emulation. */
  readonly setupFlags: number
  /**
   * The arguments of `enter`, so that a call on the hot path passes none (48 ns for three arguments, 15 ns for none):
   * Int32 words 0 = to_submit, 1 = min_complete, 2 = flags (IORING_ENTER_*), 3 = timeout in microseconds (-1 = none,
   * 0 = don't wait: min_complete counts as 0, so that is never -ETIME). A timeout matters only with
   * IORING_ENTER_GETEVENTS.
   */
  readonly control: SharedArrayBuffer
  /**
   * Entries that `enter` runs at once, behind the submission and without waiting for anything else: 256, laid out as
   * submission entries, named by words 4 (first) and 5 (count) of `control`. WRITE and WRITEV are pwritev(2). READ and
   * READV, and WRITE and WRITEV with an fd of -1, copy from or to the address in the offset's place, which lies in a
   * mapping that the caller holds. The last word of an entry takes its result: bytes or -errno. Word 6 of `control` tells
   * what had to wait, for the disk, throttling or a journal: 1 = a copy, 2 = a write; those of the kind behind it are
   * refused with -EAGAIN. A copy that the SIGBUS guard caught is -EFAULT, and 4 is set. With direct entries io_uring is
   * entered only when there is something to submit or `flags` has IORING_ENTER_GETEVENTS.
   */
  readonly direct: SharedArrayBuffer
  /**
   * io_uring_enter(2) with the arguments in `control`. Returns the number of entries consumed, or -errno (-ETIME when
   * the timeout passed, -EINTR). As in the kernel, entries consumed, or completions that are there though fewer than
   * asked for, hide an error of the wait: look at the queue, not at the result. The emulation stops consuming (0 at
   * the least) while the completion queue is full. After `close` it is -EBADF.
   */
  enter(): number
  /**
   * Registers `fd` in slot `slot` of the ring's fixed-file table (64 slots; -1 empties the slot). -EOPNOTSUPP for the
   * emulation.
   */
  registerFile(slot: number, fd: number): number
  /**
   * Closes the ring and its mappings; the buffers become harmless anonymous memory. Call it once, from the thread
   * that set it up.
   */
  close(): void
}

/** What {@link Native.createCopier} returns. */
export interface NativeCopier {
  /**
   * Float64: [0] = how many copies, then of copy i [1 + 3i] destination address, [2 + 3i] source address, [3 + 3i] bytes.
   * The caller holds the mappings; the two ranges of a copy don't overlap.
   */
  readonly pieces: SharedArrayBuffer
  /**
   * Does them in order, and sets their number to 0. Where a page is missing (a front-end truncated its memory) the SIGBUS guard puts
   * one there, and the copy goes on.
   */
  run(): void
}

/**
 * Watches fds on a helper thread and reports readiness on this thread's event loop; one-shot: `arm` again after each
 * report.
 */
export interface NativeWatcher {
  /** Starts to watch `fd` (EPOLLIN | EPOLLRDHUP | EPOLLONESHOT); reports carry `id` (a positive 31-bit number). */
  add(fd: number, id: number): number
  /** Asks for the next report of an fd that was added. */
  arm(fd: number, id: number): number
  remove(fd: number): number
  /** Lets the process end (or not) while the watcher is open. A watcher starts referenced. */
  ref(): void
  unref(): void
  /** Ends the helper thread. No report comes after it. Idempotent. */
  close(): void
}

export interface Native {
  // ---- file descriptors
  close(fd: number): number
  /** F_DUPFD_CLOEXEC. */
  dup(fd: number): number
  /** Sets or clears O_NONBLOCK on the open file description. */
  setNonblock(fd: number, on: boolean): number
  /**
   * What `fd` is. Fills `out` (length ≥ 8): 0 st_mode, 1 size in bytes (BLKGETSIZE64 for a block device), 2
   * st_blksize (statfs f_bsize on hugetlbfs, i.e. the huge page size), 3 logical block size (BLKSSZGET; 512 for a
   * file), 4 O_DIRECT memory alignment and 5 O_DIRECT offset alignment in bytes (statx STATX_DIOALIGN; 0 = unknown or
   * O_DIRECT is not possible), 6 fcntl F_GETFL flags, 7 st_rdev-or-st_dev/inode hash is NOT given: 0 reserved.
   */
  fdInfo(fd: number, out: Float64Array): number
  /** eventfd(2) with EFD_CLOEXEC | EFD_NONBLOCK. */
  eventfd(initial: number): number
  /** Writes `value` (1 … 2^53−1) to an eventfd. */
  eventfdWrite(fd: number, value: number): number
  /** Reads (and resets) an eventfd: its value as a number, or -EAGAIN when it is 0. */
  eventfdRead(fd: number): number
  /**
   * poll(2) of one fd for POLLIN: 1 readable, 0 timed out (`timeoutMs`, -1 = forever), -errno. Blocks the thread:
   * tests, front-end, tools.
   */
  pollIn(fd: number, timeoutMs: number): number
  /**
   * Reads from a pipe or FIFO without waiting, whatever its flags are: the number of bytes, 0 at its end, -EAGAIN when
   * it is empty.
   */
  readPipe(fd: number, buffer: Uint8Array): number
  /**
   * Writes to a pipe or FIFO without waiting, whatever its flags are: how many bytes it took, -EAGAIN when it is full.
   */
  writePipe(fd: number, buffer: Uint8Array): number
  /**
   * memfd_create(2) with MFD_CLOEXEC | MFD_ALLOW_SEALING, sized by ftruncate. `hugePageBytes` 0 = normal pages, else
   * MFD_HUGETLB of that size (2 MiB, 1 GiB).
   */
  memfd(name: string, size: number, hugePageBytes: number): number
  /** F_ADD_SEALS with F_SEAL_* `seals`; -EPERM: it is sealed against that, or was made without MFD_ALLOW_SEALING. */
  sealFile(fd: number, seals: number): number
  /** F_OFD_SETLK over the whole file: 0, or -EAGAIN when another open file description holds a conflicting lock. */
  lockFile(fd: number, exclusive: boolean): number
  /** fallocate(2), blocking; `mode` is FALLOC_FL_*. */
  fallocate(fd: number, mode: number, offset: number, length: number): number

  // ---- unix sockets
  /**
   * socket + bind + listen (SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC); the socket file gets `mode` (bind under
   * umask 0777 & ~mode).
   */
  listenUnix(path: string, mode: number): number
  /** A connected blocking stream socket, or -errno (-ECONNREFUSED: nobody listens). */
  connectUnix(path: string): number
  /** accept4 with SOCK_NONBLOCK | SOCK_CLOEXEC; -EAGAIN when nobody waits. */
  accept(fd: number): number
  /** socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC): fills out[0], out[1]. */
  socketpair(out: Int32Array): number
  /** SO_PEERCRED: fills out[0] pid, out[1] uid, out[2] gid. */
  peerCred(fd: number, out: Int32Array): number
  /**
   * 1 when `fd` is a listening stream unix socket (SO_ACCEPTCONN), 0 when it is a connected one, -errno when it is no
   * unix socket.
   */
  socketKind(fd: number): number
  /**
   * recvmsg(2) with MSG_DONTWAIT | MSG_CMSG_CLOEXEC into bytes [offset, offset + length) of `buffer`.
   * `fds[0]` becomes the number of fds received, `fds[1]` the msg_flags (MSG_CTRUNC 8), `fds[2…]` the fds (at most
   * `fds.length − 2`; any that do not fit are closed here and MSG_CTRUNC is set). 0 = end of stream, -EAGAIN =
   * nothing yet.
   */
  recvMessage(fd: number, buffer: Uint8Array, offset: number, length: number, fds: Int32Array): number
  /**
   * sendmsg(2) with MSG_NOSIGNAL (and MSG_DONTWAIT when `wait` is false) of [offset, offset + length) of `buffer`,
   * with the first `fdCount` fds of `fds` as SCM_RIGHTS.
   */
  sendMessage(
    fd: number,
    buffer: Uint8Array,
    offset: number,
    length: number,
    fds: Int32Array,
    fdCount: number,
    wait: boolean
  ): number
  /** shutdown(2), both directions. */
  shutdown(fd: number): number
  /**
   * Sends one datagram to the SOCK_DGRAM unix socket at `path`, without waiting; `@name` is the abstract socket of that
   * name. Returns the bytes sent. -ECONNREFUSED, -ENOENT: nobody has it open; -EAGAIN: its receiver's queue is full.
   */
  sendDatagram(path: string, bytes: Uint8Array): number

  // ---- memory
  /**
   * Maps `mapLength` bytes of `fd` from file offset `mapOffset` (MAP_SHARED | MAP_NORESERVE, read and write,
   * MADV_DONTDUMP, MADV_DONTFORK) and exposes bytes [dataOffset, dataOffset + dataLength) of the mapping. The caller
   * has rounded mapOffset and mapLength to the file's page size. The fd may be closed afterwards. The mapping is
   * under the SIGBUS guard: when the file shrinks under it, the first touch of a missing page replaces the whole
   * mapping by anonymous memory and marks it as faulted instead of killing the process.
   */
  mapFile(
    fd: number,
    mapOffset: number,
    mapLength: number,
    dataOffset: number,
    dataLength: number,
    writable: boolean
  ): NativeMapping | number
  /** Page-aligned private anonymous memory, zeroed, with a known address: I/O vectors, bounce buffers, constants. */
  allocate(length: number): NativeMapping | number
  /** madvise(MADV_RANDOM): a page fault in the mapping at `address` reads its page from the disk, not those around it. */
  adviseRandom(address: number): number
  /**
   * Gives the memory back at once: lays anonymous memory over the mapping that starts at `address` (MAP_FIXED), so
   * that a stale view reads zeroes. The address range itself goes with the SharedArrayBuffer's finalizer. Idempotent.
   * -EINVAL: no such mapping.
   */
  release(address: number): number
  /** How often the SIGBUS guard caught a fault in the mapping at `address` (0 = intact). -EINVAL: no such mapping. */
  faults(address: number): number
  /**
   * The eventfd that the SIGBUS guard writes to (async-signal-safe) when it catches a fault. Owned by the addon: do
   * not close.
   */
  faultEventFd(): number

  // ---- io_uring
  /**
   * io_uring_setup(2) with at least `entries` submission entries and `cqEntries` completion entries. It tries
   * SINGLE_ISSUER | DEFER_TASKRUN | TASKRUN_FLAG | SUBMIT_ALL, then COOP_TASKRUN | TASKRUN_FLAG | SUBMIT_ALL, then none
   * (always with CQSIZE), maps the rings, fills the SQ index array with the identity, registers the ring fd and an
   * empty fixed-file table of 64 slots where the kernel has them. Must run on the thread that will call `enter`.
   * `emulate`: no io_uring at all; `enter` executes the same entries one by one by preadv, pwritev, fdatasync,
   * fallocate, … and waits in epoll (edge-triggered, the semantics of a multishot poll). `pollable` (default false): the ring's
   * fd is to be polled, so without DEFER_TASKRUN. -ENOSYS / -EPERM: this kernel or container has no io_uring.
   */
  ringSetup(entries: number, cqEntries: number, emulate: boolean, pollable?: boolean): NativeRing | number

  // ---- packets (hot path: once per batch)
  /** A list of up to `capacity` (1 … 2^20) copies, and what runs them. -errno when there is no memory for it. */
  createCopier(capacity: number): NativeCopier | number
  /**
   * Sends `count` packets on `fd`, one writev(2) each. `vectors` is the address of an array of struct iovec, all
   * packets' vectors one behind the other; packets[i] is the number of vectors of packet i on entry and its result on
   * return: bytes, 0 = its vectors are empty, or -errno (-EINVAL: none or more than 1024 vectors; -EIO: the tap is
   * down; -EFAULT: memory is gone). EINTR is retried. All are tried. Returns how many were sent.
   */
  sendPackets(fd: number, vectors: number, packets: Int32Array, count: number): number
  /**
   * Receives packets from a non-blocking `fd` straight into buffers, one readv(2) each. `vectors` is the address of an
   * array of struct iovec; chains[c] is the number of vectors of chain c, for c in 0 … chainCount − 1, one behind the
   * other. Each packet gets a window of chains from the next unused one on: with `mergeable` as many as hold
   * `maxPacket` bytes (1 or more), else one; it then uses up as many whole chains as the bytes that came need, at least
   * one. Stops when the window is smaller than `maxPacket` or has more than 1024 vectors, at `maxPackets`, or when
   * readv fails. results[i] = bytes of packet i; behind the last packet why it stopped: -errno of readv (-EAGAIN =
   * nothing left), else 0. results.length > maxPackets. Returns the number of packets. A packet that is longer than its window
   * is cut off without a word.
   */
  receivePackets(
    fd: number,
    vectors: number,
    chains: Int32Array,
    chainCount: number,
    maxPacket: number,
    mergeable: boolean,
    results: Int32Array,
    maxPackets: number
  ): number

  // ---- tap and network links (control path; in the network namespace of the calling thread)
  /**
   * Opens /dev/net/tun (O_RDWR | O_NONBLOCK | O_CLOEXEC) and attaches it to the tap `name`, which is made when there is
   * none: TUNSETIFF with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR (| IFF_MULTI_QUEUE). Called again it adds a queue to a
   * multi-queue tap. An empty name or one with "%d" lets the kernel choose. Header size and offloads are those that an
   * existing tap has. An fd, or -EPERM, -EACCES, -ENOENT (no /dev/net/tun), -EBUSY (in use, and not multi-queue),
   * -E2BIG (too many queues), -EINVAL (it is no tap, or multi-queue when it should not be or the other way round, or
   * the name is none), -ENAMETOOLONG (16 bytes or more).
   */
  tapOpen(name: string, multiQueue: boolean): number
  /**
   * What tap `fd` is attached to: its interface's name, and out[0] = IFF_* flags of TUNGETIFF, out[1] = bytes of the
   * virtio-net header (TUNGETVNETHDRSZ), out[2] = IFF_* flags that the kernel knows (TUNGETFEATURES). out.length ≥ 3.
   * -EBADFD, -ENOTTY: no tap, or not attached.
   */
  tapInfo(fd: number, out: Int32Array): string | number
  /** TUNSETVNETHDRSZ: bytes of the virtio-net header, of all queues. -EINVAL: less than 10. */
  tapSetHeaderSize(fd: number, size: number): number
  /**
   * TUNSETOFFLOAD, of all queues: TUN_F_* that the reader of the tap copes with. -EINVAL: the kernel has not all of
   * them, or TSO without CSUM.
   */
  tapSetOffload(fd: number, flags: number): number
  /**
   * TUNSETQUEUE with IFF_ATTACH_QUEUE or IFF_DETACH_QUEUE: a queue that is not attached gets no packets. -EINVAL: it is
   * so already, or the tap is not multi-queue.
   */
  tapSetQueue(fd: number, attached: boolean): number
  /**
   * What link `name` is: out[0] ifindex, out[1] IFF_* flags, out[2] MTU in bytes, out[3 … 8] MAC address (zeroes: it
   * has none), out[9] 1 = it is a bridge, out[10] ifindex of the bridge that it is on or 0. out.length ≥ 11. 0, or
   * -ENODEV, -ENAMETOOLONG. Needs no privileges.
   */
  linkInfo(name: string, out: Int32Array): number
  /** 0, or -ENODEV, -EPERM. */
  linkSetUp(name: string, up: boolean): number
  /** MTU in bytes. -EINVAL: outside of what the link takes. */
  linkSetMtu(name: string, mtu: number): number
  /** Puts link `name` on `bridge` (SIOCBRADDIF). -EBUSY: it is on one already. -EOPNOTSUPP: `bridge` is no bridge. */
  bridgeAdd(bridge: string, name: string): number
  /**
   * An AF_PACKET SOCK_RAW socket (SOCK_CLOEXEC | SOCK_NONBLOCK) bound to link `name`, which should be up, with
   * PACKET_QDISC_BYPASS, and with PACKET_VNET_HDR when `vnetHeader`: each packet begins with a virtio-net header of 10
   * bytes. Tests and benchmarks put packets into a tap with it. An fd, or -ENODEV, -EPERM.
   */
  packetSocket(name: string, vnetHeader: boolean): number

  // ---- threads
  /** sched_setaffinity of the calling thread to the CPU numbers given. */
  setAffinity(cpus: Int32Array): number
  gettid(): number
  /** prctl(PR_SET_NAME) of the calling thread, at most 15 bytes. */
  setThreadName(name: string): number
  createWatcher(onReady: (id: number, events: number) => void): NativeWatcher
}

const packageRoot = join(dirname(fileURLToPath(import.meta.url)), '..')

function load(): Native {
  const require = createRequire(import.meta.url)
  // dist/src/native.js lies one level deeper than src/native.ts: `bindings` wants the folder of package.json.
  const bindings = require('bindings') as (options: object) => Native
  // A build of one's own, such as the one with sanitizers (test/native/asan.sh).
  const override = process.env['VIRTIOD_NATIVE_PATH']
  let root = packageRoot
  if (!root.endsWith('virtiod') && root.endsWith('dist')) root = dirname(root)
  try {
    if (override !== undefined && override !== '') return require(override) as Native
    return bindings({ bindings: 'virtiod_native', module_root: root })
  } catch (cause) {
    throw Object.assign(
      new Error(
        `cannot load the native addon for Node ${process.version} on ${process.platform}-${process.arch}. ` +
          `Build it with "npm rebuild virtiod" (in a checkout: "npm run build:native"); it needs a C++ toolchain ` +
          `(Debian: apt-get install g++ make cmake). `,
        { cause }
      ),
      { code: 'ERR_NATIVE_LOAD' }
    )
  }
}

export const native: Native = load()

/**
 * Turns `-errno` into an Error of Node's shape (`code`, `errno`, `syscall`). `what` says what was tried, for a human.
 */
export function systemError(negativeErrno: number, syscall: string, what: string): NodeJS.ErrnoException {
  const code = getSystemErrorName(negativeErrno)
  return Object.assign(new Error(`${what}: ${code} (${syscall})`), { code, errno: negativeErrno, syscall })
}
