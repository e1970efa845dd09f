// The emulation of io_uring for kernels and containers without it: the same queues in anonymous memory, each entry
// executed at once by a plain system call, polls by an edge-triggered epoll instance.
//
// An EmulatedRing owns its epoll fd and one dup of every polled fd: epoll takes one registration per fd, io_uring any
// number of polls. It executes only what virtiod's engine submits; everything else completes with -EINVAL.
//
// One difference is inherent: an entry is executed now or never. A read of a pipe, socket or tap with nothing in it
// blocks this thread, or is -EAGAIN with O_NONBLOCK, where io_uring would complete it later: poll such an fd first.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>

#include <algorithm>
#include <vector>

#include "uring.h"

#ifndef SYS_epoll_pwait2
#define SYS_epoll_pwait2 441
#endif

namespace virtiod {

class EmulatedRing final : public Ring {
 public:
  ~EmulatedRing() override { Close(); }

  /** 0 or an errno. */
  int Setup(unsigned entries, unsigned cqEntries);
  int Enter() override;
  int RegisterFile(unsigned, int) override { return fd < 0 ? -EBADF : -EOPNOTSUPP; }
  void Close() override;

 private:
  struct Poll {
    uint64_t userData;
    int polledFd;    // the number that the caller gave
    int dup;         // ours, in the epoll instance; -1: the slot is free
    uint32_t token;  // counts the uses of the slot: an event of an earlier use is not delivered
    bool multishot;
  };
  struct Outcome {
    int32_t result;
    bool failed;  // as the kernel sees it: a short transfer breaks a link and is always reported
    bool pending = false;
  };

  uint32_t Queued() const {
    return cqTail_ - __atomic_load_n(At<uint32_t>(layout.cqHead), __ATOMIC_ACQUIRE);
  }
  uint32_t Space() const {
    uint32_t queued = Queued();
    return queued >= layout.cqEntries ? 0 : layout.cqEntries - queued;
  }
  void Complete(uint64_t userData, int32_t result, uint32_t flags);
  unsigned Submit(unsigned count);
  Outcome Execute(const struct io_uring_sqe& sqe);
  Outcome Transfer(const struct io_uring_sqe& sqe, bool write, const struct iovec* vectors, int count);
  Outcome AddPoll(const struct io_uring_sqe& sqe);
  Outcome Cancel(const struct io_uring_sqe& sqe);
  bool Matches(const Poll& poll, const struct io_uring_sqe& sqe) const;
  uint32_t SpaceNeeded(const struct io_uring_sqe& sqe) const;
  void DropPoll(Poll& poll);
  int WaitEvents(const struct timespec* timeout);
  int Reap(unsigned minComplete, int32_t microseconds);
  int Wait(unsigned minComplete, int32_t microseconds);

