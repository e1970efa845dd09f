// The hot path of virtio-net: packets between guest memory and a tap, and between two guests' memories, one call per
// batch. It owns nothing: fd, vectors and the memory behind them are the caller's. It must not know rings or headers.
#include <sys/uio.h>

#include <cstring>
#include <memory>

#include "common.h"
#include "uring.h"

namespace virtiod {

constexpr int64_t kMaxVectors = 1024;  // UIO_MAXIOV: readv and writev refuse more

/** A list of copies in memory that JavaScript fills: how many, then destination, source and bytes of each, all doubles. */
class Copier {
 public:
  Copier(Region* list, size_t capacity) : list_(list), capacity_(capacity) {}
  ~Copier() { list_->Unref(); }
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  void Run() {
    auto* numbers = static_cast<double*>(list_->base());
    size_t count = numbers[0] > 0 ? static_cast<size_t>(numbers[0]) : 0;
    if (count > capacity_) count = capacity_;
    numbers[0] = 0;
    const double* piece = numbers + 1;
    for (size_t i = 0; i < count; i++, piece += 3) {
      size_t bytes = static_cast<size_t>(piece[2]);
      if (bytes == 0) continue;  // its addresses may be anything, which memcpy forbids even then
      // SAFETY: both ranges lie in mappings that the caller holds. What is missing under them is the SIGBUS guard's.
      memcpy(reinterpret_cast<void*>(static_cast<uintptr_t>(piece[0])),
             reinterpret_cast<const void*>(static_cast<uintptr_t>(piece[1])), bytes);
    }
  }

 private:
  Region* const list_;
  const size_t capacity_;
};

/** The hot call: no arguments, nothing back. */
static napi_value RunCopier(napi_env env, napi_callback_info info) {
  void* data = nullptr;
  napi_get_cb_info(env, info, nullptr, nullptr, nullptr, &data);
  // SAFETY: `data` is the Copier that this function's finalizer deletes, so it lives as long as the function.
  static_cast<Copier*>(data)->Run();
  return nullptr;
}

static Napi::Value CreateCopier(const Napi::CallbackInfo& info) {
  Args args(info);
  size_t capacity = static_cast<size_t>(args.Integer(0, "capacity", 1, 1 << 20));
  if (args.failed()) return Undefined(info);
  size_t bytes = (1 + 3 * capacity) * sizeof(double);
  Region* list = AllocateRegion(bytes);
  if (list == nullptr) return Number(info, -errno);
  auto copier = std::make_unique<Copier>(list, capacity);
  Napi::Env env = info.Env();
  Napi::Value pieces = list->ToBuffer(env, bytes);
  if (pieces.IsEmpty()) return env.Undefined();  // the exception is pending
  napi_value run = nullptr;
  if (napi_create_function(env, "run", NAPI_AUTO_LENGTH, RunCopier, copier.get(), &run) != napi_ok ||
      napi_add_finalizer(env, run, copier.get(),
                         [](napi_env, void* data, void*) { delete static_cast<Copier*>(data); }, nullptr,
                         nullptr) != napi_ok) {
    Napi::Error::New(env, "cannot create a function").ThrowAsJavaScriptException();
    return env.Undefined();
  }
  copier.release();
  Napi::Object object = Napi::Object::New(env);
  object.Set("pieces", pieces);
  object.Set("run", run);
  return object;
}

static Napi::Value SendPackets(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  uint64_t address = args.Size(1, "vectors");
  Span<int32_t> packets = args.Int32s(2, "packets", 0);
  size_t count = static_cast<size_t>(args.Integer(3, "count", 0, static_cast<double>(packets.length)));
  if (args.failed()) return Undefined(info);
  // SAFETY: the caller holds the array and what it points to; memory that is missing there is the kernel's -EFAULT.
  auto* vector = reinterpret_cast<const struct iovec*>(address);
  int sent = 0;
  for (size_t i = 0; i < count; i++) {
    int vectors = packets.data[i];
    // writev of no vectors would be a success that sends nothing.
    ssize_t result = -1;
    errno = EINVAL;
    if (vectors > 0) {
      do {
        result = writev(fd, vector, vectors);
      } while (result < 0 && errno == EINTR);
      vector += vectors;
    }
    packets.data[i] = static_cast<int32_t>(result < 0 ? -errno : result);
    if (result > 0) sent++;
  }
  return Number(info, sent);
}

static uint64_t ChainBytes(const struct iovec* vector, int32_t vectors) {
  uint64_t bytes = 0;
  for (int32_t i = 0; i < vectors; i++) bytes += vector[i].iov_len;
  return bytes;
}

static Napi::Value ReceivePackets(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  uint64_t address = args.Size(1, "vectors");
  Span<int32_t> chains = args.Int32s(2, "chains", 0);
  size_t chainCount = static_cast<size_t>(args.Integer(3, "chainCount", 0, static_cast<double>(chains.length)));
  uint64_t maxPacket = static_cast<uint64_t>(args.Integer(4, "maxPacket", 1, INT32_MAX));
  bool mergeable = args.Bool(5, "mergeable");
  Span<int32_t> results = args.Int32s(6, "results", 1);
  size_t maxPackets = static_cast<size_t>(args.Integer(7, "maxPackets", 0, static_cast<double>(results.length) - 1));
  if (args.failed()) return Undefined(info);
  // SAFETY: the caller holds the array and what it points to; memory that is missing there is the kernel's -EFAULT.
  auto* vector = reinterpret_cast<const struct iovec*>(address);
  // The window, chains [first, end) with `vectors` vectors from `vector` on, slides: a packet takes chains away in
  // front, and behind as many follow as the next one may need. So each chain is added up twice, however many windows
  // it is in.
  size_t first = 0;
  size_t end = 0;
  int64_t vectors = 0;
  uint64_t bytes = 0;
  size_t packets = 0;
  int stopped = 0;
  while (packets < maxPackets) {
    while (end < chainCount && vectors <= kMaxVectors && (mergeable ? bytes < maxPacket : end == first)) {
      bytes += ChainBytes(vector + vectors, chains.data[end]);
      vectors += chains.data[end++];
    }
    if (bytes < maxPacket || vectors > kMaxVectors) break;
    ssize_t got;
    do {
      got = readv(fd, vector, static_cast<int>(vectors));
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
      stopped = -errno;
      break;
    }
    results.data[packets++] = static_cast<int32_t>(got);
    int64_t left = got;
    do {
      uint64_t taken = ChainBytes(vector, chains.data[first]);
      vector += chains.data[first];
      vectors -= chains.data[first++];
      bytes -= taken;
      left -= static_cast<int64_t>(taken);
    } while (left > 0 && first < end);
  }
  results.data[packets] = stopped;
  return Number(info, static_cast<double>(packets));
}

void InitPackets(Napi::Env env, Napi::Object exports) {
  Export<CreateCopier>(env, exports, "createCopier");
  Export<SendPackets>(env, exports, "sendPackets");
  Export<ReceivePackets>(env, exports, "receivePackets");
}

}  // namespace virtiod
