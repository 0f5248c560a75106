/*
 * What happens to the page faults of a guest, for statistics. See journal.c.
 */
#ifndef JOURNAL_H
#define JOURNAL_H

#include <stdint.h>

enum { ENTRIES = 4096 };

enum happening {
    BEGAN,     /* a thread of the guest waits for the page */
    INSTALLED, /* the guest sees the page, which it had waited for */
    WAS_HERE,  /* it waited for a page that had arrived before, and that is about to be installed */
};

struct entry {
    uint64_t time; /* CLOCK_MONOTONIC in nanoseconds */
    uint64_t what; /* an enum happening */
    uint64_t block, page;
    uint64_t thread; /* its id, with BEGAN */
};

struct journal {
    uint64_t first, end; /* entries first to end - 1 are to be read; entry n is at n % ENTRIES */
    uint64_t locked;
    struct entry entries[ENTRIES];
};

uint64_t nanoseconds(void);
void note(struct journal *journal, enum happening what, uint64_t block, uint64_t page, uint64_t thread);
uint64_t unread(const struct journal *journal);

#endif
