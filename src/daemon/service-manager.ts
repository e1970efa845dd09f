/** sd_notify for the command line, which knows no addon. */
export { monotonicMicroseconds, notifyServiceManager } from '../engine/service-manager.ts'
