// A ring as JavaScript sees it: memory for the submission and completion queue, a control block, and `Enter`.
// KernelRing (uring.cc) is io_uring; EmulatedRing (uring_emulated.cc) runs the same entries by plain system calls.
#ifndef VIRTIOD_NATIVE_URING_H_
#define VIRTIOD_NATIVE_URING_H_

#include <linux/io_uring.h>

#include <memory>

#include "memory.h"

// Debian 12 has the headers of Linux 6.1; what an even older machine lacks is part of the kernel's ABI and never
// changes.
#ifndef IORING_SETUP_SUBMIT_ALL
#define IORING_SETUP_SUBMIT_ALL (1U << 7)
#endif
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef IORING_SETUP_TASKRUN_FLAG
#define IORING_SETUP_TASKRUN_FLAG (1U << 9)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif
#ifndef IORING_ENTER_REGISTERED_RING
#define IORING_ENTER_REGISTERED_RING (1U << 4)
#endif
#ifndef IORING_RSRC_REGISTER_SPARSE
#define IORING_RSRC_REGISTER_SPARSE (1U << 0)
#endif
#ifndef IOSQE_CQE_SKIP_SUCCESS
#define IOSQE_CQE_SKIP_SUCCESS (1U << 6)
#endif
#ifndef IORING_ASYNC_CANCEL_ALL
#define IORING_ASYNC_CANCEL_ALL (1U << 0)
#endif
#ifndef IORING_ASYNC_CANCEL_FD
#define IORING_ASYNC_CANCEL_FD (1U << 1)
#endif
#ifndef IORING_ASYNC_CANCEL_ANY
#define IORING_ASYNC_CANCEL_ANY (1U << 2)
#endif

namespace virtiod {

constexpr unsigned kFixedFiles = 64;

/** The Int32 words of the control block. */
struct Control {
  int32_t toSubmit;
  int32_t minComplete;
  int32_t flags;
  int32_t timeoutMicroseconds;
  int32_t directStart;  // the direct entries to run in this call: [directStart, directStart + directCount)
  int32_t directCount;
  int32_t waited;  // kCopyWaited, kWriteWaited: what had to wait, so that those behind it were refused with -EAGAIN
};

constexpr int32_t kCopyWaited = 1;
constexpr int32_t kWriteWaited = 2;
constexpr int32_t kCopyFaulted = 4;  // the SIGBUS guard stepped in

constexpr unsigned kDirectEntries = 256;

/** Byte offsets into the rings, as `NativeRing` names them. */
struct RingLayout {
  uint32_t sqEntries, cqEntries, sqHead, sqTail, sqFlags, cqHead, cqTail, cqOverflow, cqes;
};

class Ring {
 public:
  virtual ~Ring() { CloseMemory(); }

  /** What io_uring_enter(2) returns for the arguments in the control block. */
  virtual int Enter() = 0;
  virtual int RegisterFile(unsigned slot, int fd) = 0;
  /** Idempotent. Afterwards the buffers show anonymous memory and `Enter` answers -EBADF. */
  virtual void Close() = 0;

  int fd = -1;
  unsigned setupFlags = 0;
  RingLayout layout = {};
  Region* rings = nullptr;
  Region* sqes = nullptr;
  Region* control = nullptr;
  Region* direct = nullptr;

 private:
  static constexpr int kLookBatches = 1024;
  int lookBatches_ = 0;
  long majorFaults_ = 0;
  long switches_ = 0;

 protected:
  /** Makes the control block and the direct entries; false and errno. */
  bool AllocateControl();
  /** Runs the direct entries that the control block names. Returns how many there were. */
  int RunDirect();
  bool Waited(bool sleepCounts);
  /** Lays anonymous memory over the regions and gives our references to them back. */
  void CloseMemory();

  // SAFETY: the ring holds a reference to each region until CloseMemory(), so these stay mapped while it is open.
  Control* arguments() const { return static_cast<Control*>(control->base()); }
  template <typename T>
  T* At(uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(rings->base()) + offset);
  }
};

/** Anonymous memory as a region of its own; null and errno. */
Region* AllocateRegion(size_t length);

/** Null and errno on failure. `entries` and `cqEntries` are not yet rounded. */
std::unique_ptr<Ring> SetupEmulatedRing(unsigned entries, unsigned cqEntries);

}  // namespace virtiod

#endif  // VIRTIOD_NATIVE_URING_H_
