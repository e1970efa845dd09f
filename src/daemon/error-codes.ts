/**
 * Every error code of virtiod and what it means. Codes are API: the README lists this table, a test holds both to it,
 * and a retired code is never used again.
 */
import { PROTOCOL_ERRORS } from '../vhost-user/errors.ts'
import { RING_ERRORS } from '../virtio/errors.ts'

export const ERROR_CODES: Readonly<Record<string, string>> = {
  // ---- ConfigError: the operator's; exit code 2
  ERR_COMMAND_UNKNOWN: 'There is no such command.',
  ERR_ARGUMENT: 'An argument that is no option is missing or superfluous.',
  ERR_OPTION_UNKNOWN: 'There is no such option or configuration key.',
  ERR_OPTION_REQUIRED: 'An option or key that is required is missing.',
  ERR_OPTION_VALUE: 'The value of an option or key is of the wrong type, out of range or not one of those allowed.',
  ERR_OPTION_VALUE_MISSING: 'An option on the command line lacks its value.',
  ERR_OPTION_DUPLICATE: 'An option is given twice, or two devices have the same name or socket.',
  ERR_OPTION_CONFLICT: 'Two options exclude each other.',
  ERR_CONFIG_READ: 'The configuration file cannot be read.',
  ERR_CONFIG_SYNTAX: 'The configuration file is neither valid YAML nor valid JSON.',
  ERR_SOCKET_PATH_LENGTH: 'The path of a unix socket is longer than the kernel allows.',
  ERR_SOCKET_BIND: 'A unix socket cannot be bound: another process serves it, or the directory does not allow it.',
  ERR_SOCKET_FD: 'The inherited fd is no unix stream socket.',
  ERR_IOTHREAD_CPUS: 'The processors of --iothread-cpus do not exist, or this process may not use them.',
  ERR_METRICS_LISTEN: 'The address of the metrics server is taken or cannot be had.',
  ERR_NEW_NAME: 'What is to be made by `virtiod new` has a name that npm or virtiod does not take.',
  ERR_NEW_DIRECTORY: 'The directory for `virtiod new` is not empty, or cannot be written.',
  ERR_DEMO_IMAGE: 'The demonstration image cannot be created.',
  ERR_BLK_FILE_OPEN: 'The disk image or block device cannot be opened.',
  ERR_BLK_FILE_KIND: 'What is to be served is neither a regular file nor a block device.',
  ERR_BLK_FILE_LOCKED: 'Another process serves the file.',
  ERR_BLK_FILE_SIZE: 'The file is empty, or its size is no multiple of the block size.',
  ERR_BLK_BLOCK_SIZE: 'The file can only be accessed in larger blocks than asked for.',
  ERR_BLK_CACHE: 'The file system cannot do O_DIRECT, which --cache none needs.',
  ERR_BLK_DISCARD: 'The file system cannot free space inside a file, which --discard on needs.',
  ERR_SCSI_LUN: 'A logical unit is not described as it has to be, or two have the same serial number.',
  ERR_SCSI_FILE_OPEN: 'The file of a logical unit cannot be opened.',
  ERR_SCSI_FILE_KIND: 'What is to be a logical unit is neither a regular file nor a block device.',
  ERR_SCSI_FILE_LOCKED: 'Another process serves the file of a logical unit.',
  ERR_SCSI_FILE_SIZE: 'The file of a logical unit is empty, or its size is no multiple of the block size.',
  ERR_SCSI_BLOCK_SIZE: 'The file of a logical unit can only be accessed in larger blocks than asked for.',
  ERR_SCSI_CACHE: 'The file system of a logical unit cannot do O_DIRECT, which --cache none needs.',
  ERR_SCSI_DISCARD: 'The file system of a logical unit cannot free space inside a file, which --discard on needs.',
  ERR_NET_TAP_PERMISSION: 'This user may not open or create the tap.',
  ERR_NET_TAP_DEVICE: 'There is no /dev/net/tun.',
  ERR_NET_TAP_BUSY: 'Another process or another device has the tap open.',
  ERR_NET_TAP_KIND: 'What is to be the tap is a link of another kind.',
  ERR_NET_TAP_QUEUES: 'The tap has fewer queues than pairs are asked for.',
  ERR_NET_TAP_HEADER: 'The packets of the tap do not begin with virtio-net headers.',
  ERR_NET_TAP_FD: 'An fd of --tap-fd is no queue of the same open tap, or is given twice.',
  ERR_NET_TAP_LINK: 'The tap is down, or in another network namespace, and cannot be set up.',
  ERR_NET_TAP_OPEN: 'The tap cannot be opened for another reason, which the message names.',
  ERR_NET_MTU: 'The tap cannot be given this MTU.',
  ERR_NET_BRIDGE: 'The bridge does not exist or is none, or the tap cannot be put on it.',
  ERR_NET_SWITCH_PORTS: 'All ports of the switch are taken.',
  ERR_NET_SWITCH_UPLINK: 'Two devices of a switch disagree about its uplink.',
  ERR_NET_PCAP: 'The capture file cannot be created, or is that of another device.',
  ERR_RNG_SOURCE:
    'The source of random bytes cannot be read, or is a regular file, which would tell two guests the same.',
  ERR_VSOCK_UDS_PATH:
    "The unix socket for a guest's host programs cannot be bound, or its path is too long for _PORT behind it.",
  ERR_VSOCK_UDS_IN_USE: 'Another process or another device listens on the unix socket for host programs.',
  ERR_INPUT_CONTROL: 'The control socket of an input device cannot be bound.',
  ERR_DEVICE_MODULE:
    'A device module cannot be loaded: it is not there, it or something that it imports has an error, or it never ends.',
  ERR_DEVICE_DEFINITION:
    'What a device module exports, or what its open returns, is no device: a field is missing or wrong.',
  // ---- ProtocolError: the front-end's; ends its session, or is a NACK
  ...sentences(PROTOCOL_ERRORS),
  // ---- DeviceError: the device's own
  ERR_DEVICE_API_VERSION: 'The device was written for another version of the device contract.',
  ERR_DEVICE_OPEN: 'A device module threw while it opened its device.',
  ERR_DEVICE_FAILED: 'A method of a device module threw, or its promise was rejected.',
  ERR_DEVICE_SHAPE: 'A device module that was reloaded or started again is another device than it was.',
  ERR_DEVICE_COMPLETED_TWICE: 'The device completed a chain that it had completed before.',
  ERR_DEVICE_STUCK: 'The device has not completed a chain, or not answered its front-end, for longer than its timeout.',
  ERR_DEVICE_EXIT: 'The device ended its thread: its module called process.exit.',
  ERR_DEVICE_OVERRUN: 'The device wrote more than the chain holds, or said so when it completed it.',
  ERR_DEVICE_CHAIN_GONE: 'The device read from a chain whose ring had ended.',
  ERR_DEVICE_THREAD: 'The two halves of an async device run on different threads.',
  ERR_DEVICE_RECEIVER: 'The device took a chain out of a packet receiver that holds none.',
  // ---- RingError: the driver's; stops that ring
  ERR_CHAIN: 'A request is shorter than what the device reads of it: its ring is broken with ERR_RING_REQUEST.',
  ...sentences(RING_ERRORS),
  // ---- a handover to a new process
  ERR_HANDOVER: 'The guests were not handed over to a new process: the one that served them goes on.',
  ERR_HANDOVER_LOST: 'A handover went wrong when the new process served already: the guests have to connect again.',
  // ---- the installation, and the other end
  ERR_FRONTEND: 'probe, verify or bench did not get from a back-end what they asked for.',
  ERR_NATIVE_LOAD:
    'The native addon is missing or was built for another machine; the message names the command that builds it.',
}

function sentences(meanings: Readonly<Record<string, string>>): Record<string, string> {
  const entries = Object.entries(meanings)
  return Object.fromEntries(entries.map(([code, text]) => [code, `${text.charAt(0).toUpperCase()}${text.slice(1)}.`]))
}
