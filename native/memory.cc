// Mapped memory: the process-global table of mappings, their SharedArrayBuffers, and the SIGBUS guard.
//
// It owns every mapping in the table from mmap until the finalizer of its one SharedArrayBuffer, which V8 runs on any
// thread, also after the environment that made it is gone; therefore nothing here belongs to an environment and
// nothing here is ever destroyed. It must not know what the memory is used for.
#include "memory.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/vfs.h>

#include <mutex>

#ifndef HUGETLBFS_MAGIC
#define HUGETLBFS_MAGIC 0x958458f6
#endif

namespace virtiod {

// ---- SharedArrayBuffers over foreign memory

// Node-API has it since Node 24.16 and 26.1; node-api-headers 1.9 does not, and linking to it would stop the addon
// from loading elsewhere.
using CreateExternalSharedArrayBuffer = napi_status (*)(napi_env, void*, size_t, NoEnvFinalizer, void*, napi_value*);

static CreateExternalSharedArrayBuffer ResolveCreate() {
  static const auto create = reinterpret_cast<CreateExternalSharedArrayBuffer>(
      dlsym(RTLD_DEFAULT, "node_api_create_external_sharedarraybuffer"));
  return create;
}

bool HaveExternalSharedArrayBuffer(Napi::Env env) {
  if (ResolveCreate() != nullptr) return true;
  Napi::Error::New(env,
                   "this Node has no node_api_create_external_sharedarraybuffer; virtiod needs Node 24.16 or newer "
                   "(of Node 26: 26.1)")
      .ThrowAsJavaScriptException();
  return false;
}

Napi::Value NewExternalSharedArrayBuffer(Napi::Env env, void* data, size_t length, NoEnvFinalizer finalizer,
                                         void* hint) {
  napi_value value = nullptr;
  if (ResolveCreate()(env, data, length, finalizer, hint, &value) != napi_ok) {
    if (!env.IsExceptionPending()) {
      Napi::Error::New(env, "cannot create a SharedArrayBuffer over mapped memory").ThrowAsJavaScriptException();
    }
    return Napi::Value();
  }
  return Napi::Value(env, value);
}

bool LayAnonymous(void* base, size_t length) {
  // SAFETY: the callers own [base, base + length) as a live mapping, so MAP_FIXED replaces nothing of anybody else's.
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
  return mmap(base, length, PROT_READ | PROT_WRITE, kFlags, -1, 0) != MAP_FAILED;
}

size_t RoundToPage(size_t length) {
  static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (length + page - 1) & ~(page - 1);
}

void Region::Unref() {
  if (references_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  munmap(base_, length_);
  delete this;
}

Napi::Value Region::ToBuffer(Napi::Env env, size_t length) {
  Ref();
  // SAFETY: the buffer's own reference keeps the range mapped until its finalizer gives that reference back.
  Napi::Value buffer = NewExternalSharedArrayBuffer(
      env, base_, length, [](void*, void* hint) { static_cast<Region*>(hint)->Unref(); }, this);
  if (buffer.IsEmpty()) Unref();
  return buffer;
}

// ---- the table

struct Slot {
  // Odd while the slot changes: the signal handler, which cannot take the lock, then does not believe what it reads.
  std::atomic<uint32_t> sequence{0};
  std::atomic<uintptr_t> base{0};  // 0: the slot is free
  std::atomic<size_t> length{0};
  std::atomic<uintptr_t> address{0};
  std::atomic<bool> guarded{false};
  std::atomic<uint32_t> faults{0};
};

constexpr size_t kSlots = 4096;
static Slot slots[kSlots];
// Taken by mapFile, release, faults and the finalizers; never by the signal handler. Trivially destructible:
// finalizers may run at exit.
static std::mutex tableMutex;
static std::atomic<int> faultFd{-1};
static std::atomic<uint32_t> faultTotal{0};

uint32_t FaultTotal() { return faultTotal.load(); }

static void SetSlot(Slot& slot, uintptr_t base, size_t length, uintptr_t address, bool guarded) {
  slot.sequence.fetch_add(1, std::memory_order_acq_rel);
  slot.base.store(base);
  slot.length.store(length);
  slot.address.store(address);
  slot.guarded.store(guarded);
  slot.faults.store(0);
  slot.sequence.fetch_add(1, std::memory_order_acq_rel);
}

static Slot* FindByAddress(uintptr_t address) {
  for (Slot& slot : slots) {
    if (slot.base.load(std::memory_order_relaxed) != 0 && slot.address.load(std::memory_order_relaxed) == address) {
      return &slot;
    }
  }
  return nullptr;
}

static void FinalizeMapping(void*, void* hint) {
  std::lock_guard<std::mutex> lock(tableMutex);
  Slot& slot = *static_cast<Slot*>(hint);
  void* base = reinterpret_cast<void*>(slot.base.load());
  size_t length = slot.length.load();
  // The slot first: once unmapped the range may be somebody else's, and the guard must not lay memory over that.
  SetSlot(slot, 0, 0, 0, false);
  munmap(base, length);
}

/** Puts a fresh mapping into the table and makes its buffer; takes over [base, base + length) in every case. */
static Napi::Value Publish(const Napi::CallbackInfo& info, void* base, size_t length, size_t dataOffset,
                           size_t dataLength, bool guarded) {
  uintptr_t start = reinterpret_cast<uintptr_t>(base);
  Slot* taken = nullptr;
  {
    std::lock_guard<std::mutex> lock(tableMutex);
    for (Slot& slot : slots) {
      if (slot.base.load(std::memory_order_relaxed) != 0) continue;
      SetSlot(slot, start, length, start + dataOffset, guarded);
      taken = &slot;
      break;
    }
  }
  if (taken == nullptr) {
    munmap(base, length);
    return Number(info, -ENOMEM);
  }
  // SAFETY: the range stays mapped until FinalizeMapping, which runs when no SharedArrayBuffer over it is left on any
  // thread; `release` and the guard only exchange the pages under it.
  Napi::Value buffer = NewExternalSharedArrayBuffer(info.Env(), static_cast<char*>(base) + dataOffset, dataLength,
                                                    FinalizeMapping, taken);
  if (buffer.IsEmpty()) {
    FinalizeMapping(nullptr, taken);
    return Undefined(info);
  }
  Napi::Object mapping = Napi::Object::New(info.Env());
  mapping.Set("address", Napi::Number::New(info.Env(), static_cast<double>(start + dataOffset)));
  mapping.Set("buffer", buffer);
  return mapping;
}

// ---- the SIGBUS guard

static struct sigaction previousAction;

/** Async-signal-safe: atomics, mmap and write only. */
static bool GuardFault(uintptr_t address) {
  for (Slot& slot : slots) {
    uint32_t sequence = slot.sequence.load(std::memory_order_acquire);
    uintptr_t base = slot.base.load();
    size_t length = slot.length.load();
    bool guarded = slot.guarded.load();
    if (base == 0 || address < base || address - base >= length) continue;
    if ((sequence & 1) != 0 || slot.sequence.load(std::memory_order_acquire) != sequence || !guarded) continue;
    // SAFETY: the faulting thread touches this mapping through its SharedArrayBuffer, which is therefore alive, so the
    // range is still ours. The whole of it is replaced, not the page: a guest whose memory is partly gone is not
    // served any further.
    // Counted first: whoever reads a zero that was not in the file finds the count changed afterwards.
    faultTotal.fetch_add(1);
    if (!LayAnonymous(reinterpret_cast<void*>(base), length)) return false;
    slot.faults.fetch_add(1);
    uint64_t one = 1;
    ssize_t ignored = write(faultFd.load(), &one, sizeof one);
    static_cast<void>(ignored);
    return true;
  }
  return false;
}

static void OnSigbus(int signal, siginfo_t* info, void* context) {
  int saved = errno;
  // A positive code is a fault of the hardware or the kernel, whose si_addr is meant; others were sent by kill(2).
  bool handled = info->si_code > 0 && GuardFault(reinterpret_cast<uintptr_t>(info->si_addr));
  errno = saved;
  if (handled) return;
  if ((previousAction.sa_flags & SA_SIGINFO) != 0 && previousAction.sa_sigaction != nullptr) {
    previousAction.sa_sigaction(signal, info, context);
    return;
  }
  if (previousAction.sa_handler != SIG_DFL && previousAction.sa_handler != SIG_IGN) {
    previousAction.sa_handler(signal);
    return;
  }
  // Not ours: the faulting instruction runs again, now under the previous action. A signal that was sent is sent again.
  sigaction(SIGBUS, &previousAction, nullptr);
  if (info->si_code <= 0) raise(SIGBUS);
  errno = saved;
}

/** The fault eventfd, made at first use; -1 and errno. Under the table's lock. */
static int FaultFd() {
  int fd = faultFd.load();
  if (fd >= 0) return fd;
  fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd >= 0) faultFd.store(fd);
  return fd;
}

/** Installs the guard once per process; false and errno. */
static bool InstallGuard() {
  static bool installed = false;
  std::lock_guard<std::mutex> lock(tableMutex);
  if (installed) return true;
  if (FaultFd() < 0) return false;
  struct sigaction action = {};
  action.sa_sigaction = OnSigbus;
  // NODEFER: a fault inside a chained handler must not be a silent kill with the signal blocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  // Asked for first: once ours is in place it may need the previous one at any moment.
  if (sigaction(SIGBUS, nullptr, &previousAction) < 0 || sigaction(SIGBUS, &action, nullptr) < 0) return false;
  installed = true;
  return true;
}

// ---- the functions

static Napi::Value MapFile(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  uint64_t mapOffset = args.Size(1, "mapOffset");
  uint64_t mapLength = args.Size(2, "mapLength");
  uint64_t dataOffset = args.Size(3, "dataOffset");
  uint64_t dataLength = args.Size(4, "dataLength");
  bool writable = args.Bool(5, "writable");
  if (args.failed() || !HaveExternalSharedArrayBuffer(info.Env())) return Undefined(info);
  if (dataLength == 0 || dataOffset > mapLength || dataLength > mapLength - dataOffset) return Number(info, -EINVAL);
  struct statfs fs;
  if (fstatfs(fd, &fs) < 0) return Result(info, -1);
  if (static_cast<uint32_t>(fs.f_type) == HUGETLBFS_MAGIC && mapLength % static_cast<uint64_t>(fs.f_bsize) != 0) {
    return Number(info, -EINVAL);  // mmap would round up silently and munmap would then refuse
  }
  size_t length = RoundToPage(static_cast<size_t>(mapLength));
  if (!InstallGuard()) return Result(info, -1);
  constexpr int kFlags = MAP_SHARED | MAP_NORESERVE;
  int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  void* base = mmap(nullptr, length, protection, kFlags, fd, static_cast<off_t>(mapOffset));
  if (base == MAP_FAILED) return Result(info, -1);
  // Advice only: a kernel without it still maps the memory.
  madvise(base, length, MADV_DONTDUMP);
  madvise(base, length, MADV_DONTFORK);
  return Publish(info, base, length, static_cast<size_t>(dataOffset), static_cast<size_t>(dataLength), true);
}

static Napi::Value Allocate(const Napi::CallbackInfo& info) {
  Args args(info);
  uint64_t wanted = args.Size(0, "length");
  if (args.failed() || !HaveExternalSharedArrayBuffer(info.Env())) return Undefined(info);
  if (wanted == 0) return Number(info, -EINVAL);
  size_t length = RoundToPage(static_cast<size_t>(wanted));
  void* base = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return Result(info, -1);
  return Publish(info, base, length, 0, static_cast<size_t>(wanted), false);
}

/**
 * Does something with the mapping at the address that is the first argument. The lock is held meanwhile: the finalizer, on
 * another thread, must not give the range back.
 */
static Napi::Value OnMapping(const Napi::CallbackInfo& info, Napi::Value (*act)(const Napi::CallbackInfo&, Slot&)) {
  Args args(info);
  uint64_t address = args.Size(0, "address");
  if (args.failed()) return Undefined(info);
  std::lock_guard<std::mutex> lock(tableMutex);
  Slot* slot = FindByAddress(static_cast<uintptr_t>(address));
  return slot == nullptr ? Number(info, -EINVAL) : act(info, *slot);
}

static void* BaseOf(const Slot& slot) {
  return reinterpret_cast<void*>(slot.base.load());
}

static Napi::Value AdviseRandom(const Napi::CallbackInfo& info) {
  return OnMapping(info, [](const Napi::CallbackInfo& call, Slot& slot) -> Napi::Value {
    return Result(call, madvise(BaseOf(slot), slot.length.load(), MADV_RANDOM));
  });
}

static Napi::Value Release(const Napi::CallbackInfo& info) {
  return OnMapping(info, [](const Napi::CallbackInfo& call, Slot& slot) -> Napi::Value {
    return Result(call, LayAnonymous(BaseOf(slot), slot.length.load()) ? 0 : -1);
  });
}

static Napi::Value Faults(const Napi::CallbackInfo& info) {
  return OnMapping(info, [](const Napi::CallbackInfo& call, Slot& slot) -> Napi::Value {
    return Number(call, static_cast<double>(slot.faults.load()));
  });
}

static Napi::Value FaultEventFd(const Napi::CallbackInfo& info) {
  std::lock_guard<std::mutex> lock(tableMutex);
  return Result(info, FaultFd());
}

void InitMemory(Napi::Env env, Napi::Object exports) {
  Export<MapFile>(env, exports, "mapFile");
  Export<Allocate>(env, exports, "allocate");
  Export<AdviseRandom>(env, exports, "adviseRandom");
  Export<Release>(env, exports, "release");
  Export<Faults>(env, exports, "faults");
  Export<FaultEventFd>(env, exports, "faultEventFd");
}

}  // namespace virtiod
