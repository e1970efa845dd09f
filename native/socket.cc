// Unix stream sockets and file descriptors passed over them. It owns no fd: what it makes or receives belongs to the
// caller, and what it cannot hand over is closed here.
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "common.h"

namespace virtiod {

constexpr size_t kMaxFds = 253;  // SCM_MAX_FD: the kernel never passes more with one message

/** Fills a socket address; 0 or an errno. */
static int UnixAddress(const std::string& path, struct sockaddr_un* address, socklen_t* length) {
  if (path.empty() || path.find('\0') != std::string::npos) return EINVAL;
  if (path.size() >= sizeof address->sun_path) return ENAMETOOLONG;
  memset(address, 0, sizeof *address);
  address->sun_family = AF_UNIX;
  memcpy(address->sun_path, path.data(), path.size());
  *length = static_cast<socklen_t>(offsetof(struct sockaddr_un, sun_path) + path.size() + 1);
  return 0;
}

static Napi::Value ListenUnix(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string path = args.String(0, "path");
  mode_t mode = static_cast<mode_t>(args.Integer(1, "mode", 0, 0777));
  if (args.failed()) return Undefined(info);
  struct sockaddr_un address;
  socklen_t length;
  int error = UnixAddress(path, &address, &length);
  if (error != 0) return Number(info, -error);
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return Result(info, fd);
  // Under the umask, not by a chmod afterwards: there must be no moment at which the socket is open to more than
  // `mode`.
  mode_t previous = umask(0777 & ~mode);
  int result = bind(fd, reinterpret_cast<struct sockaddr*>(&address), length);
  umask(previous);
  if (result == 0 && listen(fd, SOMAXCONN) < 0) {
    int saved = errno;
    unlink(path.c_str());
    errno = saved;
    result = -1;
  }
  if (result < 0) {
    CloseQuietly(fd);
    return Result(info, -1);
  }
  return Number(info, fd);
}

static Napi::Value ConnectUnix(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string path = args.String(0, "path");
  if (args.failed()) return Undefined(info);
  struct sockaddr_un address;
  socklen_t length;
  int error = UnixAddress(path, &address, &length);
  if (error != 0) return Number(info, -error);
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return Result(info, fd);
  if (connect(fd, reinterpret_cast<struct sockaddr*>(&address), length) < 0) {
    CloseQuietly(fd);
    return Result(info, -1);
  }
  return Number(info, fd);
}

static Napi::Value Accept(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  if (args.failed()) return Undefined(info);
  return Result(info, accept4(fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
}

static Napi::Value Socketpair(const Napi::CallbackInfo& info) {
  Args args(info);
  Span<int32_t> out = args.Int32s(0, "out", 2);
  if (args.failed()) return Undefined(info);
  return Result(info, socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, out.data));
}

static Napi::Value PeerCred(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  Span<int32_t> out = args.Int32s(1, "out", 3);
  if (args.failed()) return Undefined(info);
  struct ucred cred;
  socklen_t length = sizeof cred;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &length) < 0) return Result(info, -1);
  out.data[0] = cred.pid;
  out.data[1] = static_cast<int32_t>(cred.uid);
  out.data[2] = static_cast<int32_t>(cred.gid);
  return Number(info, 0);
}

static Napi::Value SocketKind(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  if (args.failed()) return Undefined(info);
  int domain = 0, type = 0, listening = 0;
  socklen_t length = sizeof domain;
  if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) < 0) return Result(info, -1);
  if (domain != AF_UNIX) return Number(info, -EAFNOSUPPORT);
  length = sizeof type;
  if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) < 0) return Result(info, -1);
  if (type != SOCK_STREAM) return Number(info, -EPROTOTYPE);
  length = sizeof listening;
  if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &length) < 0) return Result(info, -1);
  if (listening != 0) return Number(info, 1);
  struct sockaddr_un peer;
  length = sizeof peer;
  return Result(info, getpeername(fd, reinterpret_cast<struct sockaddr*>(&peer), &length));
}

