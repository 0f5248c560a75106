/*
 * Sends what is left of a RAM block in postcopy: the next pages that are marked as dirty, in records of the stream, a few
 * with each system call, so that a thread that has a requested page soon gets the processor.
 *
 * Invariant: a page is sent by the thread that cleared its mark; marks are cleared atomically, for another thread sends
 * requested pages at the same time. A piece that the socket did not take whole is kept, and goes out first next time.
 *
 * Source: QEMU 10.0, ram_save_host_page and save_zero_page (migration/ram.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "records.h"

enum {
    PIECE = 16,        /* pages that are claimed and sent at once */
    MOST = 2048,       /* pages between two calls of the caller's, at most */
    ZERO_RECORD = 9,   /* a header and the fill byte */
    ZERO_FLAGS = 0x02 | 0x20, /* RAM_SAVE_FLAG_ZERO, RAM_SAVE_FLAG_CONTINUE */
};

struct sending {
    const uint8_t *ram;
    uint64_t pages;      /* its length */
    uint8_t *dirty;      /* for each page, whether it is still to be sent */
    const uint8_t *hole; /* for each page, whether it was never touched: it is zero, and not to be read */
    uint64_t next;       /* where to look for dirty pages */
    uint64_t most;       /* pages to claim at most */
    uint64_t claimed;    /* pages that were claimed, in `list` */
    uint64_t zeros;      /* how many of them are zero */
    uint64_t bytes;      /* sent by one call */
    uint64_t piece;      /* pages at the end of `list` that were not sent whole ... */
    uint64_t sent;       /* ... and bytes of their records that were */
    uint64_t list[MOST];
    uint8_t heads[PIECE][16]; /* of each page in the piece its header and, if it is zero, the fill byte */
    uint8_t sizes[PIECE];     /* bytes of that */
};

static int is_valid(const struct sending *at)
{
    return at->ram && at->dirty && at->hole && at->pages >= 1 && at->pages <= UINT64_MAX / PAGE && at->next <= at->pages &&
           at->most <= MOST && at->claimed <= at->most && at->piece <= PIECE && at->piece <= at->claimed;
}

static int claim(uint8_t *mark)
{
    return __atomic_load_n(mark, __ATOMIC_RELAXED) && __atomic_exchange_n(mark, 0, __ATOMIC_ACQ_REL);
}

static int is_zero(const struct sending *at, uint64_t page)
{
    const uint8_t *bytes = at->ram + page * PAGE;
    uint64_t word;

    if (at->hole[page])
        return 1;
    memcpy(&word, bytes, sizeof word);
    return !word && !memcmp(bytes, bytes + sizeof word, PAGE - sizeof word);
}

static void add(struct sending *at, uint64_t page)
{
    uint64_t zero = (uint64_t)is_zero(at, page);
    uint64_t header = htobe64(page * PAGE | (zero ? ZERO_FLAGS : FLAGS));

    memcpy(at->heads[at->piece], &header, HEADER);
    at->heads[at->piece][HEADER] = 0;
    at->sizes[at->piece] = zero ? ZERO_RECORD : HEADER;
    at->zeros += zero;
    at->list[at->claimed++] = page;
    at->piece++;
}

/* The next piece, empty if nothing is left to be claimed. */
static void claim_piece(struct sending *at)
{
    at->sent = 0;
    while (at->piece < PIECE && at->claimed < at->most && at->next < at->pages) {
        const uint8_t *found = memchr(at->dirty + at->next, 1, at->pages - at->next);

        if (!found) {
            at->next = at->pages;
            return;
        }
        at->next = (uint64_t)(found - at->dirty);
        if (claim(&at->dirty[at->next]))
            add(at, at->next);
        at->next++;
    }
}

/* Send as much of the piece as the socket takes: 0 or an errno. */
static int send_piece(int descriptor, struct sending *at)
{
    struct iovec parts[2 * PIECE];
    struct msghdr message = {.msg_iov = parts};
    const uint64_t *pages = at->list + at->claimed - at->piece;
    uint64_t skip = at->sent, total = 0;
    ssize_t sent;

    for (uint64_t i = 0; i < at->piece; i++) {
        struct iovec record[2] = {{at->heads[i], at->sizes[i]}, {(uint8_t *)at->ram + pages[i] * PAGE, PAGE}};

        for (int part = 0; part < (at->sizes[i] == HEADER ? 2 : 1); part++) {
            uint64_t passed = smaller(skip, record[part].iov_len);

            skip -= passed;
            if (passed == record[part].iov_len)
                continue;
            parts[message.msg_iovlen++] =
                (struct iovec){(uint8_t *)record[part].iov_base + passed, record[part].iov_len - passed};
            total += record[part].iov_len - passed;
        }
    }
    do {
        sent = sendmsg(descriptor, &message, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    if (sent < 0)
        return errno;
    at->bytes += (uint64_t)sent;
    at->sent += (uint64_t)sent;
    if ((uint64_t)sent == total)
        at->piece = 0;
    return 0;
}

/* Send until `most` pages are claimed, or none is left from `next` on. 0, -1 for numbers that do not fit, or an errno of
 * sendmsg(2): EAGAIN only if no byte went. Done when `piece` is 0. */
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
        if (!at->piece)
            claim_piece(at);
        if (!at->piece)
            break;
        error = send_piece(own, at);
    }
    close(own);
    return error == EAGAIN && at->bytes ? 0 : error;
}

/* Claim a page beside a corefw_send_dirty() in another thread: whether it was still to be sent. */
int corefw_claim_dirty(uint8_t *dirty, uint64_t page)
{
    return claim(dirty + page);
}
