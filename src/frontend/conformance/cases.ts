/** All cases, in the order of their groups' files. It must not run them. */
import { blkCases } from './blk.ts'
import { blkWriteCases } from './blk-writes.ts'
import type { ConformanceCase } from './case.ts'
import { configCases } from './config.ts'
import { featureCases } from './features.ts'
import { inflightCases } from './inflight.ts'
import { inflightPackedCases } from './inflight-packed.ts'
import { inflightSplitCases } from './inflight-split.ts'
import { iommuCases } from './iommu.ts'
import { loggingCases } from './logging.ts'
import { memoryCases } from './memory.ts'
import { migrationCases } from './migration.ts'
import { netCases } from './net.ts'
import { notificationCases } from './notifications.ts'
import { packedCases } from './packed.ts'
import { messageCases } from './protocol.ts'
import { robustnessCases } from './robustness.ts'
import { splitCases } from './split.ts'
import { vringFdCases } from './vring-fds.ts'
import { vringRefusalCases } from './vring-refusals.ts'
import { vringStopCases } from './vring-stops.ts'
import { vringCases } from './vrings.ts'

export const CASES: readonly ConformanceCase[] = [
  ...featureCases,
  ...messageCases,
  ...configCases,
  ...memoryCases,
  ...vringCases,
  ...vringStopCases,
  ...vringFdCases,
  ...vringRefusalCases,
  ...splitCases,
  ...packedCases,
  ...notificationCases,
  ...blkCases,
  ...blkWriteCases,
  ...netCases,
  ...inflightCases,
  ...inflightSplitCases,
  ...inflightPackedCases,
  ...loggingCases,
  ...iommuCases,
  ...migrationCases,
  ...robustnessCases,
]
