/*
 * Receives guest RAM: lists of page records, each a header of 8 bytes and a page, straight from a stream socket into
 * place. The same loop in NumPy is in corefw_ram/lists.py.
 *
 * Invariant: nothing that comes from the stream is used as an address or a length. Bytes go only into the pages and the
 * header room that the caller names, and the caller's numbers are checked before any system call. A header is compared
 * with the one that belongs there, and a difference ends the loop.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "records.h"

struct request {
    uint8_t *ram;      /* the block */
    uint64_t pages;    /* its length */
    uint64_t *headers; /* room for LIST headers */
    uint64_t first;    /* the page that is expected next */
    uint64_t size;     /* pages in the first list; each one that came as expected doubles it ... */
    uint64_t most;     /* ... up to this */
    uint64_t total;    /* pages to receive at most */
};

struct result {
    uint64_t whole;  /* pages of the lists that came completely and as expected */
    uint64_t listed; /* pages in the list after those; 0 if `total` pages have come */
    uint64_t bytes;  /* of that list that came. Its headers are in the header room */
};

static int is_valid(const struct request *request)
{
    return request->ram && request->headers && request->size >= 1 && request->size <= LIST && request->most >= 1 &&
           request->most <= LIST && request->total >= 1 && request->pages <= UINT64_MAX / PAGE &&
           request->first < request->pages && request->total <= request->pages - request->first;
}

static ssize_t receive_list(int descriptor, const struct request *request, uint64_t first, uint64_t count)
{
    struct iovec pieces[2 * LIST];
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 2 * count};
    ssize_t got;

    for (uint64_t i = 0; i < count; i++) {
        pieces[2 * i] = (struct iovec){&request->headers[i], HEADER};
        pieces[2 * i + 1] = (struct iovec){request->ram + (first + i) * PAGE, PAGE};
    }
    do {
        got = recvmsg(descriptor, &message, MSG_WAITALL);
    } while (got < 0 && errno == EINTR);
    return got;
}

static int are_expected(const struct request *request, uint64_t first, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        if (request->headers[i] != header_of(first + i))
            return 0;
    return 1;
}

static int receive_all(int descriptor, const struct request *request, struct result *result)
{
    uint64_t size = smaller(request->size, request->most);

    while (result->whole < request->total) {
        uint64_t first = request->first + result->whole;
        uint64_t count = smaller(size, request->total - result->whole);
        ssize_t got = receive_list(descriptor, request, first, count);

        result->listed = count;
        if (got < 0) /* nothing more for now is an error only if nothing came at all */
            return errno == EAGAIN && result->whole ? 0 : errno;
        result->bytes = (uint64_t)got;
        if (result->bytes < count * RECORD || !are_expected(request, first, count))
            return 0;
        result->whole += count;
        result->listed = result->bytes = 0;
        size = smaller(2 * size, request->most);
    }
    return 0;
}

/* 0, -1 for numbers that do not fit, or an errno of recvmsg(2). The end of the stream is a list without bytes. */
int corefw_receive_lists(int descriptor, const struct request *request, struct result *result)
{
    int own, error;

    *result = (struct result){0};
    if (!is_valid(request))
        return -1;
    /* Another thread may close the descriptor between two lists, and its number may be another socket's by then. */
    own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return errno;
    error = receive_all(own, request, result);
    close(own);
    return error;
}
