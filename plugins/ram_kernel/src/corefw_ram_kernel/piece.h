/*
 * A RAM block that a source sends in postcopy, and records of its pages that go out with one system call. See piece.c.
 */
#ifndef PIECE_H
#define PIECE_H

#include <stddef.h>
#include <stdint.h>

#include "records.h"

enum {
    PIECE = 16, /* pages that are claimed and sent at once */
    NAME = 255, /* bytes of a block's name, at most */
};

struct sent_block {
    const uint8_t *ram;
    uint64_t pages;      /* its length */
    uint8_t *dirty;      /* for each page, whether it is still to be sent */
    const uint8_t *hole; /* for each page, whether it was never touched: it is zero, and not to be read */
};

struct piece {
    uint64_t count; /* pages that were not sent whole ... */
    uint64_t sent;  /* ... and bytes of their records that were */
    const uint8_t *pages[PIECE];
    uint64_t sizes[PIECE];                   /* bytes in `heads` of each: the page follows, but for a zero page */
    uint64_t zero[PIECE];
    uint8_t heads[PIECE][HEADER + 1 + NAME + 1]; /* header, maybe the block's name, and of a zero page the fill byte */
};

int is_valid_sent_block(const struct sent_block *block);
int claim_dirty(const struct sent_block *block, uint64_t page);
int add_page(struct piece *piece, const struct sent_block *block, uint64_t page, const uint8_t *name, size_t name_size);
int send_piece(int descriptor, struct piece *piece, uint64_t *bytes);

#endif
