/**
 * In-flight tracking (vhost-user.rst "Inflight I/O tracking"): which chains the device took and did not give back, in
 * memory that outlives this process, so that the next one resubmits them. Pure; a ring keeps its region as it pops and
 * pushes. It must not know who shares the memory.
 */
export { forgetInflight, hasInflight, InflightError, inflightSize } from './inflight-region.ts'
export {
  PackedInflight,
  type PackedRecovery,
  type RecoveredChain,
  type RecoveredDescriptor,
} from './packed-inflight.ts'
export { SplitInflight } from './split-inflight.ts'
