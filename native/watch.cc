// Watchers: one helper thread each, which sleeps in epoll and reports readiness to the event loop that made the
// watcher.
//
// A Watcher owns its epoll instance, its stop eventfd, its thread and one reference to its thread-safe function; it
// owns none of the watched fds. The thread never outlives Close(), which the environment's cleanup hook calls at the
// latest.
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <memory>
#include <system_error>
#include <thread>
#include <unordered_map>

#include "common.h"

namespace virtiod {

static_assert(sizeof(void*) == 8, "a report travels as the 64 bits of a pointer");

class Watcher {
 public:
  ~Watcher() { Close(); }

  /** 0 or -errno; after an error the caller closes the Watcher. */
  static int Start(Napi::Env env, Napi::Function onReady, const std::shared_ptr<Watcher>& self);

  int Add(int fd, int id);
  int Arm(int fd, int id);
  int Remove(int fd);
  void SetRef(bool on);
  void Close();

 private:
  void Run();
  void Stop();
  int Control(int operation, int fd, uint32_t token);
  static void OnReport(napi_env env, napi_value callback, void* context, void* data);
  static void OnCleanup(void* data);

  napi_env env_ = nullptr;
  int epollFd_ = -1;
  int stopFd_ = -1;
  std::thread thread_;
  napi_threadsafe_function tsfn_ = nullptr;
  // The JavaScript thread's alone. A token is never used twice, so a report that was queued before its fd was removed
  // (and perhaps added again under the same id) finds no registration and is dropped.
  std::unordered_map<uint32_t, int> byToken_;  // to the id
  std::unordered_map<int, uint32_t> byFd_;
  uint32_t lastToken_ = 0;
  bool closed_ = true;
};

int Watcher::Start(Napi::Env env, Napi::Function onReady, const std::shared_ptr<Watcher>& self) {
  Watcher& w = *self;
  w.env_ = env;
  w.closed_ = false;  // from here on the destructor cleans up
  w.epollFd_ = epoll_create1(EPOLL_CLOEXEC);
  if (w.epollFd_ < 0) return -errno;
  w.stopFd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (w.stopFd_ < 0) return -errno;
  struct epoll_event event = {};
  event.events = EPOLLIN;
  event.data.u64 = 0;  // tokens start at 1
  if (epoll_ctl(w.epollFd_, EPOLL_CTL_ADD, w.stopFd_, &event) < 0) return -errno;

  // SAFETY: this shared_ptr keeps the Watcher, which is the function's context, alive until after the last OnReport.
  auto* keep = new std::shared_ptr<Watcher>(self);
  auto finalize = [](napi_env, void* data, void*) { delete static_cast<std::shared_ptr<Watcher>*>(data); };
  napi_value name = Napi::String::New(env, "virtiod watcher");
  if (napi_create_threadsafe_function(env, onReady, nullptr, name, 0, 1, keep, finalize, &w, OnReport, &w.tsfn_) !=
      napi_ok) {
    w.tsfn_ = nullptr;
    delete keep;
    return -ENOMEM;
  }
  // SAFETY: Close() removes the hook, and the thread-safe function keeps the Watcher alive until Close(). Hooks run
  // last in, first out: this one ends the thread before Node's own hook takes the thread-safe function apart.
  napi_add_env_cleanup_hook(env, OnCleanup, &w);

  // Signals are for Node's threads; the thread inherits this mask.
  sigset_t all, previous;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &previous);
  int error = 0;
  try {
    w.thread_ = std::thread(&Watcher::Run, &w);
  } catch (const std::system_error& failure) {
    error = failure.code().value();
  }
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  return -error;
}

/** The helper thread. It touches epollFd_ and tsfn_ only, and both live until Close() has joined it. */
void Watcher::Run() {
  pthread_setname_np(pthread_self(), "virtiod-watch");
  struct epoll_event events[64];
  for (;;) {
    int count = epoll_wait(epollFd_, events, 64, -1);
    if (count < 0 && errno != EINTR) return;
    for (int i = 0; i < count; i++) {
      if (events[i].data.u64 == 0) return;
      uint64_t report = events[i].data.u64 << 32 | events[i].events;
      // Unbounded and non-blocking, so this cannot wait for a JavaScript thread that waits for us in Close(); every fd
      // is one-shot, so at most one report per registration is queued.
      napi_call_threadsafe_function(tsfn_, reinterpret_cast<void*>(report), napi_tsfn_nonblocking);
    }
  }
}

void Watcher::OnReport(napi_env env, napi_value callback, void* context, void* data) {
  auto* watcher = static_cast<Watcher*>(context);
  if (env == nullptr || watcher->closed_) return;
  uint64_t report = reinterpret_cast<uint64_t>(data);
  auto found = watcher->byToken_.find(static_cast<uint32_t>(report >> 32));
  if (found == watcher->byToken_.end()) return;
  napi_value receiver, arguments[2];
  napi_get_undefined(env, &receiver);
  napi_create_int32(env, found->second, &arguments[0]);
  napi_create_uint32(env, static_cast<uint32_t>(report), &arguments[1]);
  napi_call_function(env, receiver, callback, 2, arguments, nullptr);
  // Left pending, an exception would be a deprecation warning (DEP0168) and nothing else; it is to be an
  // uncaughtException.
  bool pending = false;
  napi_value error = nullptr;
  if (napi_is_exception_pending(env, &pending) == napi_ok && pending &&
      napi_get_and_clear_last_exception(env, &error) == napi_ok) {
    napi_fatal_exception(env, error);
  }
}

