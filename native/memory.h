// Memory that JavaScript sees as a SharedArrayBuffer: the mapping table (memory.cc) and the regions of a ring
// (uring.cc).
#ifndef VIRTIOD_NATIVE_MEMORY_H_
#define VIRTIOD_NATIVE_MEMORY_H_

#include <atomic>
#include <cstddef>

#include "common.h"

namespace virtiod {

using NoEnvFinalizer = void (*)(void* data, void* hint);

/** Whether this Node can make a SharedArrayBuffer over foreign memory; if not, an Error is pending in `env`. */
bool HaveExternalSharedArrayBuffer(Napi::Env env);

/** Makes one; an empty value and a pending exception on failure, in which case `finalizer` has not run and will not. */
Napi::Value NewExternalSharedArrayBuffer(Napi::Env env, void* data, size_t length, NoEnvFinalizer finalizer,
                                         void* hint);

/** Lays fresh anonymous memory over a range that we own. False and errno on failure. Async-signal-safe. */
bool LayAnonymous(void* base, size_t length);

size_t RoundToPage(size_t length);

/**
 * A mapping that is not in the table (it has no fault guard and no `release`): shared by the ring that uses it and the
 * SharedArrayBuffer that shows it, unmapped by whoever is last, on whatever thread.
 */
class Region {
 public:
  /** Takes over the mapping [base, base + length), with one reference for the caller. */
  Region(void* base, size_t length) : base_(base), length_(length) {}

  void* base() const { return base_; }
  size_t length() const { return length_; }
  void Ref() { references_.fetch_add(1, std::memory_order_relaxed); }
  void Unref();

  /** The SharedArrayBuffer over the first `length` bytes; it holds a reference of its own. */
  Napi::Value ToBuffer(Napi::Env env, size_t length);

 private:
  ~Region() = default;

  void* const base_;
  const size_t length_;
  std::atomic<int> references_{1};
};

/** How many faults the SIGBUS guard has caught, in all mappings. It changes before the pages do. */
uint32_t FaultTotal();

}  // namespace virtiod

#endif  // VIRTIOD_NATIVE_MEMORY_H_
