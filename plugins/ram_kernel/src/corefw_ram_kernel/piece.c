/*
 * Claims pages of a RAM block that a source sends in postcopy, and sends their records.
 *
 * Invariant: a page is sent by the thread that cleared its mark. Marks are cleared atomically, since one thread sends
 * what is left while another sends what is requested. A piece that the socket did not take whole is kept, and goes out
 * first next time.
 *
 * Source: QEMU 10.0, ram_save_host_page and save_zero_page (migration/ram.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "piece.h"

enum { ZERO_FLAGS = 0x02 | CONTINUE /* RAM_SAVE_FLAG_ZERO */ };

int is_valid_sent_block(const struct sent_block *block)
{
    return block->ram && block->dirty && block->hole && block->pages >= 1 && block->pages <= UINT64_MAX / PAGE;
}

/* Whether the page was still to be sent: then the caller sends it. */
int claim_dirty(const struct sent_block *block, uint64_t page)
{
    uint8_t *mark = block->dirty + page;

    return __atomic_load_n(mark, __ATOMIC_RELAXED) && __atomic_exchange_n(mark, 0, __ATOMIC_ACQ_REL);
}

static int is_zero(const struct sent_block *block, uint64_t page)
{
    const uint8_t *bytes = block->ram + page * PAGE;
    uint64_t word;

    if (block->hole[page])
        return 1;
    memcpy(&word, bytes, sizeof word);
    return !word && !memcmp(bytes, bytes + sizeof word, PAGE - sizeof word);
}

/* Add a claimed page to a piece that has room for it, with the block's name unless the record before is of the same
 * block (NULL): whether it is zero. */
int add_page(struct piece *piece, const struct sent_block *block, uint64_t page, const uint8_t *name, size_t name_size)
{
    int zero = is_zero(block, page);
    uint64_t header = htobe64(page * PAGE | (uint64_t)((zero ? ZERO_FLAGS : FLAGS) & (name ? ~CONTINUE : ~0)));
    uint8_t *head = piece->heads[piece->count];

    memcpy(head, &header, HEADER);
    head += HEADER;
    if (name) {
        *head++ = (uint8_t)name_size;
        memcpy(head, name, name_size);
        head += name_size;
    }
    if (zero)
        *head++ = 0;
    piece->sizes[piece->count] = (uint64_t)(head - piece->heads[piece->count]);
    piece->zero[piece->count] = (uint64_t)zero;
    piece->pages[piece->count++] = block->ram + page * PAGE;
    return zero;
}

/* Send as much of the piece as the socket takes, and add that to `bytes`: 0 or an errno. All of it went out if its
 * count is 0 then. */
int send_piece(int descriptor, struct piece *piece, uint64_t *bytes)
{
    struct iovec parts[2 * PIECE];
    struct msghdr message = {.msg_iov = parts};
    uint64_t skip = piece->sent, total = 0;
    ssize_t sent;

    for (uint64_t i = 0; i < piece->count; i++) {
        struct iovec record[2] = {{piece->heads[i], piece->sizes[i]}, {(uint8_t *)piece->pages[i], PAGE}};

        for (int part = 0; part < (piece->zero[i] ? 1 : 2); part++) {
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
    *bytes += (uint64_t)sent;
    piece->sent += (uint64_t)sent;
    if ((uint64_t)sent == total)
        piece->count = piece->sent = 0;
    return 0;
}
