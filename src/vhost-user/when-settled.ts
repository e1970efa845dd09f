/**
 * Waits for all of `work`, also when one fails: the others may still be using what their caller is about to release.
 * @throws what the first of them rejected with
 */
export async function whenSettled(work: readonly Promise<unknown>[]): Promise<void> {
  for (const result of await Promise.allSettled(work)) if (result.status === 'rejected') throw result.reason
}