static Napi::Value RecvMessage(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  Span<uint8_t> buffer = args.Bytes(1, "buffer");
  uint64_t offset = args.Size(2, "offset");
  uint64_t length = args.Size(3, "length");
  Span<int32_t> fds = args.Int32s(4, "fds", 2);
  if (!args.failed() && (offset > buffer.length || length > buffer.length - offset)) {
    args.Fail("offset + length", "inside the buffer");
  }
  if (args.failed()) return Undefined(info);
  fds.data[0] = 0;
  fds.data[1] = 0;
  // Room for all that one message can carry, so that the kernel never has to drop some: what does not fit is our
  // decision.
  alignas(struct cmsghdr) char control[CMSG_SPACE(kMaxFds * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
  struct iovec iov = {buffer.data + offset, static_cast<size_t>(length)};
  struct msghdr message = {};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0) return Result(info, got);
  size_t count = 0;
  int flags = message.msg_flags;
  for (struct cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    size_t passed = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < passed; i++) {
      int received;
      memcpy(&received, CMSG_DATA(c) + i * sizeof(int), sizeof received);
      if (count < fds.length - 2) {
        fds.data[2 + count++] = received;
      } else {
        close(received);
        flags |= MSG_CTRUNC;
      }
    }
  }
  fds.data[0] = static_cast<int32_t>(count);
  fds.data[1] = flags & ~MSG_CMSG_CLOEXEC;
  return Number(info, static_cast<double>(got));
}

static Napi::Value SendMessage(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  Span<uint8_t> buffer = args.Bytes(1, "buffer");
  uint64_t offset = args.Size(2, "offset");
  uint64_t length = args.Size(3, "length");
  Span<int32_t> fds = args.Int32s(4, "fds", 0);
  uint64_t count = args.Size(5, "fdCount");
  bool wait = args.Bool(6, "wait");
  if (!args.failed() && (offset > buffer.length || length > buffer.length - offset)) {
    args.Fail("offset + length", "inside the buffer");
  }
  if (!args.failed() && count > fds.length) args.Fail("fdCount", "at most fds.length");
  if (args.failed()) return Undefined(info);
  if (count > kMaxFds) return Number(info, -EINVAL);
  alignas(struct cmsghdr) char control[CMSG_SPACE(kMaxFds * sizeof(int))];
  struct iovec iov = {buffer.data + offset, static_cast<size_t>(length)};
  struct msghdr message = {};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  if (count > 0) {
    size_t bytes = static_cast<size_t>(count) * sizeof(int);
    memset(control, 0, sizeof control);
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(bytes);
    struct cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(bytes);
    memcpy(CMSG_DATA(c), fds.data, bytes);
  }
  return Result(info, sendmsg(fd, &message, MSG_NOSIGNAL | (wait ? 0 : MSG_DONTWAIT)));
}

static Napi::Value Shutdown(const Napi::CallbackInfo& info) {
  Args args(info);
  int fd = args.Int32(0, "fd");
  if (args.failed()) return Undefined(info);
  return Result(info, shutdown(fd, SHUT_RDWR));
}

static Napi::Value SendDatagram(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string path = args.String(0, "path");
  Span<uint8_t> bytes = args.Bytes(1, "bytes");
  if (args.failed()) return Undefined(info);
  struct sockaddr_un address;
  socklen_t length;
  int error = UnixAddress(path, &address, &length);
  if (error != 0) return Number(info, -error);
  if (path[0] == '@') {
    // An abstract name has no final NUL: every byte of it counts.
    address.sun_path[0] = '\0';
    length--;
  }
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return Result(info, fd);
  ssize_t sent = sendto(fd, bytes.data, bytes.length, MSG_NOSIGNAL | MSG_DONTWAIT,
                        reinterpret_cast<struct sockaddr*>(&address), length);
  CloseQuietly(fd);
  return Result(info, sent);
}

void InitSocket(Napi::Env env, Napi::Object exports) {
  Export<ListenUnix>(env, exports, "listenUnix");
  Export<ConnectUnix>(env, exports, "connectUnix");
  Export<Accept>(env, exports, "accept");
  Export<Socketpair>(env, exports, "socketpair");
  Export<PeerCred>(env, exports, "peerCred");
  Export<SocketKind>(env, exports, "socketKind");
  Export<RecvMessage>(env, exports, "recvMessage");
  Export<SendMessage>(env, exports, "sendMessage");
  Export<Shutdown>(env, exports, "shutdown");
  Export<SendDatagram>(env, exports, "sendDatagram");
}

}  // namespace virtiod
