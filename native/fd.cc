// File descriptors of any kind: duplicate, inspect, lock, eventfd, memfd. It owns no fd: what it makes belongs to the
// caller.
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>

#include <cstring>

#include "common.h"

#ifndef HUGETLBFS_MAGIC
#define HUGETLBFS_MAGIC 0x958458f6
#endif
#ifndef STATX_DIOALIGN
#define STATX_DIOALIGN 0x00002000U  // Linux 6.1
#endif
#ifndef MFD_HUGE_SHIFT
#define MFD_HUGE_SHIFT 26
#endif
#ifndef RWF_NOWAIT
#define RWF_NOWAIT 0x00000008
#endif

namespace virtiod {

static Napi::Value Close(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  if (args.failed()) return Undefined(info);
  int result = close(fd);
  // The number is free even after EINTR; an error would only tempt the caller to close somebody else's fd.
  if (result < 0 && errno == EINTR) result = 0;
  return Result(info, result);
}

static Napi::Value Dup(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  if (args.failed()) return Undefined(info);
  return Result(info, fcntl(fd, F_DUPFD_CLOEXEC, 0));
}

static Napi::Value SetNonblock(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  bool on = args.Bool(1, "on");
  if (args.failed()) return Undefined(info);
  int flags = fcntl(fd, F_GETFL);
  if (flags < 0) return Result(info, flags);
  int wanted = on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK;
  return Result(info, wanted == flags ? 0 : fcntl(fd, F_SETFL, wanted));
}

/** The O_DIRECT alignments by statx(2), read at the fixed offsets of the kernel ABI since libc headers may be older. */
static void DirectAlignment(int fd, double* memory, double* offset) {
  alignas(8) unsigned char raw[256] = {};
  *memory = *offset = 0;
  if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, raw) < 0) return;
  uint32_t mask, memoryAlign, offsetAlign;
  memcpy(&mask, raw, sizeof mask);
  memcpy(&memoryAlign, raw + 0x98, sizeof memoryAlign);
  memcpy(&offsetAlign, raw + 0x9c, sizeof offsetAlign);
  if ((mask & STATX_DIOALIGN) == 0) return;
  *memory = memoryAlign;
  *offset = offsetAlign;
}

static Napi::Value FdInfo(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  Span<double> out = args.Doubles(1, "out", 8);
  if (args.failed()) return Undefined(info);
  struct stat st;
  if (fstat(fd, &st) < 0) return Result(info, -1);
  int flags = fcntl(fd, F_GETFL);
  if (flags < 0) return Result(info, flags);
  double size = static_cast<double>(st.st_size);
  double blockSize = st.st_blksize;
  int sector = 512;
  if (S_ISBLK(st.st_mode)) {
    uint64_t bytes = 0;
    if (ioctl(fd, BLKGETSIZE64, &bytes) < 0 || ioctl(fd, BLKSSZGET, &sector) < 0) return Result(info, -1);
    size = static_cast<double>(bytes);
  } else if (S_ISREG(st.st_mode)) {
    struct statfs fs;
    if (fstatfs(fd, &fs) == 0 && static_cast<uint32_t>(fs.f_type) == HUGETLBFS_MAGIC) blockSize = fs.f_bsize;
  }
  out.data[0] = st.st_mode;
  out.data[1] = size;
  out.data[2] = blockSize;
  out.data[3] = sector;
  DirectAlignment(fd, &out.data[4], &out.data[5]);
  out.data[6] = flags;
  out.data[7] = 0;
  return Number(info, 0);
}

static Napi::Value Eventfd(const Napi::CallbackInfo& info) {
  Args args(info);
  uint32_t initial = static_cast<uint32_t>(args.Integer(0, "initial", 0, UINT32_MAX));
  if (args.failed()) return Undefined(info);
  return Result(info, eventfd(initial, EFD_CLOEXEC | EFD_NONBLOCK));
}

/** 1 when `events` are ready now, 0 when not, -1 and errno. */
static int ReadyNow(int fd, short events) {
  struct pollfd pfd = {fd, events, 0};
  int ready = poll(&pfd, 1, 0);
  if (ready > 0 && (pfd.revents & POLLNVAL) != 0) {
    errno = EBADF;
    return -1;
  }
  return ready;
}

static Napi::Value EventfdWrite(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  uint64_t value = static_cast<uint64_t>(args.Integer(1, "value", 1, kMaxSafeInteger));
  if (args.failed()) return Undefined(info);
  // The fd may come from a stranger without O_NONBLOCK and with a full counter: never sleep in it.
  int ready = ReadyNow(fd, POLLOUT);
  if (ready < 0) return Result(info, ready);
  if (ready == 0) return Number(info, -EAGAIN);
  ssize_t written = write(fd, &value, sizeof value);
  if (written < 0) return Result(info, written);
  return Number(info, written == sizeof value ? 0 : -EINVAL);
}

