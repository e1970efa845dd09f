/** What virtiod's exit codes mean. They are API. */

/** Done, or ended by SIGTERM or SIGINT as asked. */
export const EXIT_OK = 0
/** Something failed while running; for `verify`: a case failed. Also: a second signal cut the shutdown short. */
export const EXIT_FAILURE = 1
/** Bad usage or configuration; nothing was served. Restarting won't help (systemd: RestartPreventExitStatus=2). */
export const EXIT_USAGE = 2
