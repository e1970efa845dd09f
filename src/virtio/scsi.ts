/**
 * virtio-scsi as the specification has it (virtio 1.3 §5.6): feature bits, the layout of the config space, of requests and
 * of events, and response codes. Names and values are the spec's own. What is inside of a command (SCSI itself) is not
 * here. Pure: no device, no driver.
 */

// virtio 1.3 §5.6.2 "Virtqueues"
export const VIRTIO_SCSI_CONTROL_QUEUE = 0
export const VIRTIO_SCSI_EVENT_QUEUE = 1
/** The first request queue; the others follow. */
export const VIRTIO_SCSI_REQUEST_QUEUE = 2

// virtio 1.3 §5.6.3 "Feature bits"
export const VIRTIO_SCSI_F_INOUT = 0
export const VIRTIO_SCSI_F_HOTPLUG = 1
export const VIRTIO_SCSI_F_CHANGE = 2
export const VIRTIO_SCSI_F_T10_PI = 3

// virtio 1.3 §5.6.4 "Device configuration layout": byte offsets
export const VIRTIO_SCSI_CONFIG_NUM_QUEUES = 0
export const VIRTIO_SCSI_CONFIG_SEG_MAX = 4
export const VIRTIO_SCSI_CONFIG_MAX_SECTORS = 8
export const VIRTIO_SCSI_CONFIG_CMD_PER_LUN = 12
export const VIRTIO_SCSI_CONFIG_EVENT_INFO_SIZE = 16
export const VIRTIO_SCSI_CONFIG_SENSE_SIZE = 20
export const VIRTIO_SCSI_CONFIG_CDB_SIZE = 24
export const VIRTIO_SCSI_CONFIG_MAX_CHANNEL = 28
export const VIRTIO_SCSI_CONFIG_MAX_TARGET = 30
export const VIRTIO_SCSI_CONFIG_MAX_LUN = 32
/** The whole struct virtio_scsi_config. */
export const VIRTIO_SCSI_CONFIG_SIZE = 36

/** What the driver finds in `sense_size` and `cdb_size` until it writes there. */
export const VIRTIO_SCSI_SENSE_DEFAULT_SIZE = 96
export const VIRTIO_SCSI_CDB_DEFAULT_SIZE = 32

// virtio 1.3 §5.6.6.1 "Device Operation: Request Queues": struct virtio_scsi_req_cmd, byte offsets in its readable part
export const VIRTIO_SCSI_REQ_LUN = 0
export const VIRTIO_SCSI_REQ_ID = 8
export const VIRTIO_SCSI_REQ_TASK_ATTR = 16
export const VIRTIO_SCSI_REQ_CDB = 19
/** The readable part before data: this and `cdb_size` bytes. */
export const VIRTIO_SCSI_REQ_HEADER_SIZE = 19

// … and in its writable part
export const VIRTIO_SCSI_RESP_SENSE_LEN = 0
export const VIRTIO_SCSI_RESP_RESIDUAL = 4
export const VIRTIO_SCSI_RESP_STATUS_QUALIFIER = 8
export const VIRTIO_SCSI_RESP_STATUS = 10
export const VIRTIO_SCSI_RESP_RESPONSE = 11
export const VIRTIO_SCSI_RESP_SENSE = 12
/** The writable part before data: this and `sense_size` bytes. */
export const VIRTIO_SCSI_RESP_HEADER_SIZE = 12

// virtio 1.3 §5.6.6.1 and §5.6.6.2: response codes
export const VIRTIO_SCSI_S_OK = 0
export const VIRTIO_SCSI_S_OVERRUN = 1
export const VIRTIO_SCSI_S_ABORTED = 2
export const VIRTIO_SCSI_S_BAD_TARGET = 3
export const VIRTIO_SCSI_S_RESET = 4
export const VIRTIO_SCSI_S_BUSY = 5
export const VIRTIO_SCSI_S_TRANSPORT_FAILURE = 6
export const VIRTIO_SCSI_S_TARGET_FAILURE = 7
export const VIRTIO_SCSI_S_NEXUS_FAILURE = 8
export const VIRTIO_SCSI_S_FAILURE = 9
/** The names of the task management functions for the same values. */
export const VIRTIO_SCSI_S_FUNCTION_COMPLETE = 0
export const VIRTIO_SCSI_S_FUNCTION_SUCCEEDED = 10
export const VIRTIO_SCSI_S_FUNCTION_REJECTED = 11
export const VIRTIO_SCSI_S_INCORRECT_LUN = 12

