/** A limit for something that may never end. */

/**
 * Resolves as `work` does. What it still does later is nobody's business any more.
 * @param late an error, or the message of one
 * @throws what it throws, or `late` after `ms`
 */
export async function within<T>(work: Promise<T>, ms: number, late: string | Error): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  const timeout = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(typeof late === 'string' ? new Error(late) : late), ms)
  })
  work.catch(() => {})
  try {
    return await Promise.race([work, timeout])
  } finally {
    clearTimeout(timer)
  }
}
