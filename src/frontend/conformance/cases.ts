/** All cases, in the order of their groups' files. It must not run them. */

import { blkCases } from './blk.ts'
import type { ConformanceCase } from './case.ts'
import { configCases } from './config.ts'
import { featureCases } from './features.ts'
import { inflightCases } from './inflight.ts'
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
import { vringCases } from './vrings.ts'

export const CASES: readonly ConformanceCase[] = [
  ...featureCases,
  ...messageCases,
  ...configCases,
  ...memoryCases,
  ...vringCases,
  ...splitCases,
  ...packedCases,
  ...notificationCases,
  ...blkCases,
  ...netCases,
  ...inflightCases,
  ...loggingCases,
  ...iommuCases,
  ...migrationCases,
  ...robustnessCases,
]