void Watcher::OnCleanup(void* data) {
  static_cast<Watcher*>(data)->Stop();
}

int Watcher::Control(int operation, int fd, uint32_t token) {
  struct epoll_event event = {};
  event.events = EPOLLIN | EPOLLRDHUP | EPOLLONESHOT;
  event.data.u64 = token;
  return epoll_ctl(epollFd_, operation, fd, &event) < 0 ? -errno : 0;
}

int Watcher::Add(int fd, int id) {
  if (closed_) return -EBADF;
  do {
    lastToken_++;
  } while (lastToken_ == 0 || byToken_.count(lastToken_) != 0);
  int result = Control(EPOLL_CTL_ADD, fd, lastToken_);
  if (result < 0) return result;
  // A number that was closed without remove() and came back: the kernel forgot the old one, so do we.
  auto stale = byFd_.find(fd);
  if (stale != byFd_.end()) byToken_.erase(stale->second);
  byFd_[fd] = lastToken_;
  byToken_[lastToken_] = id;
  return 0;
}

int Watcher::Arm(int fd, int id) {
  if (closed_) return -EBADF;
  auto found = byFd_.find(fd);
  if (found == byFd_.end()) return -ENOENT;
  byToken_[found->second] = id;
  return Control(EPOLL_CTL_MOD, fd, found->second);
}

int Watcher::Remove(int fd) {
  if (closed_) return -EBADF;
  auto found = byFd_.find(fd);
  if (found == byFd_.end()) return -ENOENT;
  byToken_.erase(found->second);
  byFd_.erase(found);
  return epoll_ctl(epollFd_, EPOLL_CTL_DEL, fd, nullptr) < 0 ? -errno : 0;
}

void Watcher::SetRef(bool on) {
  if (closed_) return;
  if (on) {
    napi_ref_threadsafe_function(env_, tsfn_);
  } else {
    napi_unref_threadsafe_function(env_, tsfn_);
  }
}

void Watcher::Close() {
  if (closed_) return;
  if (tsfn_ != nullptr) napi_remove_env_cleanup_hook(env_, OnCleanup, this);
  Stop();
}

void Watcher::Stop() {
  if (closed_) return;
  closed_ = true;
  byToken_.clear();
  byFd_.clear();
  if (thread_.joinable()) {
    uint64_t one = 1;
    ssize_t ignored = write(stopFd_, &one, sizeof one);
    static_cast<void>(ignored);
    thread_.join();
  }
  if (tsfn_ != nullptr) napi_release_threadsafe_function(tsfn_, napi_tsfn_abort);
  tsfn_ = nullptr;
  if (stopFd_ >= 0) close(stopFd_);
  if (epollFd_ >= 0) close(epollFd_);
  stopFd_ = epollFd_ = -1;
}

static Napi::Value CreateWatcher(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (!info[0].IsFunction()) {
    Napi::TypeError::New(env, "onReady must be a function").ThrowAsJavaScriptException();
    return Undefined(info);
  }
  auto watcher = std::make_shared<Watcher>();
  int result = Watcher::Start(env, info[0].As<Napi::Function>(), watcher);
  if (result < 0) {
    watcher->Close();
    Napi::Error error = Napi::Error::New(env, "cannot start a watcher thread");
    error.Set("errno", Napi::Number::New(env, result));
    error.ThrowAsJavaScriptException();
    return Undefined(info);
  }
  // The methods share ownership of the Watcher, so a method that outlives the object is harmless.
  Napi::Object object = Napi::Object::New(env);
  auto method = [&](const char* name, auto body) { object.Set(name, Napi::Function::New(env, body, name)); };
  method("add", [watcher](const Napi::CallbackInfo& call) -> Napi::Value {
    Args args(call);
    int fd = args.Int32(0, "fd");
    int id = static_cast<int>(args.Integer(1, "id", 0, INT32_MAX));
    return args.failed() ? Undefined(call) : Number(call, watcher->Add(fd, id));
  });
  method("arm", [watcher](const Napi::CallbackInfo& call) -> Napi::Value {
    Args args(call);
    int fd = args.Int32(0, "fd");
    int id = static_cast<int>(args.Integer(1, "id", 0, INT32_MAX));
    return args.failed() ? Undefined(call) : Number(call, watcher->Arm(fd, id));
  });
  method("remove", [watcher](const Napi::CallbackInfo& call) -> Napi::Value {
    Args args(call);
    int fd = args.Int32(0, "fd");
    return args.failed() ? Undefined(call) : Number(call, watcher->Remove(fd));
  });
  method("ref", [watcher](const Napi::CallbackInfo&) { watcher->SetRef(true); });
  method("unref", [watcher](const Napi::CallbackInfo&) { watcher->SetRef(false); });
  method("close", [watcher](const Napi::CallbackInfo&) { watcher->Close(); });
  return object;
}

void InitWatch(Napi::Env env, Napi::Object exports) {
  Export<CreateWatcher>(env, exports, "createWatcher");
}

}  // namespace virtiod
