// io_uring by raw system calls, and the JavaScript object around a ring of either kind.
//
// A KernelRing owns its fd, its registered-ring slot and one reference to each of its mappings. The ring itself
// belongs to the JavaScript functions of its NativeRing object: when the last of them is collected, or the environment
// ends, it is closed.
#include "uring.h"

#include <linux/time_types.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>

#include <algorithm>
#include <cstring>

namespace virtiod {

/** Where the result of a direct entry is left in its entry: the last word, which io_uring has no use for. */
constexpr size_t kDirectResult = 60;

static int Register(int fd, unsigned operation, const void* argument, unsigned count) {
  return static_cast<int>(syscall(SYS_io_uring_register, fd, operation, argument, count));
}

Region* AllocateRegion(size_t length) {
  length = RoundToPage(length);
  void* base = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return base == MAP_FAILED ? nullptr : new Region(base, length);
}

bool Ring::AllocateControl() {
  control = AllocateRegion(sizeof(Control));
  direct = AllocateRegion(kDirectEntries * sizeof(struct io_uring_sqe));
  if (control == nullptr || direct == nullptr) return false;
  arguments()->timeoutMicroseconds = -1;
  return true;
}

static int64_t Nanoseconds() {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/** Copies out of or into a mapped file, where a page fault waits or the SIGBUS guard steps in. Returns the bytes. */
static int64_t Copy(const struct iovec* vectors, int count, char* mapped, bool write) {
  int64_t copied = 0;
  for (int i = 0; i < count; i++) {
    if (write) {
      memcpy(mapped + copied, vectors[i].iov_base, vectors[i].iov_len);
    } else {
      memcpy(vectors[i].iov_base, mapped + copied, vectors[i].iov_len);
    }
    copied += static_cast<int64_t>(vectors[i].iov_len);
  }
  return copied;
}

/** Looks at what this thread has waited for so far. False when the kernel doesn't tell. */
static bool Look(long* majorFaults, long* switches) {
  struct rusage usage;
  if (getrusage(RUSAGE_THREAD, &usage) < 0) return false;
  *majorFaults = usage.ru_majflt;
  *switches = usage.ru_nvcsw;
  return true;
}

/**
 * Whether this thread, which was slow, read a page from the disk since the batch began, or, when that counts, slept for
 * any reason. The first slow entry gets the benefit of the doubt: only from then on, and for a while, batches begin with
 * a look (150 ns).
 */
bool Ring::Waited(bool sleepCounts) {
  bool looked = lookBatches_ > 0;
  lookBatches_ = kLookBatches;
  long majorFaults = majorFaults_;
  long switches = switches_;
  if (!Look(&majorFaults_, &switches_)) return true;
  return looked && (majorFaults_ != majorFaults || (sleepCounts && switches_ != switches));
}

int Ring::RunDirect() {
  // A copy from or to the page cache runs at a gigabyte per second at least; what took longer by this has waited: for the
  // disk, or only for its processor, which rusage tells apart.
  constexpr int64_t kSlowCopy = 50000;
  constexpr int64_t kSlowWrite = 1000000;
  unsigned start = std::min(static_cast<unsigned>(arguments()->directStart), kDirectEntries);
  unsigned count = std::min(static_cast<unsigned>(arguments()->directCount), kDirectEntries - start);
  uint32_t faults = FaultTotal();
  bool refuseCopies = false;
  bool refuseWrites = false;
  int32_t& waited = arguments()->waited;
  waited = 0;
  if (lookBatches_ > 0) {
    lookBatches_--;
    Look(&majorFaults_, &switches_);
  }
  int64_t before = Nanoseconds();
  for (unsigned i = start; i < start + count; i++) {
    struct io_uring_sqe& sqe = static_cast<struct io_uring_sqe*>(direct->base())[i];
    bool vectored = sqe.opcode == IORING_OP_WRITEV || sqe.opcode == IORING_OP_READV;
    bool write = sqe.opcode == IORING_OP_WRITE || sqe.opcode == IORING_OP_WRITEV;
    bool copy = !write || sqe.fd < 0;
    // SAFETY: as for entries of the submission queue the addresses are the caller's promise: inside guest memory, and for
    // a copy `off` inside a mapping that it holds. What is missing under them is the SIGBUS guard's.
    struct iovec one = {reinterpret_cast<void*>(sqe.addr), sqe.len};
    const struct iovec* vectors = vectored ? reinterpret_cast<const struct iovec*>(sqe.addr) : &one;
    int vectorCount = vectored ? static_cast<int>(sqe.len) : 1;
    int64_t result = -EAGAIN;
    if (copy ? !refuseCopies : !refuseWrites) {
      result = copy ? Copy(vectors, vectorCount, reinterpret_cast<char*>(sqe.off), write)
                    : pwritev(sqe.fd, vectors, vectorCount, static_cast<off_t>(sqe.off));
      if (result < 0) result = -errno;
      int64_t after = Nanoseconds();
      if (copy && FaultTotal() != faults) {
        result = -EFAULT;
        waited |= kCopyFaulted;
        refuseCopies = true;
      } else if (after - before > (copy ? kSlowCopy : kSlowWrite) + result && Waited(write)) {
        (copy ? refuseCopies : refuseWrites) = true;
        waited |= copy ? kCopyWaited : kWriteWaited;
      }
      before = after;
    }
    int32_t answer = static_cast<int32_t>(result);
    memcpy(reinterpret_cast<char*>(&sqe) + kDirectResult, &answer, sizeof answer);
  }
  return static_cast<int>(count);
}

void Ring::CloseMemory() {
  for (Region** region : {&rings, &sqes, &control, &direct}) {
    if (*region == nullptr) continue;
    LayAnonymous((*region)->base(), (*region)->length());
    (*region)->Unref();
    *region = nullptr;
  }
}

class KernelRing final : public Ring {
 public:
  ~KernelRing() override { Close(); }

  /** 0 or an errno. */
  int Setup(unsigned entries, unsigned cqEntries, bool pollable);
  int Enter() override;
  int RegisterFile(unsigned slot, int file) override;
  void Close() override;

 private:
  bool Map(const struct io_uring_params& params);

  int enterFd_ = -1;  // the registered index, or the fd itself where the kernel has no registered rings
  unsigned enterFlags_ = 0;
  bool filesRegistered_ = false;
};

int KernelRing::Setup(unsigned entries, unsigned cqEntries, bool pollable) {
  constexpr unsigned kDeferred =
      IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL;
  constexpr unsigned kAttempts[] = {
      kDeferred,
      IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL,
      0,
  };
  struct io_uring_params params;
  for (unsigned flags : kAttempts) {
    // Deferred work is a completion only after `Enter`, and nobody who polls the fd is woken for it. A registered eventfd is
    // no way out: on Linux 6.18 it is signalled just once for polls that an eventfd's write ends.
    if (pollable && flags == kDeferred) continue;
    memset(&params, 0, sizeof params);
    params.flags = flags | IORING_SETUP_CQSIZE;
    params.cq_entries = cqEntries;
    fd = static_cast<int>(syscall(SYS_io_uring_setup, entries, &params));
    // EINVAL: a flag that this kernel does not know, or a size that no kernel accepts.
    if (fd >= 0 || errno != EINVAL) break;
  }
  if (fd < 0) return errno;
  constexpr unsigned kNeeded = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;
  if ((params.features & kNeeded) != kNeeded) return ENOSYS;
  setupFlags = params.flags;
  if (!Map(params) || !AllocateControl()) return errno;

  // Both are optional: without them the caller uses plain fds, and `Enter` pays for one fd lookup.
  struct io_uring_rsrc_update ringUpdate = {};
  ringUpdate.offset = UINT32_MAX;  // any free index
  ringUpdate.data = static_cast<uint32_t>(fd);
  enterFd_ = fd;
  if (Register(fd, IORING_REGISTER_RING_FDS, &ringUpdate, 1) == 1) {
    enterFd_ = static_cast<int>(ringUpdate.offset);
    enterFlags_ = IORING_ENTER_REGISTERED_RING;
  }
  struct io_uring_rsrc_register files = {};
  files.nr = kFixedFiles;
  files.flags = IORING_RSRC_REGISTER_SPARSE;
  if (Register(fd, IORING_REGISTER_FILES2, &files, sizeof files) == 0) {
    filesRegistered_ = true;
  } else {
    int32_t empty[kFixedFiles];
    std::fill_n(empty, kFixedFiles, -1);
    filesRegistered_ = Register(fd, IORING_REGISTER_FILES, empty, kFixedFiles) == 0;
  }
  return 0;
}

bool KernelRing::Map(const struct io_uring_params& params) {
  size_t sqBytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
  size_t cqBytes = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
  size_t ringBytes = RoundToPage(std::max(sqBytes, cqBytes));
  size_t sqeBytes = RoundToPage(params.sq_entries * sizeof(struct io_uring_sqe));
  void* base = mmap(nullptr, ringBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQ_RING);
  if (base == MAP_FAILED) return false;
  rings = new Region(base, ringBytes);
  base = mmap(nullptr, sqeBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQES);
  if (base == MAP_FAILED) return false;
  sqes = new Region(base, sqeBytes);
  // The index array stays the identity: entry i of the queue is sqe i.
  for (uint32_t i = 0; i < params.sq_entries; i++) At<uint32_t>(params.sq_off.array)[i] = i;
  layout.sqEntries = params.sq_entries;
  layout.cqEntries = params.cq_entries;
  layout.sqHead = params.sq_off.head;
  layout.sqTail = params.sq_off.tail;
  layout.sqFlags = params.sq_off.flags;
  layout.cqHead = params.cq_off.head;
  layout.cqTail = params.cq_off.tail;
  layout.cqOverflow = params.cq_off.overflow;
  layout.cqes = params.cq_off.cqes;
  return true;
}

int KernelRing::Enter() {
  if (fd < 0) return -EBADF;
  const Control& wanted = *arguments();
  unsigned flags = static_cast<unsigned>(wanted.flags) | enterFlags_;
  unsigned minComplete = static_cast<unsigned>(wanted.minComplete);
  int32_t microseconds = wanted.timeoutMicroseconds;
  unsigned toSubmit = static_cast<unsigned>(wanted.toSubmit);
  // With direct entries there are completions at hand, so the kernel is not asked to wait, and not at all when the caller
  // neither submits nor reaps. Calls and other I/O go out first: driver and disk work on them meanwhile.
  if (wanted.directCount > 0) {
    long submitted = 0;
    if (toSubmit > 0 || (wanted.flags & IORING_ENTER_GETEVENTS) != 0) {
      submitted = syscall(SYS_io_uring_enter, enterFd_, toSubmit, 0, flags, nullptr, 0);
      if (submitted < 0) submitted = -errno;
    }
    RunDirect();
    return static_cast<int>(submitted);
  }
  long result;
  if (microseconds > 0 && (flags & IORING_ENTER_GETEVENTS) != 0) {
    struct __kernel_timespec timeout = {microseconds / 1000000, microseconds % 1000000 * 1000};
    struct io_uring_getevents_arg argument = {};
    argument.ts = reinterpret_cast<uint64_t>(&timeout);
    flags |= IORING_ENTER_EXT_ARG;
    result = syscall(SYS_io_uring_enter, enterFd_, toSubmit, minComplete, flags, &argument, sizeof argument);
  } else {
    // A timeout of 0 asks for no wait at all, which is cheaper than a timer that has already fired.
    if (microseconds == 0) minComplete = 0;
    result = syscall(SYS_io_uring_enter, enterFd_, toSubmit, minComplete, flags, nullptr, 0);
  }
  return result < 0 ? -errno : static_cast<int>(result);
}

int KernelRing::RegisterFile(unsigned slot, int file) {
  if (fd < 0) return -EBADF;
  if (!filesRegistered_) return -EOPNOTSUPP;
  struct io_uring_files_update update = {};
  update.offset = slot;
  update.fds = reinterpret_cast<uint64_t>(&file);
  int result = Register(fd, IORING_REGISTER_FILES_UPDATE, &update, 1);
  return result < 0 ? -errno : 0;
}

void KernelRing::Close() {
  if (fd >= 0) {
    if ((enterFlags_ & IORING_ENTER_REGISTERED_RING) != 0) {
      // The registration is a reference of this thread's to the ring; without this it would live as long as the thread.
      struct io_uring_rsrc_update update = {};
      update.offset = static_cast<uint32_t>(enterFd_);
      Register(fd, IORING_UNREGISTER_RING_FDS, &update, 1);
    }
    close(fd);
    fd = -1;
  }
  CloseMemory();
}

// ---- the JavaScript object

using SharedRing = std::shared_ptr<Ring>;

/** The hot call: no arguments, one integer back. */
static napi_value EnterCallback(napi_env env, napi_callback_info info) {
  void* data = nullptr;
  napi_get_cb_info(env, info, nullptr, nullptr, nullptr, &data);
  // SAFETY: `data` is the SharedRing that this function's finalizer deletes, so it lives as long as the function.
  int result = (*static_cast<SharedRing*>(data))->Enter();
  napi_value value = nullptr;
  napi_create_int32(env, result, &value);
  return value;
}

static Napi::Value RingObject(Napi::Env env, SharedRing ring) {
  Napi::Object object = Napi::Object::New(env);
  const RingLayout& layout = ring->layout;
  const struct {
    const char* name;
    double value;
  } numbers[] = {{"fd", static_cast<double>(ring->fd)},
                 {"sqEntries", static_cast<double>(layout.sqEntries)},
                 {"cqEntries", static_cast<double>(layout.cqEntries)},
                 {"sqHead", static_cast<double>(layout.sqHead)},
                 {"sqTail", static_cast<double>(layout.sqTail)},
                 {"sqFlags", static_cast<double>(layout.sqFlags)},
                 {"cqHead", static_cast<double>(layout.cqHead)},
                 {"cqTail", static_cast<double>(layout.cqTail)},
                 {"cqOverflow", static_cast<double>(layout.cqOverflow)},
                 {"cqes", static_cast<double>(layout.cqes)},
                 {"setupFlags", static_cast<double>(ring->setupFlags)}};
  for (const auto& number : numbers) object.Set(number.name, Napi::Number::New(env, number.value));

  const struct {
    const char* name;
    Region* region;
    size_t length;
  } buffers[] = {{"rings", ring->rings, ring->rings->length()},
                 {"sqes", ring->sqes, layout.sqEntries * sizeof(struct io_uring_sqe)},
                 {"control", ring->control, sizeof(Control)},
                 {"direct", ring->direct, kDirectEntries * sizeof(struct io_uring_sqe)}};
  for (const auto& entry : buffers) {
    Napi::Value buffer = entry.region->ToBuffer(env, entry.length);
    if (buffer.IsEmpty()) return env.Undefined();  // the exception is pending; `ring` closes itself
    object.Set(entry.name, buffer);
  }

  auto* held = new SharedRing(ring);
  napi_value enter = nullptr;
  if (napi_create_function(env, "enter", NAPI_AUTO_LENGTH, EnterCallback, held, &enter) != napi_ok ||
      napi_add_finalizer(env, enter, held,
                         [](napi_env, void* data, void*) { delete static_cast<SharedRing*>(data); }, nullptr,
                         nullptr) != napi_ok) {
    delete held;
    Napi::Error::New(env, "cannot create a function").ThrowAsJavaScriptException();
    return env.Undefined();
  }
  object.Set("enter", enter);

  auto registerFile = [ring](const Napi::CallbackInfo& info) -> Napi::Value {
    Args args(info);
    unsigned slot = static_cast<unsigned>(args.Integer(0, "slot", 0, UINT32_MAX));
    int file = args.Int32(1, "fd");
    return args.failed() ? Undefined(info) : Number(info, ring->RegisterFile(slot, file));
  };
  object.Set("registerFile", Napi::Function::New(env, registerFile, "registerFile"));
  object.Set("close", Napi::Function::New(env, [ring](const Napi::CallbackInfo&) { ring->Close(); }, "close"));
  return object;
}

static Napi::Value RingSetup(const Napi::CallbackInfo& info) {
  Args args(info);
  unsigned entries = static_cast<unsigned>(args.Integer(0, "entries", 1, 1 << 20));
  unsigned cqEntries = static_cast<unsigned>(args.Integer(1, "cqEntries", 1, 1 << 20));
  bool emulate = args.Bool(2, "emulate");
  bool pollable = info.Length() > 3 && args.Bool(3, "pollable");
  if (args.failed() || !HaveExternalSharedArrayBuffer(info.Env())) return Undefined(info);
  // The kernel rounds both up to powers of two and refuses a completion queue that is then the smaller one.
  cqEntries = std::max(entries, cqEntries);
  if (emulate) {
    SharedRing ring = SetupEmulatedRing(entries, cqEntries);
    return ring == nullptr ? Result(info, -1) : RingObject(info.Env(), std::move(ring));
  }
  auto ring = std::make_shared<KernelRing>();
  int error = ring->Setup(entries, cqEntries, pollable);
  return error != 0 ? Number(info, -error) : RingObject(info.Env(), std::move(ring));
}

void InitUring(Napi::Env env, Napi::Object exports) {
  Export<RingSetup>(env, exports, "ringSetup");
}

}  // namespace virtiod