static Napi::Value EventfdRead(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  if (args.failed()) return Undefined(info);
  uint64_t value = 0;
  struct iovec iov = {&value, sizeof value};
  // RWF_NOWAIT: -EAGAIN also when a stranger's eventfd has no O_NONBLOCK.
  ssize_t got = preadv2(fd, &iov, 1, -1, RWF_NOWAIT);
  if (got < 0 && (errno == EOPNOTSUPP || errno == ENOSYS)) {
    int ready = ReadyNow(fd, POLLIN);
    if (ready < 0) return Result(info, ready);
    if (ready == 0) return Number(info, -EAGAIN);
    got = read(fd, &value, sizeof value);
  }
  if (got < 0) return Result(info, got);
  return Number(info, got == sizeof value ? static_cast<double>(value) : -EINVAL);
}

static Napi::Value PollIn(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  int timeout = args.Int32(1, "timeoutMs");
  if (args.failed()) return Undefined(info);
  struct pollfd pfd = {fd, POLLIN, 0};
  int ready = poll(&pfd, 1, timeout);
  if (ready > 0 && (pfd.revents & POLLNVAL) != 0) return Number(info, -EBADF);
  return Result(info, ready);
}

/** Both ends of a pipe of our own, for one call. */
struct OwnPipe {
  int ends[2] = {-1, -1};
  ~OwnPipe() {
    for (int fd : ends) {
      if (fd >= 0) CloseQuietly(fd);
    }
  }
  int Open() { return pipe2(ends, O_CLOEXEC | O_NONBLOCK); }
};

// A stranger's pipe: whoever has a duplicate of the fd can take O_NONBLOCK away at any time, also between a poll and a
// read. SPLICE_F_NONBLOCK is the call's own, unlike RWF_NOWAIT also for pipes before Linux 6.5 and for FIFOs.

static Napi::Value ReadPipe(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  Span<uint8_t> buffer = args.Bytes(1, "buffer");
  if (args.failed()) return Undefined(info);
  OwnPipe own;
  if (own.Open() < 0) return Result(info, -1);
  ssize_t moved = splice(fd, nullptr, own.ends[1], nullptr, buffer.length, SPLICE_F_NONBLOCK);
  if (moved <= 0) return Result(info, moved);
  return Result(info, read(own.ends[0], buffer.data, static_cast<size_t>(moved)));
}

static Napi::Value WritePipe(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  Span<uint8_t> buffer = args.Bytes(1, "buffer");
  if (args.failed()) return Undefined(info);
  OwnPipe own;
  if (own.Open() < 0) return Result(info, -1);
  ssize_t held = write(own.ends[1], buffer.data, buffer.length);
  if (held <= 0) return Result(info, held);
  // What does not go on is lost with our pipe: the caller still has it.
  return Result(info, splice(own.ends[0], nullptr, fd, nullptr, static_cast<size_t>(held), SPLICE_F_NONBLOCK));
}

static Napi::Value Memfd(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string name = args.String(0, "name");
  uint64_t size = args.Size(1, "size");
  uint64_t huge = args.Size(2, "hugePageBytes");
  if (args.failed()) return Undefined(info);
  unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  if (huge != 0) {
    if ((huge & (huge - 1)) != 0) return Number(info, -EINVAL);
    flags |= MFD_HUGETLB | static_cast<unsigned>(__builtin_ctzll(huge)) << MFD_HUGE_SHIFT;
  }
  int fd = memfd_create(name.c_str(), flags);
  if (fd >= 0 && ftruncate(fd, static_cast<off_t>(size)) < 0) {
    CloseQuietly(fd);
    fd = -1;
  }
  return Result(info, fd);
}

static Napi::Value SealFile(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  int seals = args.Int32(1, "seals");
  if (args.failed()) return Undefined(info);
  return Result(info, fcntl(fd, F_ADD_SEALS, seals));
}

static Napi::Value LockFile(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  bool exclusive = args.Bool(1, "exclusive");
  if (args.failed()) return Undefined(info);
  struct flock lock = {};
  lock.l_type = exclusive ? F_WRLCK : F_RDLCK;
  lock.l_whence = SEEK_SET;
  int result = fcntl(fd, F_OFD_SETLK, &lock);
  if (result < 0 && errno == EACCES) errno = EAGAIN;
  return Result(info, result);
}

static Napi::Value Fallocate(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  int mode = args.Int32(1, "mode");
  uint64_t offset = args.Size(2, "offset");
  uint64_t length = args.Size(3, "length");
  if (args.failed()) return Undefined(info);
  return Result(info, fallocate(fd, mode, static_cast<off_t>(offset), static_cast<off_t>(length)));
}

void InitFd(Napi::Env env, Napi::Object exports) {
  Export<Close>(env, exports, "close");
  Export<Dup>(env, exports, "dup");
  Export<SetNonblock>(env, exports, "setNonblock");
  Export<FdInfo>(env, exports, "fdInfo");
  Export<Eventfd>(env, exports, "eventfd");
  Export<EventfdWrite>(env, exports, "eventfdWrite");
  Export<EventfdRead>(env, exports, "eventfdRead");
  Export<PollIn>(env, exports, "pollIn");
  Export<ReadPipe>(env, exports, "readPipe");
  Export<WritePipe>(env, exports, "writePipe");
  Export<Memfd>(env, exports, "memfd");
  Export<SealFile>(env, exports, "sealFile");
  Export<LockFile>(env, exports, "lockFile");
  Export<Fallocate>(env, exports, "fallocate");
}

}  // namespace virtiod
