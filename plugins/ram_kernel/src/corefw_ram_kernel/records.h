/*
 * Records of pages as they are on the wire: a header of 8 bytes, big-endian, and the page. The header is the page's
 * offset in its RAM block with the flags in the low bits.
 *
 * Source: QEMU 10.0, migration/ram.c, save_normal_page.
 */
#ifndef RECORDS_H
#define RECORDS_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

_Static_assert(sizeof(void *) == sizeof(uint64_t), "Python's structures have addresses of 64 bits");

enum {
    PAGE = 4096,
    HEADER = 8,
    RECORD = HEADER + PAGE,
    LIST = 512, /* records in a list: with IOV_MAX = 1024 pieces the most that recvmsg takes */
    CONTINUE = 0x20, /* RAM_SAVE_FLAG_CONTINUE: of the same block as the record before */
    FLAGS = 0x08 | CONTINUE, /* RAM_SAVE_FLAG_PAGE */
};

static inline uint64_t smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t header_of(uint64_t page)
{
    return htobe64(page * PAGE | FLAGS);
}

/* The page that the record at `bytes` brings; `pages` if it is no such record, or the block has no such page. */
static inline uint64_t page_of(const uint8_t *bytes, uint64_t pages)
{
    uint64_t header;

    memcpy(&header, bytes, HEADER);
    header = be64toh(header) ^ FLAGS;
    return header % PAGE || header / PAGE >= pages ? pages : header / PAGE;
}

#endif
