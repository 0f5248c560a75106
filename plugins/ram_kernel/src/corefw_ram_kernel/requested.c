/*
 * Receives the pages that the guest waits for, which come over a channel of their own (postcopy-preempt): header, page,
 * header, page, each in place and installed at once.
 *
 * Only records of whole pages of the same block as before are dealt with here, and only if the page has not arrived.
 * The header of any other goes to the caller. So does one whose page another thread has claimed for longer than PATIENCE:
 * for a list that is expected in the stream it is claimed for a moment only.
 *
 * Invariant: what comes from the stream is never used as an address or a length, as in arriving.c.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include "block.h"
#include "receive.h"
#include "records.h"

enum {
    PATIENCE = 5000, /* looks at a page that another thread has claimed */
    NAP = 20000,     /* nanoseconds between two of them: that thread may have a lower priority, and need the processor */
};

struct requested {
    uint64_t taken;         /* bytes received */
    uint64_t page, part;    /* a page that is claimed, and bytes of its record that are here; 0 if there is none */
    uint64_t left;          /* bytes of a header that is for the caller ... */
    uint8_t header[HEADER]; /* ... and the header */
    struct failure failure;
};

static int claim_patiently(const struct block *block, uint64_t page)
{
    struct timespec nap = {.tv_nsec = NAP};

    for (int looks = 0; looks < PATIENCE; looks++) {
        if (claim(block, page))
            return 1;
        if (has_been_received(block, page))
            return 0;
        nanosleep(&nap, NULL);
    }
    return 0;
}

/* Receive a page that is claimed; 0 if bytes came, -1 at the end of the stream, or an errno. */
static int receive_page(int descriptor, const struct block *block, struct requested *at)
{
    ssize_t got = receive_some(descriptor, block->ram + at->page * PAGE + at->part - HEADER, RECORD - at->part);

    if (got <= 0)
        return got < 0 ? errno : -1;
    at->taken += (uint64_t)got;
    at->part += (uint64_t)got;
    if (at->part < RECORD)
        return 0;
    at->part = 0;
    mark_received(block, at->page);
    install(block, (int)block->userfaultfd, at->page, at->page + 1, &at->failure);
    return 0;
}

/* The same for a header, after which the page is claimed, or the header is the caller's. */
static int receive_header(int descriptor, const struct block *block, struct requested *at)
{
    ssize_t got = receive_some(descriptor, at->header + at->left, HEADER - at->left);
    uint64_t page;

    if (got <= 0)
        return got < 0 ? errno : -1;
    at->taken += (uint64_t)got;
    at->left += (uint64_t)got;
    if (at->left < HEADER)
        return 0;
    page = page_of(at->header, block->pages);
    if (page < block->pages && claim_patiently(block, page)) {
        at->page = page;
        at->part = HEADER;
        at->left = 0;
    }
    return 0;
}

/* Receive until something else comes, or there is something to tell. */
static int receive_requested(int descriptor, const struct block *block, struct requested *at)
{
    int error = 0;

    while (!error && at->left < HEADER && !at->failure.error) {
        error = at->part ? receive_page(descriptor, block, at) : receive_header(descriptor, block, at);
        if (error == EAGAIN && wait_readable(descriptor))
            error = 0;
    }
    if (error == -1 || (error == EAGAIN && at->taken))
        return 0;
    if (error && at->part)
        give_up(block, at->page);
    return error;
}

/* 0, -1 for numbers that do not fit, or an errno: EAGAIN if nothing came. Nothing taken: the end of the stream. If it
 * fails, no page is claimed. */
int corefw_receive_requested(int descriptor, const struct block *block, struct requested *at)
{
    int own, error;

    if (!is_valid_block(block) || at->taken || at->part || at->left)
        return -1;
    /* Another thread may close a descriptor meanwhile, and its number may be another file's by then. */
    own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return errno;
    error = receive_requested(own, block, at);
    close(own);
    return error;
}
