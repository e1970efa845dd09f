// Tap devices: the ioctls of /dev/net/tun. It owns no fd: what it opens belongs to the caller, and with the last fd
// goes a tap that is not persistent. Which offloads there are and what they mean is not decided here.
#include <fcntl.h>
#include <sys/ioctl.h>

#include "common.h"
#include "link.h"
// After linux/if.h.
#include <linux/if_tun.h>

namespace virtiod {

static Napi::Value TapOpen(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string name = args.String(0, "name");
  bool multiQueue = args.Bool(1, "multiQueue");
  if (args.failed()) return Undefined(info);
  struct ifreq request;
  int error = NameRequest(name, &request);
  if (error != 0) return Number(info, -error);
  unsigned flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
  if (multiQueue) flags |= IFF_MULTI_QUEUE;
  request.ifr_flags = static_cast<short>(flags);
  int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (fd >= 0 && ioctl(fd, TUNSETIFF, &request) < 0) {
    CloseQuietly(fd);
    fd = -1;
  }
  return Result(info, fd);
}

static Napi::Value TapInfo(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  Span<int32_t> out = args.Int32s(1, "out", 3);
  if (args.failed()) return Undefined(info);
  struct ifreq request = {};
  int headerSize = 0;
  unsigned features = 0;
  if (ioctl(fd, TUNGETIFF, &request) < 0 || ioctl(fd, TUNGETVNETHDRSZ, &headerSize) < 0 ||
      ioctl(fd, TUNGETFEATURES, &features) < 0) {
    return Result(info, -1);
  }
  // The flags are 16 bits without a sign: IFF_TUN_EXCL is the highest.
  out.data[0] = static_cast<uint16_t>(request.ifr_flags);
  out.data[1] = headerSize;
  out.data[2] = static_cast<int32_t>(features);
  return Napi::String::New(info.Env(), request.ifr_name, strnlen(request.ifr_name, IFNAMSIZ));
}

static Napi::Value TapSetHeaderSize(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  int size = args.Int32(1, "size");
  if (args.failed()) return Undefined(info);
  return Result(info, ioctl(fd, TUNSETVNETHDRSZ, &size));
}

static Napi::Value TapSetOffload(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  unsigned long flags = static_cast<unsigned long>(args.Integer(1, "flags", 0, UINT32_MAX));
  if (args.failed()) return Undefined(info);
  return Result(info, ioctl(fd, TUNSETOFFLOAD, flags));
}

static Napi::Value TapSetQueue(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  bool attached = args.Bool(1, "attached");
  if (args.failed()) return Undefined(info);
  struct ifreq request = {};
  request.ifr_flags = attached ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE;
  return Result(info, ioctl(fd, TUNSETQUEUE, &request));
}

void InitTap(Napi::Env env, Napi::Object exports) {
  Export<TapOpen>(env, exports, "tapOpen");
  Export<TapInfo>(env, exports, "tapInfo");
  Export<TapSetHeaderSize>(env, exports, "tapSetHeaderSize");
  Export<TapSetOffload>(env, exports, "tapSetOffload");
  Export<TapSetQueue>(env, exports, "tapSetQueue");
}

}  // namespace virtiod
