/*
 * The journal of a guest's page faults. Threads that do not hold the interpreter lock write to it, Python reads it.
 *
 * The entries of a page are in the order in which things happened, since BEGAN is written before the page is marked as
 * awaited, and INSTALLED only of a page that is. If it is full, what happens is lost, and so is a part of the
 * statistics, nothing else. Each lock is held for some ten instructions.
 */
#include "journal.h"

#include <sched.h>
#include <time.h>

static void lock(struct journal *journal)
{
    while (__atomic_exchange_n(&journal->locked, 1, __ATOMIC_ACQUIRE))
        sched_yield();
}

static void unlock(struct journal *journal)
{
    __atomic_store_n(&journal->locked, 0, __ATOMIC_RELEASE);
}

uint64_t nanoseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

void note(struct journal *journal, enum happening what, uint64_t block, uint64_t page, uint64_t thread)
{
    lock(journal);
    if (journal->end - journal->first < ENTRIES) {
        journal->entries[journal->end % ENTRIES] = (struct entry){
            .time = nanoseconds(),
            .what = what,
            .block = block,
            .page = page,
            .thread = thread,
        };
        __atomic_store_n(&journal->end, journal->end + 1, __ATOMIC_SEQ_CST);
    }
    unlock(journal);
}

uint64_t unread(const struct journal *journal)
{
    return __atomic_load_n(&journal->end, __ATOMIC_SEQ_CST) - __atomic_load_n(&journal->first, __ATOMIC_SEQ_CST);
}

/* Move up to `most` entries to `entries`; how many. */
uint64_t corefw_read_journal(struct journal *journal, struct entry *entries, uint64_t most)
{
    uint64_t count = 0;

    lock(journal);
    for (; count < most && journal->first < journal->end; journal->first++)
        entries[count++] = journal->entries[journal->first % ENTRIES];
    unlock(journal);
    return count;
}
