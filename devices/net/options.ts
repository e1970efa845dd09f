/**
 * The options of the network card. The keys are the flags of `virtiod net` and the keys of a `type: net` device in a
 * configuration file; help, README and JSON Schema are made from this table.
 */
import * as v from 'valibot'

/** A vring's index has 8 bits (vhost-user.rst "VHOST_USER_SET_VRING_KICK"): two queues per pair and the control queue. */
const MAX_PAIRS = 127

/** What a card hangs on: exactly one is given. */
const LINKS = ['tap', 'tap-fd', 'switch'] as const

/** What the kernel takes as the name of a link, and "%" less, which would stand for a number of its choice. */
const linkName = v.regex(
  /^(?!\.{1,2}$)(?!.*[%/:])[!-~]{1,15}$/,
  'Give 1 to 15 ASCII characters without space, slash, colon and percent sign'
)

const table = v.strictObject({
  tap: v.exactOptional(
    v.pipe(
      v.string(),
      linkName,
      v.description('A tap of the host, opened if there is one of that name and created if not'),
      v.metadata({ placeholder: 'NAME' })
    )
  ),
  'tap-fd': v.exactOptional(
    v.pipe(
      v.string(),
      v.regex(/^\d{1,9}(,\d{1,9}){0,126}$/, 'Give the numbers of open fds, separated by commas: 3 or 3,4'),
      v.description('Instead of --tap: inherited fds of an open tap with virtio-net headers, one per queue pair'),
      v.metadata({ placeholder: 'LIST' })
    )
  ),
  switch: v.exactOptional(
    v.pipe(
      v.string(),
      v.regex(
        /^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$/,
        'Give 1 to 64 letters, digits, dots, underscores and hyphens; the first is a letter or a digit'
      ),
      v.description('Instead of --tap: a switch inside virtiod; cards of one switch reach one another, without root'),
      v.metadata({ placeholder: 'NAME' })
    )
  ),
  uplink: v.exactOptional(
    v.pipe(
      v.string(),
      linkName,
      v.description('A tap that joins the switch to the host, opened or created as with --tap'),
      v.metadata({ placeholder: 'TAP', unset: 'the switch has none' })
    )
  ),
  bridge: v.exactOptional(
    v.pipe(
      v.string(),
      linkName,
      v.description('The bridge of the host that the tap or uplink is put on'),
      v.metadata({ placeholder: 'NAME', unset: 'it is left where it is' })
    )
  ),
  'queue-pairs': v.exactOptional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(1),
      v.maxValue(MAX_PAIRS),
      v.description('The most pairs of receive and transmit queue that a driver may use'),
      v.metadata({ placeholder: 'N', unset: '1, or one per fd of --tap-fd' })
    )
  ),
  mtu: v.exactOptional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(68),
      v.maxValue(65535),
      v.description('The MTU that the driver is told and the tap is given, in bytes'),
      v.metadata({ placeholder: 'BYTES', unset: "the driver's choice" })
    )
  ),
  mac: v.exactOptional(
    v.pipe(
      v.string(),
      v.regex(
        // The lowest bit of the first byte marks a group.
        /^(?!00(:00){5}$)[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$/,
        'Give six bytes as in 52:54:00:12:34:56, which are no group address and not all zero'
      ),
      v.description('The MAC address that the driver is told'),
      v.metadata({ placeholder: 'MAC', unset: "the front-end's or driver's choice" })
    )
  ),
  'queue-size': v.exactOptional(
    v.pipe(
      v.picklist([2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]),
      v.description('The largest ring that a driver may set up'),
      v.metadata({ placeholder: 'N', unset: 'any' })
    )
  ),
  pcap: v.exactOptional(
    v.pipe(
      v.string(),
      v.minLength(1),
      v.description(
        "Capture the card's packets in pcapng, from the first driver on; a full file becomes FILE.1, that FILE.2 …"
      ),
      v.metadata({ placeholder: 'FILE', path: true, unset: 'nothing is captured' })
    )
  ),
  'pcap-size': v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(2 ** 20),
      v.maxValue(Number.MAX_SAFE_INTEGER),
      v.description('The most bytes that a capture file may have'),
      v.metadata({ placeholder: 'BYTES', size: true })
    ),
    64 * 2 ** 20
  ),
  'pcap-files': v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(1),
      v.maxValue(1000),
      v.description('How many capture files are kept, the present one included'),
      v.metadata({ placeholder: 'N' })
    ),
    4
  ),
  'pcap-snaplen': v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(14),
      v.maxValue(262144),
      v.description('The most bytes that are captured of each packet; the default is more than any has'),
      v.metadata({ placeholder: 'BYTES' })
    ),
    262144
  ),
})

type Table = v.InferOutput<typeof table>

/**
 * What is wrong with options that are fine one by one: which of them, the problem, and what to do, without final dots;
 * undefined when they fit together.
 */
function misfit(options: Table): readonly [option: keyof Table, problem: string, fix: string] | undefined {
  const given = (name: keyof Table): boolean => options[name] !== undefined
  const [link, other] = LINKS.filter(given)
  if (link === undefined) {
    return ['tap', 'missing', 'Give tap for a tap of the host, tap-fd for an open one, or switch, which needs no root']
  }
  if (other !== undefined) return [other, `it excludes ${link}`, 'Give one of tap, tap-fd and switch']
  if (given('uplink') && link !== 'switch') {
    return ['uplink', `it is a switch's, and here is ${link}`, 'Give switch, or leave uplink away']
  }
  if (given('bridge') && link === 'switch' && !given('uplink')) {
    return ['bridge', 'the switch has no tap to put on it', 'Give uplink, or leave bridge away']
  }
  const fds = tapFds(options).length
  const pairs = options['queue-pairs'] ?? fds
  if (link === 'tap-fd' && pairs !== fds) {
    return ['queue-pairs', `tap-fd has ${fds}`, 'Give one fd per pair, or leave queue-pairs away']
  }
  return undefined
}

export const netOptions = v.pipe(
  table,
  v.rawCheck(({ dataset, addIssue }) => {
    if (!dataset.typed) return
    const found = misfit(dataset.value)
    if (found === undefined) return
    const [key, problem, fix] = found
    const input = dataset.value
    addIssue({
      message: `${problem}. ${fix}`,
      path: [{ type: 'object', origin: 'value', input, key, value: input[key] }],
    })
  }),
  // For the JSON Schema and the usage lines.
  v.metadata({ exactlyOne: LINKS })
)

export type NetOptions = v.InferOutput<typeof netOptions>

/** The numbers of `tap-fd`, in order; none without it. */
export function tapFds(options: Pick<NetOptions, 'tap-fd'>): number[] {
  return options['tap-fd']?.split(',').map(Number) ?? []
}

/** Bytes of `mac`; undefined without it. */
export function macBytes(options: Pick<NetOptions, 'mac'>): Uint8Array | undefined {
  return options.mac === undefined
    ? undefined
    : Uint8Array.from(options.mac.split(':'), (byte) => Number.parseInt(byte, 16))
}
