/*
 * Answers page requests in postcopy without the interpreter: receives them from the return path, and sends the pages over
 * the channel of requested pages (postcopy-preempt).
 *
 * Only whole requests for a few pages of a known block are dealt with here. Everything else goes to the caller, which has
 * the bytes from there on: other messages, longer requests, wrong ones, and a message that has not come whole.
 *
 * Invariant: a request is hostile input. Its numbers are used only after they were compared with the block's length.
 *
 * Source: QEMU 10.0, source_return_path_thread and migrate_handle_rp_req_pages (migration/migration.c),
 * ram_save_host_page_urgent (migration/ram.c).
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <unistd.h>

#include "piece.h"
#include "receive.h"

enum {
    REQ_PAGES_ID = 3,      /* MIG_RP_MSG_REQ_PAGES_ID */
    REQ_PAGES = 4,         /* MIG_RP_MSG_REQ_PAGES */
    MESSAGE = 4,           /* u16 type, u16 length of the body */
    BODY = 8 + 4,          /* u64 start, u32 length; with an ID also u8 length of the name, and the name */
    LONGEST = 1024,        /* pages of a request that is answered here */
    ROOM = 4096,           /* bytes that are received at once */
};

struct asked_block {
    struct sent_block block;
    uint64_t claimed; /* pages that were claimed */
    uint64_t name_size;
    uint8_t name[NAME];
};

struct requests {
    struct asked_block *blocks;
    uint64_t count;    /* of blocks */
    uint64_t asked;    /* the block of the request before; `count` if it is not among them */
    uint64_t named;    /* the block of the record before; `count` likewise */
    /* for the caller to clear once it has counted it, as it does with `claimed` */
    uint64_t claiming; /* set before a page is claimed */
    uint64_t requests; /* that were answered or begun */
    uint64_t zeros;    /* pages that were claimed and are zero */
    /* what was done since the last corefw_serve_requests() began */
    uint64_t taken;    /* bytes received */
    uint64_t sent;     /* bytes sent */
    int64_t error;     /* why the last sendmsg(2) failed: an errno; 0 if it did not */
    /* a request that is being answered, and what goes out first */
    uint64_t next, end;
    struct piece piece;
    /* bytes that were received and are not dealt with */
    uint64_t first, held;
    uint8_t bytes[ROOM];
};

static int is_valid(const struct requests *at)
{
    if (!at->blocks || at->asked > at->count || at->named > at->count || at->piece.count > PIECE)
        return 0;
    for (uint64_t i = 0; i < at->count; i++)
        if (!is_valid_sent_block(&at->blocks[i].block) || at->blocks[i].name_size > NAME)
            return 0;
    return at->next == at->end ||
           (at->asked < at->count && at->next < at->end && at->end <= at->blocks[at->asked].block.pages);
}

static uint64_t number_at(const uint8_t *bytes, size_t size)
{
    uint64_t number = 0;

    for (size_t i = 0; i < size; i++)
        number = number << 8 | bytes[i];
    return number;
}

/* The block with this name; `count` if there is none. */
static uint64_t find_block(const struct requests *at, const uint8_t *name, uint64_t size)
{
    uint64_t i = 0;

    while (i < at->count && (at->blocks[i].name_size != size || memcmp(at->blocks[i].name, name, size)))
        i++;
    return i;
}

