/*
 * Receives a guest's RAM while the guest runs (postcopy): records of pages into place, from a buffer or straight from a
 * stream socket. block.c has the marks that say which page may be stored, and by whom.
 *
 * Received in place is what is expected: the next pages that have not arrived, and that the guest does not wait for,
 * since those come over a channel of their own, if there is one. They are claimed for one recvmsg(2), which never
 * waits: a claim by guess must not keep out the thread that has such a page. Then the headers are compared. Pages whose
 * header is right have arrived, and are installed. At the first difference the rest of the bytes goes to the caller,
 * and the claims are given up; such a page is full of something else, but it is MISSING, so no one sees it. A page
 * whose header is right but which is not all there stays claimed, and the next list begins with its rest.
 *
 * Invariant: what comes from the stream is never used as an address or a length. A page number in a header is used only
 * after it was compared with the length of the block, and the caller's numbers are checked before anything else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include "block.h"
#include "receive.h"
#include "records.h"

enum {
    SOME = 32,    /* pages in a list at most: a kernel without preemption lets no other thread run while it is copied */
    LISTS = 256,  /* lists until the caller may look at something else */
    FEW = 64,     /* bytes received where no page is expected: a section's end, and the next one's header */
};

struct arrival {
    /* what the caller says */
    uint64_t next;  /* the page expected next; the block's length if none is */
    uint64_t total; /* pages to receive from the socket at most, without `page` */
    uint8_t *rest;  /* room for SOME records */
    /* both: a page that the caller has claimed, and bytes of its record that are here; 0 if there is none */
    uint64_t page, part;
    /* what became of it */
    uint64_t taken; /* bytes consumed: of the buffer, or from the socket */
    uint64_t whole; /* pages received from the socket */
    uint64_t left;  /* bytes in `rest`: what came last, and was not expected */
    struct failure failure;
};

/* Consecutive pages that have arrived, to be installed together. */
struct run {
    uint64_t first, end;
};

static void flush(const struct block *block, int userfaultfd, struct run *run, struct failure *failure)
{
    if (run->first < run->end)
        install(block, userfaultfd, run->first, run->end, failure);
    run->first = run->end = 0;
}

static void has_arrived(const struct block *block, int userfaultfd, struct run *run, uint64_t page, struct failure *failure)
{
    mark_received(block, page);
    if (page != run->end || run->end - run->first == SOME) {
        flush(block, userfaultfd, run, failure);
        run->first = page;
    }
    run->end = page + 1;
}

/* -- from a buffer ------------------------------------------------------------------------------------------------- */

/* Store the whole records at the buffer's start, up to the first of another kind. With `begun`, also begin the page of
 * one that is cut. Pages that have arrived, or that another thread has, are dropped. */
static void store_records(const struct block *block, const uint8_t *bytes, uint64_t size, int begun, struct arrival *at)
{
    int userfaultfd = (int)block->userfaultfd;
    struct run run = {0};
    uint64_t page;

    for (; size - at->taken >= RECORD; at->taken += RECORD) {
        const uint8_t *record = bytes + at->taken;

        page = page_of(record, block->pages);
        if (page == block->pages)
            break;
        if (claim(block, page)) {
            memcpy(block->ram + page * PAGE, record + HEADER, PAGE);
            has_arrived(block, userfaultfd, &run, page, &at->failure);
        }
        at->next = page + 1;
    }
    flush(block, userfaultfd, &run, &at->failure);
    if (!begun || size - at->taken < HEADER || size - at->taken >= RECORD)
        return;
    page = page_of(bytes + at->taken, block->pages);
    if (page == block->pages || !claim(block, page))
        return;
    at->part = size - at->taken;
    memcpy(block->ram + page * PAGE, bytes + at->taken + HEADER, at->part - HEADER);
    at->page = page;
    at->next = page + 1;
    at->taken = size;
}

/* 0, or -1 for numbers that do not fit. */
int corefw_store_records(const struct block *block, const uint8_t *bytes, uint64_t size, int begun, struct arrival *at)
{
    if (!is_valid_block(block) || at->part || at->taken || at->next > block->pages)
        return -1;
    store_records(block, bytes, size, begun, at);
    return 0;
}

/* -- from a socket ------------------------------------------------------------------------------------------------- */

struct list {
    uint64_t count, part; /* pages; bytes of the first one's record that are here already */
    uint64_t pages[SOME];
    uint64_t headers[SOME];
};

/* Claim the pages that are expected. */
static void make_list(const struct block *block, const struct arrival *at, struct list *list)
{
    uint64_t most = smaller(SOME, at->total - at->whole + !!at->part), page = at->next;

    list->count = 0;
    list->part = at->part;
    if (at->part)
        list->pages[list->count++] = at->page;
    while (list->count < most && page < block->pages) {
        const uint8_t *missing = memchr(block->marks + page, MISSING, block->pages - page);

        if (!missing)
            return;
        page = (uint64_t)(missing - block->marks);
        if (!is_awaited(block, page) && claim(block, page))
            list->pages[list->count++] = page;
        page++;
    }
}

