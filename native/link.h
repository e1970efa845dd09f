// What tap.cc and link.cc share: the name of a network interface as the kernel's structures have it.
#ifndef VIRTIOD_NATIVE_LINK_H_
#define VIRTIOD_NATIVE_LINK_H_

#include <sys/socket.h>
// After sys/socket.h, which it needs; not net/if.h, which defines the same things again.
#include <linux/if.h>

#include <cstring>
#include <string>

namespace virtiod {

/** Zeroes the request and gives it its name; 0 or an errno. A longer name would be cut off silently by the kernel. */
inline int NameRequest(const std::string& name, struct ifreq* request) {
  memset(request, 0, sizeof *request);
  if (name.size() >= IFNAMSIZ) return ENAMETOOLONG;
  if (name.find('\0') != std::string::npos) return EINVAL;
  memcpy(request->ifr_name, name.data(), name.size());
  return 0;
}

}  // namespace virtiod

#endif  // VIRTIOD_NATIVE_LINK_H_
