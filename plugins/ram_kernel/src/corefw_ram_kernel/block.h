/*
 * A RAM block whose pages arrive while its guest runs (postcopy). See block.c.
 */
#ifndef BLOCK_H
#define BLOCK_H

#include <stdint.h>

#include "journal.h"

enum mark { MISSING, CLAIMED, RECEIVED };

struct block {
    uint8_t *ram;        /* its first page, as this process has it mapped */
    uint64_t pages;      /* its length */
    uint8_t *marks;      /* an enum mark for each page */
    uint8_t *awaited;    /* for each page, whether the guest has begun to wait for it */
    uint64_t address;    /* the first page in the guest's process */
    int64_t userfaultfd; /* of that process; -1: no guest waits for pages */
    struct journal *journal;
    uint64_t number; /* of the block in the journal */
};

/* Pages that were stored and could not be installed, for the caller to act on. */
struct failure {
    uint64_t first, end; /* there may be others between them */
    int64_t error;       /* an errno; 0 if there are none */
};

int is_valid_block(const struct block *block);
int claim(const struct block *block, uint64_t page);
void give_up(const struct block *block, uint64_t page);
void mark_received(const struct block *block, uint64_t page);
int has_been_received(const struct block *block, uint64_t page);
int is_awaited(const struct block *block, uint64_t page);
int await_page(const struct block *block, uint64_t page);
void install(const struct block *block, int userfaultfd, uint64_t first, uint64_t end, struct failure *failure);

#endif
