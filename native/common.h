// Argument parsing and result conventions that every file of the addon shares. It owns nothing.
//
// A failing system call is `-errno`, never an exception; an argument of the wrong type is a bug of the caller and
// throws a TypeError. C++ exceptions are off at the Node-API surface, so a parse error is a pending JavaScript
// exception plus `Args::failed()`; the function then returns at once.
#ifndef VIRTIOD_NATIVE_COMMON_H_
#define VIRTIOD_NATIVE_COMMON_H_

#include <errno.h>
#include <napi.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <string>

namespace virtiod {

constexpr double kMaxSafeInteger = 9007199254740991.0;

template <typename T>
struct Span {
  // SAFETY: points into a typed array that is an argument of the running call, so it lives until that call returns;
  // no Span is kept longer. Nothing in between runs JavaScript, so nobody can detach or resize it.
  T* data = nullptr;
  size_t length = 0;
};

/** Reads the arguments of one call. The first wrong one leaves a TypeError pending; from then on it answers zeroes. */
class Args {
 public:
  explicit Args(const Napi::CallbackInfo& info) : info_(info) {}

  bool failed() const { return failed_; }

  double Integer(size_t index, const char* name, double low, double high) {
    napi_value value = info_[index];
    double number = 0;
    if (failed_ || napi_get_value_double(info_.Env(), value, &number) != napi_ok || !(number >= low) ||
        !(number <= high) || std::trunc(number) != number) {
      return Fail(name, "an integer in range"), 0;
    }
    return number;
  }
  int Int32(size_t index, const char* name) {
    return static_cast<int>(Integer(index, name, INT32_MIN, INT32_MAX));
  }
  uint64_t Size(size_t index, const char* name) {
    return static_cast<uint64_t>(Integer(index, name, 0, kMaxSafeInteger));
  }
  bool Bool(size_t index, const char* name) {
    bool value = false;
    if (failed_ || napi_get_value_bool(info_.Env(), info_[index], &value) != napi_ok) Fail(name, "a boolean");
    return value;
  }
  std::string String(size_t index, const char* name) {
    if (failed_ || !info_[index].IsString()) return Fail(name, "a string"), std::string();
    return info_[index].As<Napi::String>().Utf8Value();
  }
  Span<uint8_t> Bytes(size_t index, const char* name) {
    return Typed<uint8_t>(index, name, napi_uint8_array, "a Uint8Array", 0);
  }
  Span<int32_t> Int32s(size_t index, const char* name, size_t least) {
    return Typed<int32_t>(index, name, napi_int32_array, "an Int32Array of sufficient length", least);
  }
  Span<double> Doubles(size_t index, const char* name, size_t least) {
    return Typed<double>(index, name, napi_float64_array, "a Float64Array of sufficient length", least);
  }
  void Fail(const char* name, const char* wanted) {
    if (failed_) return;
    failed_ = true;
    Napi::TypeError::New(info_.Env(), std::string(name) + " must be " + wanted).ThrowAsJavaScriptException();
  }

 private:
  template <typename T>
  Span<T> Typed(size_t index, const char* name, napi_typedarray_type wanted, const char* text, size_t least) {
    Span<T> span;
    napi_value value = info_[index];
    bool typed = false;
    if (!failed_ && napi_is_typedarray(info_.Env(), value, &typed) == napi_ok && typed) {
      napi_typedarray_type type;
      void* data = nullptr;
      size_t length = 0;
      if (napi_get_typedarray_info(info_.Env(), value, &type, &length, &data, nullptr, nullptr) == napi_ok &&
          type == wanted && length >= least) {
        span.data = static_cast<T*>(data);
        span.length = length;
        return span;
      }
    }
    Fail(name, text);
    return span;
  }

  const Napi::CallbackInfo& info_;
  bool failed_ = false;
};

inline Napi::Value Number(const Napi::CallbackInfo& info, double value) {
  return Napi::Number::New(info.Env(), value);
}

/** The result of a system call (-1 and errno, or a result) as the facade wants it. */
inline Napi::Value Result(const Napi::CallbackInfo& info, int64_t result) {
  return Number(info, result < 0 ? -errno : static_cast<double>(result));
}

inline Napi::Value Undefined(const Napi::CallbackInfo& info) {
  return info.Env().Undefined();
}

/** Closes `fd` on a path that reports an earlier error, whose errno survives. */
inline void CloseQuietly(int fd) {
  int saved = errno;
  // Linux frees the number even when close is interrupted, so this is not retried: a retry could close somebody else's
  // fd.
  close(fd);
  errno = saved;
}

/** One exported function; Napi::Function::New<callback> needs no allocation per function. */
template <Napi::Value (*callback)(const Napi::CallbackInfo&)>
void Export(Napi::Env env, Napi::Object exports, const char* name) {
  exports.Set(name, Napi::Function::New<callback>(env, name));
}

void InitFd(Napi::Env env, Napi::Object exports);
void InitSocket(Napi::Env env, Napi::Object exports);
void InitMemory(Napi::Env env, Napi::Object exports);
void InitUring(Napi::Env env, Napi::Object exports);
void InitThread(Napi::Env env, Napi::Object exports);
void InitWatch(Napi::Env env, Napi::Object exports);
void InitPackets(Napi::Env env, Napi::Object exports);
void InitTap(Napi::Env env, Napi::Object exports);
void InitLink(Napi::Env env, Napi::Object exports);

}  // namespace virtiod

#endif  // VIRTIOD_NATIVE_COMMON_H_
