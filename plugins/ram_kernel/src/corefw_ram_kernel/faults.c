/*
 * Serves the page faults of a guest that runs while its RAM is still arriving: reads them, installs pages that have
 * arrived, and requests the others from the source. block.c has the marks that say which have.
 *
 * What cannot be done here goes to the caller: a page that has arrived and cannot be installed, a page that is missing
 * where there is no socket to request it over, and the rest of a request that the socket did not take at once.
 *
 * A page is requested once over each connection: one that is awaited already has been requested, or the caller does so.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "block.h"
#include "receive.h"
#include "records.h"

enum {
    FAULTS = 32,               /* that are read at once */
    MESSAGE = 4 + 8 + 4 + 256, /* bytes of a request at most: type, length; offset, length; the block's name */
    OFFSET = 4,                /* where the offset is in a request */
    AROUND = 16,               /* pages, in aligned groups, that are installed together: as in postcopy_load.py */
    FULL = ENTRIES / 2,        /* entries of the journal from which on the caller is to read it */
    PAGE_FAULT = 0x12,         /* UFFD_EVENT_PAGEFAULT */
};

/* As in linux/userfaultfd.h, which is not everywhere where there is a C library. */
struct uffd_msg {
    uint8_t event, reserved[15];
    uint64_t address;
    uint32_t thread, padding;
};

/* A block whose faults are served, and the request of its first page. */
struct region {
    const struct block *block;
    uint64_t size;
    uint8_t request[MESSAGE];
};

struct missed {
    uint64_t region, page;
};

struct serving {
    /* what the caller says */
    struct region *regions;
    uint64_t count;
    struct journal *journal;
    int64_t userfaultfd; /* does not block */
    int64_t wake;        /* return when this is readable */
    uint64_t until;      /* return then: CLOCK_MONOTONIC in nanoseconds; 0: never */
    /* what became of it */
    uint64_t sent, size; /* bytes of `requests` that went out, and that there are */
    uint64_t left;       /* entries in `missed`: for the caller */
    struct missed missed[FAULTS];
    uint8_t requests[FAULTS * MESSAGE];
};

static void leave(struct serving *at, uint64_t region, uint64_t page)
{
    at->missed[at->left++] = (struct missed){region, page};
}

/* Install a page that has arrived, and with it those around it: they are likely to be needed next. */
static void install_around(struct serving *at, uint64_t region, uint64_t page)
{
    const struct block *block = at->regions[region].block;
    uint64_t next = page - page % AROUND, last = smaller(next + AROUND, block->pages), first;
    struct failure failure = {0};

    note(at->journal, WAS_HERE, block->number, page, 0);
    while (next < last) {
        for (first = next; first < last && !has_been_received(block, first);)
            first++;
        for (next = first; next < last && has_been_received(block, next);)
            next++;
        if (first < next)
            install(block, (int)at->userfaultfd, first, next, &failure);
    }
    if (failure.error)
        leave(at, region, page);
}

static void request(int descriptor, struct serving *at, uint64_t region, uint64_t page)
{
    uint64_t offset = htobe64(page * PAGE);
    uint8_t *message = at->requests + at->size;

    if (descriptor < 0) {
        leave(at, region, page);
        return;
    }
    memcpy(message, at->regions[region].request, at->regions[region].size);
    memcpy(message + OFFSET, &offset, sizeof(offset));
    at->size += at->regions[region].size;
}

static void serve(int descriptor, struct serving *at, const struct uffd_msg *fault)
{
    for (uint64_t region = 0; region < at->count; region++) {
        const struct block *block = at->regions[region].block;
        uint64_t page = (fault->address - block->address) / PAGE;
        int requested;

        if (fault->address < block->address || page >= block->pages)
            continue;
        note(at->journal, BEGAN, block->number, page, fault->thread);
        requested = await_page(block, page);
        if (has_been_received(block, page))
            install_around(at, region, page);
        else if (!requested || descriptor < 0)
            request(descriptor, at, region, page);
        return;
    }
}

/* Read what faults there are, and serve them; 0 or an errno. */
static int serve_all(int descriptor, struct serving *at)
{
    struct uffd_msg faults[FAULTS];
    ssize_t got = read((int)at->userfaultfd, faults, sizeof(faults)), sent;

    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : errno;
    at->sent = at->size = 0;
    for (size_t i = 0; i < (size_t)got / sizeof(*faults); i++)
        if (faults[i].event == PAGE_FAULT)
            serve(descriptor, at, &faults[i]);
    if (!at->size)
        return 0;
    do {
        sent = send(descriptor, at->requests, at->size, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    if (sent < 0 && errno != EAGAIN)
        return errno;
    at->sent = sent < 0 ? 0 : (uint64_t)sent;
    return 0;
}

static int serve_until_called(int descriptor, struct serving *at)
{
    struct pollfd ready[] = {
        {.fd = (int)at->userfaultfd, .events = POLLIN},
        {.fd = (int)at->wake, .events = POLLIN},
        {.fd = descriptor}, /* whether it has broken */
    };
    int error = 0;

    while (!error && !at->left && at->sent == at->size && unread(at->journal) < FULL) {
        int count = poll(ready, 3, TICK);

        if (count < 0 && errno != EINTR)
            return errno;
        if (count > 0 && ready[1].revents)
            return 0;
        if (count > 0 && ready[2].revents)
            return EPIPE; /* the kernel says why to one call only: leave that to the thread that receives */
        if (count > 0)
            error = serve_all(descriptor, at);
        else if (!count && unread(at->journal))
            return 0;
        if (at->until && nanoseconds() >= at->until)
            return error;
    }
    return error;
}

static int is_valid(const struct serving *at)
{
    for (uint64_t i = 0; i < at->count; i++)
        if (!is_valid_block(at->regions[i].block) || at->regions[i].size > MESSAGE ||
            at->regions[i].size < OFFSET + sizeof(uint64_t))
            return 0;
    return at->count && at->regions && at->journal && !at->left && !at->sent && !at->size;
}

/* Serve faults until the caller has something to do, or is called. `descriptor` is a stream socket, or negative. 0, -1
 * for numbers that do not fit, or an errno of read(2) or send(2), EPIPE also if the connection breaks meanwhile. */
int corefw_serve_faults(int descriptor, struct serving *at)
{
    int own = -1, error;

    if (!is_valid(at))
        return -1;
    /* Another thread may close a descriptor meanwhile, and its number may be another file's by then. */
    if (descriptor >= 0 && (own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0)) < 0)
        return errno;
    error = serve_until_called(own, at);
    if (own >= 0)
        close(own);
    return error;
}
