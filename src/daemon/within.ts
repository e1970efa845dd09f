/** A limit for something that may never end. */

/**
 * Resolves as `work` does. What it still does later is nobody's business any more.
 * @throws what it throws, or an Error with the message `late` after `ms`
 */
export async function within<T>(work: Promise<T>, ms: number, late: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  const timeout = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(late)), ms)
  })
  work.catch(() => {})
  try {
    return await Promise.race([work, timeout])
  } finally {
    clearTimeout(timer)
  }
}