/* Take the next request out of `bytes`: whether there is one that is dealt with here. */
static int take_request(struct requests *at)
{
    const uint8_t *message = at->bytes + at->first, *body = message + MESSAGE;
    uint64_t type, size, start, length, block = at->asked, pages;

    if (at->held < MESSAGE + BODY)
        return 0;
    type = number_at(message, 2);
    size = number_at(message + 2, 2);
    if ((type != REQ_PAGES && type != REQ_PAGES_ID) || size < BODY || at->held < MESSAGE + size)
        return 0;
    if (type == REQ_PAGES ? size != BODY : size == BODY || size != BODY + 1 + (uint64_t)body[BODY])
        return 0;
    if (type == REQ_PAGES_ID)
        block = find_block(at, body + BODY + 1, body[BODY]);
    if (block == at->count)
        return 0;
    start = number_at(body, 8);
    length = number_at(body + 8, 4);
    pages = at->blocks[block].block.pages;
    if (start % PAGE || length % PAGE || !length || length / PAGE > LONGEST || start / PAGE >= pages ||
        length / PAGE > pages - start / PAGE)
        return 0;
    at->asked = block;
    at->next = start / PAGE;
    at->end = at->next + length / PAGE;
    at->first += MESSAGE + size;
    at->held -= MESSAGE + size;
    at->requests++;
    return 1;
}

/* Claim and send what is still to be sent of the request, first of all the rest of what was begun. */
static void answer(int outgoing, struct requests *at)
{
    at->error = 0;
    while (!at->error && (at->piece.count || at->next < at->end)) {
        struct asked_block *asked = &at->blocks[at->asked];

        while (!at->piece.sent && at->piece.count < PIECE && at->next < at->end) {
            uint64_t page = at->next++;

            __atomic_store_n(&at->claiming, 1, __ATOMIC_SEQ_CST);
            if (!claim_dirty(&asked->block, page))
                continue;
            asked->claimed++;
            at->zeros += (uint64_t)add_page(&at->piece, &asked->block, page,
                                            at->named == at->asked ? NULL : asked->name, asked->name_size);
            at->named = at->asked;
        }
        if (at->piece.count)
            at->error = send_piece(outgoing, &at->piece, &at->sent);
    }
}

/* Receive what is there: 0 if bytes came, -1 at the end of the stream, or an errno. */
static int receive_requests(int incoming, struct requests *at)
{
    ssize_t got = receive_some(incoming, at->bytes, ROOM);

    if (got <= 0)
        return got < 0 ? errno : -1;
    at->taken = at->held = (uint64_t)got;
    return 0;
}

static int serve(int incoming, int outgoing, struct requests *at)
{
    int error = receive_requests(incoming, at);

    if (error == EAGAIN && wait_readable(incoming))
        error = receive_requests(incoming, at);
    while (!at->error && take_request(at))
        answer(outgoing, at);
    return error == -1 ? 0 : error;
}

/* Wait for requests for a moment, and answer those that have come. The bytes that are for the caller are the `held` ones
 * from `first` on.
 *
 * 0, -1 for numbers that do not fit, or an errno of recvmsg(2), EAGAIN if nothing came. Nothing taken: the end of the
 * stream. After an `error` a request may have been begun: if it is EAGAIN, corefw_finish_request() goes on with it. */
int corefw_serve_requests(int incoming, int outgoing, struct requests *at)
{
    int own_incoming, own_outgoing, error;

    if (!is_valid(at) || at->piece.count || at->next < at->end)
        return -1;
    at->taken = at->sent = at->first = at->held = 0;
    at->error = 0;
    /* Another thread may close a descriptor meanwhile, and its number may be another file's by then. */
    own_incoming = fcntl(incoming, F_DUPFD_CLOEXEC, 0);
    if (own_incoming < 0)
        return errno;
    own_outgoing = fcntl(outgoing, F_DUPFD_CLOEXEC, 0);
    error = own_outgoing < 0 ? errno : serve(own_incoming, own_outgoing, at);
    if (own_outgoing >= 0)
        close(own_outgoing);
    close(own_incoming);
    return error;
}

/* Go on with a request that was begun. 0, -1 for numbers that do not fit, or an errno of sendmsg(2), with EAGAIN for a
 * socket that has not taken all of it: then another call goes on. */
int corefw_finish_request(int outgoing, struct requests *at)
{
    int own;

    if (!is_valid(at))
        return -1;
    if (at->error && at->error != EAGAIN) /* the kernel says only once why a connection has broken */
        return (int)at->error;
    own = fcntl(outgoing, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return errno;
    answer(own, at);
    close(own);
    return (int)at->error;
}
