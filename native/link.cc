// Network interfaces of the calling thread's network namespace: look at one, change it, put it on a bridge, talk to it
// over a packet socket. It owns its control sockets for the length of a call; a packet socket belongs to the caller.
#include "link.h"

#include <arpa/inet.h>
#include <linux/if_arp.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/rtnetlink.h>
#include <linux/sockios.h>
#include <sys/ioctl.h>

#include "common.h"

namespace virtiod {

constexpr size_t kMacBytes = 6;

/** A socket for one call. */
class CallSocket {
 public:
  CallSocket(int domain, int type, int protocol) : fd(socket(domain, type | SOCK_CLOEXEC, protocol)) {}
  ~CallSocket() {
    if (fd >= 0) CloseQuietly(fd);
  }
  CallSocket(const CallSocket&) = delete;
  CallSocket& operator=(const CallSocket&) = delete;

  const int fd;
};

/** The name of an existing link; 0 or an errno. */
static int LinkRequest(const std::string& name, struct ifreq* request) {
  int error = NameRequest(name, request);
  // No link is called so, but SIOC* ioctls cut a name off at the colon, and "lo:1" would be "lo".
  if (error == 0 && (name.empty() || name.find(':') != std::string::npos)) error = ENODEV;
  return error;
}

/** Does something by ioctls to the link that is the first argument. `change` returns as ioctl(2). */
template <typename Change>
static Napi::Value OnLink(const Napi::CallbackInfo& info, const std::string& name, Change change) {
  struct ifreq request;
  int error = LinkRequest(name, &request);
  if (error != 0) return Number(info, -error);
  // Of any family: these ioctls are the network namespace's, not the protocol's, and AF_UNIX is what virtiod needs
  // anyway where a sandbox allows few.
  CallSocket control(AF_UNIX, SOCK_DGRAM, 0);
  return Result(info, control.fd < 0 ? -1 : change(control.fd, request));
}

// ---- what a link is, by netlink: /sys/class/net shows the network namespace of its mount, not that of the thread

struct Link {
  int32_t index = 0;
  uint32_t flags = 0;
  uint32_t mtu = 0;
  uint8_t mac[kMacBytes] = {};
  bool bridge = false;
  uint32_t bridgeMaster = 0;
};

static bool IsText(const struct rtattr* attribute, const char* text) {
  size_t length = strlen(text);
  // With or without the terminating NUL.
  return RTA_PAYLOAD(attribute) >= length && RTA_PAYLOAD(attribute) <= length + 1 &&
         memcmp(RTA_DATA(attribute), text, length) == 0;
}

static uint32_t Word(const struct rtattr* attribute) {
  uint32_t word = 0;
  if (RTA_PAYLOAD(attribute) >= sizeof word) memcpy(&word, RTA_DATA(attribute), sizeof word);
  return word;
}

static void ParseLink(const struct nlmsghdr* message, Link* link) {
  auto* header = static_cast<const struct ifinfomsg*>(NLMSG_DATA(message));
  link->index = header->ifi_index;
  link->flags = header->ifi_flags;
  uint32_t master = 0;
  bool bridgePort = false;
  auto length = static_cast<int>(IFLA_PAYLOAD(message));
  for (auto* attribute = IFLA_RTA(header); RTA_OK(attribute, length); attribute = RTA_NEXT(attribute, length)) {
    switch (attribute->rta_type & NLA_TYPE_MASK) {
      case IFLA_MTU:
        link->mtu = Word(attribute);
        break;
      case IFLA_MASTER:
        master = Word(attribute);
        break;
      case IFLA_ADDRESS:
        if (RTA_PAYLOAD(attribute) == kMacBytes) memcpy(link->mac, RTA_DATA(attribute), kMacBytes);
        break;
      case IFLA_LINKINFO: {
        auto inner = static_cast<int>(RTA_PAYLOAD(attribute));
        for (auto* nested = static_cast<struct rtattr*>(RTA_DATA(attribute)); RTA_OK(nested, inner);
             nested = RTA_NEXT(nested, inner)) {
          if (nested->rta_type == IFLA_INFO_KIND) link->bridge = IsText(nested, "bridge");
          if (nested->rta_type == IFLA_INFO_SLAVE_KIND) bridgePort = IsText(nested, "bridge");
        }
        break;
      }
      default:
        break;
    }
  }
  if (bridgePort) link->bridgeMaster = master;
}

/** Asks for the link of that name; 0 or an errno. */
static int GetLink(const char* name, Link* link) {
  CallSocket socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
  if (socket.fd < 0) return errno;
  struct {
    struct nlmsghdr header;
    struct ifinfomsg info;
    struct rtattr attribute;
    char name[IFNAMSIZ];
  } request = {};
  request.header.nlmsg_len = sizeof request;
  request.header.nlmsg_type = RTM_GETLINK;
  request.header.nlmsg_flags = NLM_F_REQUEST;
  request.info.ifi_family = AF_UNSPEC;
  request.attribute.rta_type = IFLA_IFNAME;
  request.attribute.rta_len = static_cast<unsigned short>(RTA_LENGTH(IFNAMSIZ));
  memcpy(request.name, name, IFNAMSIZ);
  struct sockaddr_nl kernel = {};
  kernel.nl_family = AF_NETLINK;
  if (sendto(socket.fd, &request, sizeof request, 0, reinterpret_cast<struct sockaddr*>(&kernel), sizeof kernel) < 0) {
    return errno;
  }
  // One answer, which the kernel has queued before sendto returned.
  alignas(struct nlmsghdr) char answer[32768];
  ssize_t got = recv(socket.fd, answer, sizeof answer, MSG_DONTWAIT | MSG_TRUNC);
  if (got < 0) return errno;
  auto* message = reinterpret_cast<const struct nlmsghdr*>(answer);
  if (static_cast<size_t>(got) > sizeof answer || !NLMSG_OK(message, static_cast<size_t>(got))) return EMSGSIZE;
  if (message->nlmsg_type == NLMSG_ERROR && message->nlmsg_len >= NLMSG_LENGTH(sizeof(struct nlmsgerr))) {
    return -static_cast<const struct nlmsgerr*>(NLMSG_DATA(message))->error;
  }
  if (message->nlmsg_type != RTM_NEWLINK || message->nlmsg_len < NLMSG_LENGTH(sizeof(struct ifinfomsg))) return EPROTO;
  ParseLink(message, link);
  return 0;
}

static Napi::Value LinkInfo(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string name = args.String(0, "name");
  Span<int32_t> out = args.Int32s(1, "out", 11);
  if (args.failed()) return Undefined(info);
  struct ifreq request;
  Link link;
  int error = LinkRequest(name, &request);
  if (error == 0) error = GetLink(request.ifr_name, &link);
  if (error != 0) return Number(info, -error);
  out.data[0] = link.index;
  out.data[1] = static_cast<int32_t>(link.flags);
  out.data[2] = static_cast<int32_t>(link.mtu);
  for (size_t i = 0; i < kMacBytes; i++) out.data[3 + i] = link.mac[i];
  out.data[9] = link.bridge ? 1 : 0;
  out.data[10] = static_cast<int32_t>(link.bridgeMaster);
  return Number(info, 0);
}

// ---- changes

static Napi::Value LinkSetUp(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string name = args.String(0, "name");
  bool up = args.Bool(1, "up");
  if (args.failed()) return Undefined(info);
  return OnLink(info, name, [up](int control, struct ifreq& request) {
    if (ioctl(control, SIOCGIFFLAGS, &request) < 0) return -1;
    unsigned flags = static_cast<uint16_t>(request.ifr_flags);
    request.ifr_flags = static_cast<short>(up ? flags | IFF_UP : flags & ~static_cast<unsigned>(IFF_UP));
    return ioctl(control, SIOCSIFFLAGS, &request);
  });
}

static Napi::Value LinkSetMtu(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string name = args.String(0, "name");
  int mtu = args.Int32(1, "mtu");
  if (args.failed()) return Undefined(info);
  return OnLink(info, name, [mtu](int control, struct ifreq& request) {
    request.ifr_mtu = mtu;
    return ioctl(control, SIOCSIFMTU, &request);
  });
}

static Napi::Value BridgeAdd(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string bridge = args.String(0, "bridge");
  std::string name = args.String(1, "name");
  if (args.failed()) return Undefined(info);
  struct ifreq port;
  int error = LinkRequest(name, &port);
  if (error != 0) return Number(info, -error);
  return OnLink(info, bridge, [&port](int control, struct ifreq& request) {
    if (ioctl(control, SIOCGIFINDEX, &port) < 0) return -1;
    request.ifr_ifindex = port.ifr_ifindex;
    return ioctl(control, SIOCBRADDIF, &request);
  });
}

/** Ties a fresh packet socket to the link; false and errno. */
static bool BindPacketSocket(int fd, struct ifreq* request, bool vnetHeader) {
  int one = 1;
  if (ioctl(fd, SIOCGIFINDEX, request) < 0) return false;
  if (vnetHeader && setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof one) < 0) return false;
  if (setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one) < 0) return false;
  struct sockaddr_ll address = {};
  address.sll_family = AF_PACKET;
  address.sll_protocol = htons(ETH_P_ALL);
  address.sll_ifindex = request->ifr_ifindex;
  return bind(fd, reinterpret_cast<struct sockaddr*>(&address), sizeof address) == 0;
}

static Napi::Value PacketSocket(const Napi::CallbackInfo& info) {
  Args args(info);
  std::string name = args.String(0, "name");
  bool vnetHeader = args.Bool(1, "vnetHeader");
  if (args.failed()) return Undefined(info);
  struct ifreq request;
  int error = LinkRequest(name, &request);
  if (error != 0) return Number(info, -error);
  // Protocol 0 until it is bound: else it would collect the packets of every link in between.
  int fd = socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd >= 0 && !BindPacketSocket(fd, &request, vnetHeader)) {
    CloseQuietly(fd);
    fd = -1;
  }
  return Result(info, fd);
}

void InitLink(Napi::Env env, Napi::Object exports) {
  Export<LinkInfo>(env, exports, "linkInfo");
  Export<LinkSetUp>(env, exports, "linkSetUp");
  Export<LinkSetMtu>(env, exports, "linkSetMtu");
  Export<BridgeAdd>(env, exports, "bridgeAdd");
  Export<PacketSocket>(env, exports, "packetSocket");
}

}  // namespace virtiod
