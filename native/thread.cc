// The calling thread's affinity, id and name. It owns nothing.
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "common.h"

namespace virtiod {

static Napi::Value SetAffinity(const Napi::CallbackInfo& info) {
  Args args(info);
  Span<int32_t> cpus = args.Int32s(0, "cpus", 0);
  if (args.failed()) return Undefined(info);
  constexpr int kMaxCpu = 8192;  // Linux's largest NR_CPUS
  size_t size = CPU_ALLOC_SIZE(kMaxCpu);
  cpu_set_t* set = CPU_ALLOC(kMaxCpu);
  if (set == nullptr) return Number(info, -ENOMEM);
  CPU_ZERO_S(size, set);
  bool valid = true;
  for (size_t i = 0; i < cpus.length; i++) {
    if (cpus.data[i] < 0 || cpus.data[i] >= kMaxCpu) {
      valid = false;
    } else {
      CPU_SET_S(static_cast<size_t>(cpus.data[i]), size, set);
    }
  }
  errno = EINVAL;
  int result = valid ? sched_setaffinity(0, size, set) : -1;
  int saved = errno;
  CPU_FREE(set);
  return Number(info, result < 0 ? -saved : 0);
}

static Napi::Value Gettid(const Napi::CallbackInfo& info) {
  return Result(info, syscall(SYS_gettid));
}

static Napi::Value SetThreadName(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string name = args.String(0, "name");
  if (args.failed()) return Undefined(info);
  return Result(info, prctl(PR_SET_NAME, name.c_str(), 0, 0, 0));
}

void InitThread(Napi::Env env, Napi::Object exports) {
  Export<SetAffinity>(env, exports, "setAffinity");
  Export<Gettid>(env, exports, "gettid");
  Export<SetThreadName>(env, exports, "setThreadName");
}

}  // namespace virtiod
