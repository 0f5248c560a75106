/*
 * Receiving from a stream socket that is never waited for, but in poll(2).
 */
#ifndef RECEIVE_H
#define RECEIVE_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum { TICK = 100 /* milliseconds to wait for bytes, until the caller may look at something else */ };

/* A socket that does not block is not waited for. */
static inline int wait_readable(int descriptor)
{
    struct pollfd ready = {.fd = descriptor, .events = POLLIN};

    return poll(&ready, 1, fcntl(descriptor, F_GETFL) & O_NONBLOCK ? 0 : TICK) > 0;
}

static inline ssize_t receive_pieces(int descriptor, struct iovec *pieces, size_t count)
{
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
    ssize_t got;

    do {
        got = recvmsg(descriptor, &message, MSG_DONTWAIT);
    } while (got < 0 && errno == EINTR);
    return got;
}

static inline ssize_t receive_some(int descriptor, void *place, size_t size)
{
    struct iovec piece = {place, size};

    return receive_pieces(descriptor, &piece, 1);
}

#endif
