/*
 * Sends what is left of a RAM block in postcopy: the next pages that are marked as dirty, in records of the stream, a few
 * with each system call, so that a thread that has a requested page soon gets the processor.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include "piece.h"

enum { MOST = 2048 /* pages between two calls of the caller's, at most */ };

struct sending {
    struct sent_block block;
    uint64_t next;    /* where to look for dirty pages */
    uint64_t most;    /* pages to claim at most */
    uint64_t claimed; /* pages that were claimed, in `list` */
    uint64_t zeros;   /* how many of them are zero */
    uint64_t bytes;   /* sent by one call */
    struct piece piece;
    uint64_t list[MOST];
};

static int is_valid(const struct sending *at)
{
    return is_valid_sent_block(&at->block) && at->next <= at->block.pages && at->most <= MOST && at->claimed <= at->most &&
           at->piece.count <= PIECE;
}

/* The next piece, empty if nothing is left to be claimed. */
static void claim_piece(struct sending *at)
{
    const struct sent_block *block = &at->block;

    while (at->piece.count < PIECE && at->claimed < at->most && at->next < block->pages) {
        const uint8_t *found = memchr(block->dirty + at->next, 1, block->pages - at->next);

        if (!found) {
            at->next = block->pages;
            return;
        }
        at->next = (uint64_t)(found - block->dirty);
        if (claim_dirty(block, at->next)) {
            at->zeros += (uint64_t)add_page(&at->piece, block, at->next, NULL, 0);
            at->list[at->claimed++] = at->next;
        }
        at->next++;
    }
}

/* Send until `most` pages are claimed, or none is left from `next` on. 0, -1 for numbers that do not fit, or an errno of
 * sendmsg(2): EAGAIN only if no byte went. Done when the piece is empty. */
int corefw_send_dirty(int descriptor, struct sending *at)
{
    int own, error = 0;

    if (!is_valid(at))
        return -1;
    /* Another thread may close the descriptor meanwhile, and its number may be another socket's by then. */
    own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return errno;
    at->bytes = 0;
    while (!error) {
        if (!at->piece.count)
            claim_piece(at);
        if (!at->piece.count)
            break;
        error = send_piece(own, &at->piece, &at->bytes);
        sched_yield(); /* see docs/compiled-code.md */
    }
    close(own);
    return error == EAGAIN && at->bytes ? 0 : error;
}

/* Claim pages beside a thread that sends others: for each, whether it was still to be sent. 0, or -1 for a page that the
 * block does not have; those before it are claimed. */
int corefw_claim_dirty(const struct sent_block *block, const uint64_t *pages, uint64_t count, uint8_t *claimed)
{
    if (!is_valid_sent_block(block))
        return -1;
    for (uint64_t i = 0; i < count; i++) {
        if (pages[i] >= block->pages)
            return -1;
        claimed[i] = (uint8_t)claim_dirty(block, pages[i]);
    }
    return 0;
}