  std::vector<Poll> polls_;
  uint32_t sqHead_ = 0;
  uint32_t cqTail_ = 0;
  bool inLink_ = false;
  bool linkFailed_ = false;
  bool noPwait2_ = false;
};

static uint32_t PowerOfTwo(uint32_t value) {
  uint32_t power = 1;
  while (power < value) power <<= 1;
  return power;
}

int EmulatedRing::Setup(unsigned entries, unsigned cqEntries) {
  entries = PowerOfTwo(entries);
  cqEntries = std::max(PowerOfTwo(cqEntries), 2U);  // a cancellation completes twice: the poll and itself
  if (entries > 32768 || cqEntries > 65536) return EINVAL;  // the kernel's limits
  fd = epoll_create1(EPOLL_CLOEXEC);
  if (fd < 0) return errno;
  // Each word in a cache line of its own, in the kernel's order; there is no index array.
  layout = {entries, cqEntries, 0, 64, 128, 192, 256, 320, 384};
  rings = AllocateRegion(layout.cqes + cqEntries * sizeof(struct io_uring_cqe));
  sqes = AllocateRegion(entries * sizeof(struct io_uring_sqe));
  return rings == nullptr || sqes == nullptr || !AllocateControl() ? errno : 0;
}

void EmulatedRing::Complete(uint64_t userData, int32_t result, uint32_t flags) {
  struct io_uring_cqe& cqe = At<struct io_uring_cqe>(layout.cqes)[cqTail_ & (layout.cqEntries - 1)];
  cqe.user_data = userData;
  cqe.res = result;
  cqe.flags = flags;
  cqTail_++;
  __atomic_store_n(At<uint32_t>(layout.cqTail), cqTail_, __ATOMIC_RELEASE);
}

int EmulatedRing::Enter() {
  if (fd < 0) return -EBADF;
  const Control& wanted = *arguments();
  unsigned submitted = Submit(static_cast<unsigned>(wanted.toSubmit));
  int waited = 0;
  bool direct = RunDirect() > 0;
  if ((wanted.flags & IORING_ENTER_GETEVENTS) != 0) {
    unsigned minComplete = direct ? 0 : std::min(static_cast<unsigned>(wanted.minComplete), layout.cqEntries);
    waited = Reap(wanted.timeoutMicroseconds == 0 ? 0 : minComplete, wanted.timeoutMicroseconds);
  }
  return submitted > 0 ? static_cast<int>(submitted) : waited;
}

// ---- submission

unsigned EmulatedRing::Submit(unsigned count) {
  uint32_t tail = __atomic_load_n(At<uint32_t>(layout.sqTail), __ATOMIC_ACQUIRE);
  count = std::min({count, tail - sqHead_, layout.sqEntries});
  unsigned done = 0;
  for (; done < count; done++) {
    // A copy: what is executed is what was looked at.
    const struct io_uring_sqe sqe = static_cast<struct io_uring_sqe*>(sqes->base())[sqHead_ & (layout.sqEntries - 1)];
    if (Space() < SpaceNeeded(sqe)) break;
    sqHead_++;
    __atomic_store_n(At<uint32_t>(layout.sqHead), sqHead_, __ATOMIC_RELEASE);
    Outcome outcome = inLink_ && linkFailed_ ? Outcome{-ECANCELED, true} : Execute(sqe);
    if (!inLink_) linkFailed_ = false;
    linkFailed_ = linkFailed_ || (outcome.failed && (sqe.flags & IOSQE_IO_HARDLINK) == 0);
    inLink_ = (sqe.flags & (IOSQE_IO_LINK | IOSQE_IO_HARDLINK)) != 0;
    if (!outcome.pending && (outcome.failed || (sqe.flags & IOSQE_CQE_SKIP_SUCCESS) == 0)) {
      Complete(sqe.user_data, outcome.result, 0);
    }
  }
  if (done == count) inLink_ = false;  // a chain ends with its submission
  return done;
}

uint32_t EmulatedRing::SpaceNeeded(const struct io_uring_sqe& sqe) const {
  if (sqe.opcode != IORING_OP_POLL_REMOVE && sqe.opcode != IORING_OP_ASYNC_CANCEL) return 1;
  auto matching = std::count_if(polls_.begin(), polls_.end(), [&](const Poll& poll) { return Matches(poll, sqe); });
  // With a queue smaller than the number of its polls a cancellation of all of them goes on in pieces; see Cancel.
  return std::min(static_cast<uint32_t>(matching) + 1, layout.cqEntries);
}

EmulatedRing::Outcome EmulatedRing::Execute(const struct io_uring_sqe& sqe) {
  auto plain = [](int result) { return Outcome{result < 0 ? -errno : result, result < 0}; };
  if ((sqe.flags & IOSQE_FIXED_FILE) != 0 && sqe.opcode != IORING_OP_NOP) return {-EBADF, true};
  // SAFETY: addresses in an entry are the caller's promise, exactly as for io_uring; a wrong one is EFAULT from the
  // kernel, which does the access, never a fault here. Only the vectors' sum in Transfer is read by ourselves, through
  // the kernel.
  switch (sqe.opcode) {
    case IORING_OP_NOP:
      return {0, false};
    case IORING_OP_READV:
    case IORING_OP_WRITEV:
      return Transfer(sqe, sqe.opcode == IORING_OP_WRITEV, reinterpret_cast<const struct iovec*>(sqe.addr),
                      static_cast<int>(sqe.len));
    case IORING_OP_READ:
    case IORING_OP_WRITE: {
      struct iovec vector = {reinterpret_cast<void*>(sqe.addr), sqe.len};
      return Transfer(sqe, sqe.opcode == IORING_OP_WRITE, &vector, 1);
    }
    case IORING_OP_FSYNC:
      if ((sqe.fsync_flags & ~IORING_FSYNC_DATASYNC) != 0) return {-EINVAL, true};
      return plain((sqe.fsync_flags & IORING_FSYNC_DATASYNC) != 0 ? fdatasync(sqe.fd) : fsync(sqe.fd));
    case IORING_OP_FALLOCATE:
      return plain(fallocate(sqe.fd, static_cast<int>(sqe.len), static_cast<off_t>(sqe.off),
                             static_cast<off_t>(sqe.addr)));
    case IORING_OP_POLL_ADD:
      return AddPoll(sqe);
    case IORING_OP_POLL_REMOVE:
    case IORING_OP_ASYNC_CANCEL:
      return Cancel(sqe);
    default:
      return {-EINVAL, true};
  }
}

EmulatedRing::Outcome EmulatedRing::Transfer(const struct io_uring_sqe& sqe, bool write, const struct iovec* vectors,
                                             int count) {
  if (write && sqe.off == UINT64_MAX) {
    // A write without a position is to an eventfd, and its other owner may have made it blocking: one that is full must
    // not hold this thread.
    struct pollfd ready = {sqe.fd, POLLOUT, 0};
    if (poll(&ready, 1, 0) == 0) return {-EAGAIN, true};
  }
  auto transfer = [&](off_t offset) {
    int flags = static_cast<int>(sqe.rw_flags);
    return write ? pwritev2(sqe.fd, vectors, count, offset, flags) : preadv2(sqe.fd, vectors, count, offset, flags);
  };
  ssize_t result = transfer(static_cast<off_t>(sqe.off));
  // io_uring ignores the offset of a file without positions (an eventfd, a pipe, a tap); preadv2 wants -1 for those.
  if (result < 0 && errno == ESPIPE && sqe.off != UINT64_MAX) result = transfer(-1);
  if (result < 0) return {-errno, true};
  uint64_t wanted = 0;
  for (int i = 0; i < count; i++) wanted += vectors[i].iov_len;
  return {static_cast<int32_t>(result), static_cast<uint64_t>(result) != wanted};
}

// ---- polls

EmulatedRing::Outcome EmulatedRing::AddPoll(const struct io_uring_sqe& sqe) {
  if ((sqe.len & ~IORING_POLL_ADD_MULTI) != 0 || (sqe.flags & (IOSQE_IO_LINK | IOSQE_IO_HARDLINK)) != 0) {
    return {-EINVAL, true};
  }
  bool multishot = (sqe.len & IORING_POLL_ADD_MULTI) != 0;
  size_t index = 0;
  while (index < polls_.size() && polls_[index].dup >= 0) index++;
  if (index == polls_.size()) polls_.push_back({0, -1, -1, 0, false});
  Poll& poll = polls_[index];
  int dup = fcntl(sqe.fd, F_DUPFD_CLOEXEC, 0);
  if (dup < 0) return {-errno, true};
  poll = {sqe.user_data, sqe.fd, dup, poll.token + 1, multishot};
  struct epoll_event event = {};
  event.events = sqe.poll32_events | EPOLLET | (multishot ? 0U : static_cast<uint32_t>(EPOLLONESHOT));
  event.data.u64 = static_cast<uint64_t>(poll.token) << 32 | index;
  if (epoll_ctl(fd, EPOLL_CTL_ADD, dup, &event) == 0) return {0, false, true};
  int error = errno;
  DropPoll(poll);
  if (error != EPERM) return {-error, true};
  // A file without poll support, such as a regular one, is always ready and completes at once, in the kernel too.
  return {static_cast<int32_t>(sqe.poll32_events & (POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM)), false};
}

void EmulatedRing::DropPoll(Poll& poll) {
  // Not by the close alone: whoever else holds the open file description would keep the registration alive.
  epoll_ctl(fd, EPOLL_CTL_DEL, poll.dup, nullptr);
  close(poll.dup);
  poll.dup = -1;
}

bool EmulatedRing::Matches(const Poll& poll, const struct io_uring_sqe& sqe) const {
  if (poll.dup < 0) return false;
  if (sqe.opcode == IORING_OP_ASYNC_CANCEL) {
    if ((sqe.cancel_flags & IORING_ASYNC_CANCEL_ANY) != 0) return true;
    if ((sqe.cancel_flags & IORING_ASYNC_CANCEL_FD) != 0) return poll.polledFd == sqe.fd;
  }
  return poll.userData == sqe.addr;
}

EmulatedRing::Outcome EmulatedRing::Cancel(const struct io_uring_sqe& sqe) {
  bool all = false;
  if (sqe.opcode == IORING_OP_ASYNC_CANCEL) {
    constexpr uint32_t kKnown = IORING_ASYNC_CANCEL_ALL | IORING_ASYNC_CANCEL_FD | IORING_ASYNC_CANCEL_ANY;
    if ((sqe.cancel_flags & ~kKnown) != 0) return {-EINVAL, true};
    all = (sqe.cancel_flags & (IORING_ASYNC_CANCEL_ALL | IORING_ASYNC_CANCEL_ANY)) != 0;
  } else if (sqe.len != 0) {
    return {-EINVAL, true};  // updates of a poll
  }
  int32_t count = 0;
  for (Poll& poll : polls_) {
    if (!Matches(poll, sqe)) continue;
    if (Space() < 2) break;  // one is for this entry itself
    DropPoll(poll);
    Complete(poll.userData, -ECANCELED, 0);
    count++;
    if (!all) break;
  }
  if (count == 0) return {-ENOENT, true};
  return {all ? count : 0, false};
}

// ---- waiting

/** Turns ready polls into completions, as many as there is room for. The number of events, or -errno. */
int EmulatedRing::WaitEvents(const struct timespec* timeout) {
  struct epoll_event events[64];
  int room = static_cast<int>(std::min<uint32_t>(Space(), 64));
  if (room == 0) return 0;  // what is not fetched stays ready in the epoll instance: nothing is lost
  long count = -1;
  errno = ENOSYS;
  if (!noPwait2_) count = syscall(SYS_epoll_pwait2, fd, events, room, timeout, nullptr, 0);
  if (count < 0 && (errno == ENOSYS || errno == EPERM)) {
    noPwait2_ = true;  // before Linux 5.11, or a seccomp filter that does not know it: round up to milliseconds
    int64_t milliseconds = timeout == nullptr ? -1 : timeout->tv_sec * 1000 + (timeout->tv_nsec + 999999) / 1000000;
    count = epoll_wait(fd, events, room, static_cast<int>(milliseconds));
  }
  if (count < 0) return -errno;
  for (long i = 0; i < count; i++) {
    size_t index = static_cast<uint32_t>(events[i].data.u64);
    if (index >= polls_.size()) continue;
    Poll& poll = polls_[index];
    if (poll.dup < 0 || poll.token != static_cast<uint32_t>(events[i].data.u64 >> 32)) continue;
    uint64_t userData = poll.userData;
    bool multishot = poll.multishot;
    if (!multishot) DropPoll(poll);
    Complete(userData, static_cast<int32_t>(events[i].events), multishot ? IORING_CQE_F_MORE : 0);
  }
  return static_cast<int>(count);
}

/** Waits for `minComplete` completions. 0, or an error, which as in the kernel completions that are there hide. */
int EmulatedRing::Reap(unsigned minComplete, int32_t microseconds) {
  int result = Wait(minComplete, microseconds);
  return Queued() > 0 ? 0 : result;
}

int EmulatedRing::Wait(unsigned minComplete, int32_t microseconds) {
  const struct timespec now = {0, 0};
  int result = WaitEvents(&now);
  if (result < 0 || Queued() >= minComplete) return std::min(result, 0);
  struct timespec clock;
  clock_gettime(CLOCK_MONOTONIC, &clock);
  int64_t deadline = clock.tv_sec * 1000000000LL + clock.tv_nsec + microseconds * 1000LL;
  while (Queued() < minComplete) {
    struct timespec left = {};
    if (microseconds >= 0) {
      clock_gettime(CLOCK_MONOTONIC, &clock);
      int64_t nanoseconds = deadline - (clock.tv_sec * 1000000000LL + clock.tv_nsec);
      if (nanoseconds <= 0) return -ETIME;
      left = {static_cast<time_t>(nanoseconds / 1000000000), static_cast<long>(nanoseconds % 1000000000)};
    }
    result = WaitEvents(microseconds >= 0 ? &left : nullptr);
    if (result < 0) return result;
  }
  return 0;
}

void EmulatedRing::Close() {
  if (fd >= 0) {
    for (Poll& poll : polls_) {
      if (poll.dup >= 0) DropPoll(poll);
    }
    close(fd);
    fd = -1;
  }
  CloseMemory();
}

std::unique_ptr<Ring> SetupEmulatedRing(unsigned entries, unsigned cqEntries) {
  auto ring = std::make_unique<EmulatedRing>();
  int error = ring->Setup(entries, cqEntries);
  if (error == 0) return ring;
  ring.reset();
  errno = error;
  return nullptr;
}

}  // namespace virtiod