static void give_up_from(const struct block *block, const struct list *list, uint64_t number)
{
    for (; number < list->count; number++)
        give_up(block, list->pages[number]);
}

static ssize_t receive_list(int descriptor, const struct block *block, struct list *list)
{
    struct iovec pieces[2 * SOME], *piece = pieces;

    for (uint64_t i = 0; i < list->count; i++) {
        uint8_t *place = block->ram + list->pages[i] * PAGE;

        if (i || !list->part)
            *piece++ = (struct iovec){&list->headers[i], HEADER};
        if (i || !list->part)
            *piece++ = (struct iovec){place, PAGE};
        else
            *piece++ = (struct iovec){place + list->part - HEADER, RECORD - list->part};
    }
    return receive_pieces(descriptor, pieces, (size_t)(piece - pieces));
}

/* How many of the first `count` headers are right, up to the first that is not. */
static uint64_t count_right(const struct list *list, uint64_t count)
{
    uint64_t i = list->part ? 1 : 0;

    while (i < count && list->headers[i] == header_of(list->pages[i]))
        i++;
    return smaller(i, count);
}

/* Copy `size` bytes of a list, from the record `number` on, to the caller's room. */
static void leave_rest(const struct block *block, const struct list *list, uint64_t number, struct arrival *at,
                       uint64_t size)
{
    uint8_t *rest = at->rest;

    at->left = size;
    for (; size; number++) {
        uint64_t header = smaller(size, HEADER), page = smaller(size - header, PAGE);

        memcpy(rest, &list->headers[number], header);
        memcpy(rest + header, block->ram + list->pages[number] * PAGE, page);
        rest += header + page;
        size -= header + page;
    }
}

/* A list of which, with what was there before, `size` bytes came. */
static void take_list(const struct block *block, int userfaultfd, const struct list *list, uint64_t size,
                      struct arrival *at)
{
    uint64_t whole = size / RECORD, part = size % RECORD, right = count_right(list, whole + (part >= HEADER));
    struct run run = {0};

    for (uint64_t i = 0; i < smaller(right, whole); i++)
        has_arrived(block, userfaultfd, &run, list->pages[i], &at->failure);
    if (right > whole) { /* the header of the page that is cut is right, too */
        at->page = list->pages[whole];
        at->part = part;
        give_up_from(block, list, whole + 1);
    } else {
        at->part = 0;
        leave_rest(block, list, right, at, size - right * RECORD);
        give_up_from(block, list, right);
    }
    at->whole += right - (list->part && right);
    if (right)
        at->next = list->pages[right - 1] + 1;
    flush(block, userfaultfd, &run, &at->failure);
}

/* Receive one list; 0 if bytes came, -1 at the end of the stream, or an errno. */
static int receive_next(int descriptor, int userfaultfd, const struct block *block, struct arrival *at)
{
    struct list list;
    ssize_t got;

    make_list(block, at, &list);
    got = list.count ? receive_list(descriptor, block, &list) : receive_some(descriptor, at->rest, FEW);
    if (got <= 0) {
        give_up_from(block, &list, list.part ? 1 : 0);
        return got < 0 ? errno : -1;
    }
    at->taken += (uint64_t)got;
    if (list.count)
        take_list(block, userfaultfd, &list, list.part + (uint64_t)got, at);
    else
        at->left = (uint64_t)got;
    return 0;
}

/* Receive until something else comes, nothing more does, or there is something to tell. */
static int receive_lists(int descriptor, int userfaultfd, const struct block *block, struct arrival *at)
{
    uint64_t begun = at->part ? at->page : block->pages; /* its claim is the caller's */

    for (int lists = 0; lists < LISTS && !at->left && !at->failure.error; lists++) {
        int error;

        sched_yield(); /* see docs/compiled-code.md */
        error = wait_readable(descriptor) ? receive_next(descriptor, userfaultfd, block, at) : EAGAIN;
        if (error == -1 || (error == EAGAIN && at->taken))
            return 0;
        if (error == EAGAIN)
            return error;
        if (error) {
            if (at->part && at->page != begun)
                give_up(block, at->page);
            return error;
        }
    }
    return 0;
}

/* 0, -1 for numbers that do not fit, or an errno: EAGAIN if nothing came. Nothing taken: the end of the stream. If it
 * fails, no page is claimed, but the one that had begun before. */
int corefw_receive_records(int descriptor, const struct block *block, struct arrival *at)
{
    int own, userfaultfd, error;

    if (!is_valid_block(block) || at->next > block->pages || !at->rest || at->taken || at->whole || at->left ||
        (at->part && (at->page >= block->pages || at->part < HEADER || at->part >= RECORD)))
        return -1;
    /* Another thread may close a descriptor meanwhile, and its number may be another file's by then. */
    own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return errno;
    userfaultfd = (int)block->userfaultfd;
    error = receive_lists(own, userfaultfd, block, at);
    close(own);
    return error;
}