// virtio 1.3 §5.6.6.2 "Device Operation: controlq": types, each a le32 at the start
export const VIRTIO_SCSI_T_TMF = 0
export const VIRTIO_SCSI_T_AN_QUERY = 1
export const VIRTIO_SCSI_T_AN_SUBSCRIBE = 2

// … task management functions: struct virtio_scsi_ctrl_tmf
export const VIRTIO_SCSI_T_TMF_ABORT_TASK = 0
export const VIRTIO_SCSI_T_TMF_ABORT_TASK_SET = 1
export const VIRTIO_SCSI_T_TMF_CLEAR_ACA = 2
export const VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET = 3
export const VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET = 4
export const VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET = 5
export const VIRTIO_SCSI_T_TMF_QUERY_TASK = 6
export const VIRTIO_SCSI_T_TMF_QUERY_TASK_SET = 7
export const VIRTIO_SCSI_TMF_SUBTYPE = 4
export const VIRTIO_SCSI_TMF_LUN = 8
export const VIRTIO_SCSI_TMF_ID = 16
/** The readable part; the writable one is the response, a byte. */
export const VIRTIO_SCSI_TMF_SIZE = 24

// … asynchronous notification: struct virtio_scsi_ctrl_an
export const VIRTIO_SCSI_AN_LUN = 4
export const VIRTIO_SCSI_AN_EVENT_REQUESTED = 12
/** The readable part; the writable one is le32 event_actual and the response, a byte. */
export const VIRTIO_SCSI_AN_SIZE = 16
export const VIRTIO_SCSI_AN_RESPONSE_SIZE = 5

// virtio 1.3 §5.6.6.3 "Device Operation: eventq": struct virtio_scsi_event
export const VIRTIO_SCSI_EVENT_EVENT = 0
export const VIRTIO_SCSI_EVENT_LUN = 4
export const VIRTIO_SCSI_EVENT_REASON = 12
export const VIRTIO_SCSI_EVENT_SIZE = 16

/** In `event`: some were lost before this one, for want of buffers. */
export const VIRTIO_SCSI_T_EVENTS_MISSED = 0x8000_0000
export const VIRTIO_SCSI_T_NO_EVENT = 0
export const VIRTIO_SCSI_T_TRANSPORT_RESET = 1
export const VIRTIO_SCSI_T_ASYNC_NOTIFY = 2
/** `reason` is additional sense code and, times 256, its qualifier. */
export const VIRTIO_SCSI_T_PARAM_CHANGE = 3

// … reasons of VIRTIO_SCSI_T_TRANSPORT_RESET
export const VIRTIO_SCSI_EVT_RESET_HARD = 0
export const VIRTIO_SCSI_EVT_RESET_RESCAN = 1
export const VIRTIO_SCSI_EVT_RESET_REMOVED = 2

/** The config space in words. */
export interface ScsiConfig {
  readonly numQueues: number
  readonly segMax: number
  /** In sectors of 512 bytes. */
  readonly maxSectors: number
  readonly cmdPerLun: number
  readonly eventInfoSize: number
  readonly senseSize: number
  readonly cdbSize: number
  readonly maxChannel: number
  readonly maxTarget: number
  readonly maxLun: number
}

/** Decodes a config space. @throws RangeError when it is shorter than the structure */
export function decodeScsiConfig(bytes: Uint8Array): ScsiConfig {
  if (bytes.length < VIRTIO_SCSI_CONFIG_SIZE)
    throw new RangeError(`a virtio-scsi config space has ${VIRTIO_SCSI_CONFIG_SIZE} bytes, not ${bytes.length}`)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const u32 = (at: number): number => view.getUint32(at, true)
  return {
    numQueues: u32(VIRTIO_SCSI_CONFIG_NUM_QUEUES),
    segMax: u32(VIRTIO_SCSI_CONFIG_SEG_MAX),
    maxSectors: u32(VIRTIO_SCSI_CONFIG_MAX_SECTORS),
    cmdPerLun: u32(VIRTIO_SCSI_CONFIG_CMD_PER_LUN),
    eventInfoSize: u32(VIRTIO_SCSI_CONFIG_EVENT_INFO_SIZE),
    senseSize: u32(VIRTIO_SCSI_CONFIG_SENSE_SIZE),
    cdbSize: u32(VIRTIO_SCSI_CONFIG_CDB_SIZE),
    maxChannel: view.getUint16(VIRTIO_SCSI_CONFIG_MAX_CHANNEL, true),
    maxTarget: view.getUint16(VIRTIO_SCSI_CONFIG_MAX_TARGET, true),
    maxLun: u32(VIRTIO_SCSI_CONFIG_MAX_LUN),
  }
}
