/**
 * What a completion belongs to: the low byte of user_data's high word. The rest of the high word is the generation of a
 * queue, since ids are used again; the low word is the queue's id and 16 bits of the operation's own.
 */

/** I/O of a device; its user_data has no generation: a queue is there until the last one ended. */
export const OP_DEVICE = 0
export const OP_KICK = 1
export const OP_CALL = 2
/** The iothread's own: somebody has a message for it. */
export const OP_WAKE = 3
export const OP_CANCEL_KICK = 4
export const OP_CANCEL_CALL = 5
export const OP_WATCH = 6
export const OP_CANCEL_WATCH = 7
/** A session's own: the low word is its number. */
export const OP_LOG = 8
export const OP_CANCEL_LOG = 9
