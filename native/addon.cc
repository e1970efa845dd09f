// The addon's entry point: it only collects the functions. There is no per-environment state to own: rings and watchers
// belong to their JavaScript functions, mappings to the process (memory.cc), so every worker may load the addon.
#include "common.h"

namespace virtiod {

static Napi::Object Init(Napi::Env env, Napi::Object exports) {
  InitFd(env, exports);
  InitSocket(env, exports);
  InitMemory(env, exports);
  InitUring(env, exports);
  InitThread(env, exports);
  InitWatch(env, exports);
  InitPackets(env, exports);
  InitTap(env, exports);
  InitLink(env, exports);
  return exports;
}

NODE_API_MODULE(virtiod_native, Init)

}  // namespace virtiod
