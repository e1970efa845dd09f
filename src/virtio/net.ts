/**
 * virtio-net as the specification has it (virtio 1.3 §5.1): feature bits, the packet header, the config space and the
 * commands of the control queue. Names and values are the spec's own. Pure: no device, no driver.
 */

// virtio 1.3 §5.1.3 "Feature bits"
export const VIRTIO_NET_F_CSUM = 0
export const VIRTIO_NET_F_GUEST_CSUM = 1
export const VIRTIO_NET_F_CTRL_GUEST_OFFLOADS = 2
export const VIRTIO_NET_F_MTU = 3
export const VIRTIO_NET_F_MAC = 5
export const VIRTIO_NET_F_GUEST_TSO4 = 7
export const VIRTIO_NET_F_GUEST_TSO6 = 8
export const VIRTIO_NET_F_GUEST_ECN = 9
export const VIRTIO_NET_F_GUEST_UFO = 10
export const VIRTIO_NET_F_HOST_TSO4 = 11
export const VIRTIO_NET_F_HOST_TSO6 = 12
export const VIRTIO_NET_F_HOST_ECN = 13
export const VIRTIO_NET_F_HOST_UFO = 14
export const VIRTIO_NET_F_MRG_RXBUF = 15
export const VIRTIO_NET_F_STATUS = 16
export const VIRTIO_NET_F_CTRL_VQ = 17
export const VIRTIO_NET_F_CTRL_RX = 18
export const VIRTIO_NET_F_CTRL_VLAN = 19
export const VIRTIO_NET_F_CTRL_RX_EXTRA = 20
export const VIRTIO_NET_F_GUEST_ANNOUNCE = 21
export const VIRTIO_NET_F_MQ = 22
export const VIRTIO_NET_F_CTRL_MAC_ADDR = 23
export const VIRTIO_NET_F_GUEST_USO4 = 54
export const VIRTIO_NET_F_GUEST_USO6 = 55
export const VIRTIO_NET_F_HOST_USO = 56
export const VIRTIO_NET_F_SPEED_DUPLEX = 63

/**
 * struct virtio_net_hdr: u8 flags, u8 gso_type, le16 hdr_len, le16 gso_size, le16 csum_start, le16 csum_offset, and
 * le16 num_buffers with VERSION_1 or MRG_RXBUF (virtio 1.3 §5.1.6). Byte offsets:
 */
export const VIRTIO_NET_HDR_FLAGS = 0
export const VIRTIO_NET_HDR_GSO_TYPE = 1
export const VIRTIO_NET_HDR_HDR_LEN = 2
export const VIRTIO_NET_HDR_GSO_SIZE = 4
export const VIRTIO_NET_HDR_CSUM_START = 6
export const VIRTIO_NET_HDR_CSUM_OFFSET = 8
export const VIRTIO_NET_HDR_NUM_BUFFERS = 10
/** Bytes of the header with num_buffers. */
export const VIRTIO_NET_HDR_SIZE = 12
/** Without: a legacy driver that did not negotiate MRG_RXBUF (virtio 1.3 §5.1.6.1). */
export const VIRTIO_NET_HDR_SIZE_LEGACY = 10

export const VIRTIO_NET_HDR_F_NEEDS_CSUM = 1
export const VIRTIO_NET_HDR_F_DATA_VALID = 2

export const VIRTIO_NET_HDR_GSO_NONE = 0
export const VIRTIO_NET_HDR_GSO_TCPV4 = 1
export const VIRTIO_NET_HDR_GSO_UDP = 3
export const VIRTIO_NET_HDR_GSO_TCPV6 = 4
export const VIRTIO_NET_HDR_GSO_UDP_L4 = 5
/** A flag beside the type. */
export const VIRTIO_NET_HDR_GSO_ECN = 0x80

// virtio 1.3 §5.1.4 "Device configuration layout": byte offsets
export const VIRTIO_NET_CONFIG_MAC = 0
export const VIRTIO_NET_CONFIG_STATUS = 6
export const VIRTIO_NET_CONFIG_MAX_VIRTQUEUE_PAIRS = 8
export const VIRTIO_NET_CONFIG_MTU = 10
export const VIRTIO_NET_CONFIG_SPEED = 12
export const VIRTIO_NET_CONFIG_DUPLEX = 16
/** Up to and including mtu: what a device without SPEED_DUPLEX, RSS and HASH_REPORT has. */
export const VIRTIO_NET_CONFIG_SIZE = 12

export const VIRTIO_NET_S_LINK_UP = 1
export const VIRTIO_NET_S_ANNOUNCE = 2

// virtio 1.3 §5.1.6.5 "Control Virtqueue": classes and commands
export const VIRTIO_NET_OK = 0
export const VIRTIO_NET_ERR = 1
export const VIRTIO_NET_CTRL_RX = 0
export const VIRTIO_NET_CTRL_RX_PROMISC = 0
export const VIRTIO_NET_CTRL_RX_ALLMULTI = 1
export const VIRTIO_NET_CTRL_RX_ALLUNI = 2
export const VIRTIO_NET_CTRL_RX_NOMULTI = 3
export const VIRTIO_NET_CTRL_RX_NOUNI = 4
export const VIRTIO_NET_CTRL_RX_NOBCAST = 5
export const VIRTIO_NET_CTRL_MAC = 1
export const VIRTIO_NET_CTRL_MAC_TABLE_SET = 0
export const VIRTIO_NET_CTRL_MAC_ADDR_SET = 1
export const VIRTIO_NET_CTRL_VLAN = 2
export const VIRTIO_NET_CTRL_VLAN_ADD = 0
export const VIRTIO_NET_CTRL_VLAN_DEL = 1
export const VIRTIO_NET_CTRL_ANNOUNCE = 3
export const VIRTIO_NET_CTRL_ANNOUNCE_ACK = 0
export const VIRTIO_NET_CTRL_MQ = 4
export const VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET = 0
export const VIRTIO_NET_CTRL_GUEST_OFFLOADS = 5
export const VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET = 0

/** struct ethhdr: destination, source, le type. */
export const ETH_HEADER_SIZE = 14
/** The largest frame that a header describes: 65535 bytes of IP, behind Ethernet and two VLAN tags (linux: IP_MAX). */
export const MAX_FRAME_SIZE = 65535 + ETH_HEADER_SIZE + 8
