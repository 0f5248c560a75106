/*
 * The marks of a RAM block whose pages arrive while its guest runs, and UFFDIO_CONTINUE, which lets the guest see pages.
 *
 * Several threads store pages at once, without Python and without a lock. Invariants:
 *   - a page is stored by the thread that changed its mark from MISSING to CLAIMED, and by no other;
 *   - a claim ends in RECEIVED, when the whole page is there, or in MISSING again;
 *   - RECEIVED is final: the guest may write to the page from then on;
 *   - a page is installed only when it is RECEIVED, so the guest never sees half of one.
 *
 * Whoever marks a page as awaited looks afterwards whether it has arrived, and whoever stores one looks afterwards
 * whether it is awaited. With sequential consistency at least one of them sees what the other did.
 */
#define _GNU_SOURCE
#include "block.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <time.h>

#include "records.h"

enum { NAP = 20000 /* nanoseconds until a mapping that the kernel was too busy for is tried again */ };

/* As in linux/userfaultfd.h, which is not everywhere where there is a C library, or older than UFFDIO_CONTINUE. */
static const unsigned long UFFDIO_WAKE = 0x8010AA02, UFFDIO_ZEROPAGE = 0xC020AA04, UFFDIO_CONTINUE = 0xC020AA07;

struct uffdio_range {
    uint64_t start, length;
};

/* Of UFFDIO_ZEROPAGE and UFFDIO_CONTINUE. */
struct uffdio_pages {
    struct uffdio_range range;
    uint64_t mode;
    int64_t mapped; /* bytes, or a negative errno */
};

int is_valid_block(const struct block *block)
{
    return block->ram && block->marks && block->awaited && block->journal && block->pages && block->pages <= UINT64_MAX / PAGE;
}

int claim(const struct block *block, uint64_t page)
{
    uint8_t missing = MISSING;

    return __atomic_compare_exchange_n(&block->marks[page], &missing, CLAIMED, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* A page that has been received stays so. */
void give_up(const struct block *block, uint64_t page)
{
    uint8_t claimed = CLAIMED;

    __atomic_compare_exchange_n(&block->marks[page], &claimed, MISSING, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

void mark_received(const struct block *block, uint64_t page)
{
    __atomic_store_n(&block->marks[page], RECEIVED, __ATOMIC_SEQ_CST);
}

int has_been_received(const struct block *block, uint64_t page)
{
    return __atomic_load_n(&block->marks[page], __ATOMIC_SEQ_CST) == RECEIVED;
}

int is_awaited(const struct block *block, uint64_t page)
{
    return __atomic_load_n(&block->awaited[page], __ATOMIC_SEQ_CST);
}

/* The guest waits for a page; whether it did so already. */
int await_page(const struct block *block, uint64_t page)
{
    return __atomic_exchange_n(&block->awaited[page], 1, __ATOMIC_SEQ_CST);
}

static void note_awaited(const struct block *block, uint64_t first, uint64_t end)
{
    for (uint64_t page = first; page < end; page++)
        if (is_awaited(block, page))
            note(block->journal, INSTALLED, block->number, page, 0);
}

/* Map one page that is mapped already: only wake who waits for it. */
static int64_t wake_page(int userfaultfd, uint64_t address)
{
    struct uffdio_range range = {.start = address, .length = PAGE};

    return ioctl(userfaultfd, UFFDIO_WAKE, &range) ? -errno : PAGE;
}

/* Map zeros for one page, where the file has none; 0 if it has by now. */
static int64_t map_zeros(int userfaultfd, uint64_t address)
{
    struct uffdio_pages page = {.range = {.start = address, .length = PAGE}};

    if (!ioctl(userfaultfd, UFFDIO_ZEROPAGE, &page))
        return PAGE;
    return errno == EEXIST || errno == EAGAIN ? 0 : -errno;
}

/* Map pages, and wake who waits for them; bytes mapped, or a negative errno. While the guest's process changes its
 * mappings (fork, munmap) nothing can be mapped, and the thread that does may need this processor. */
static int64_t map_pages(int userfaultfd, uint64_t address, uint64_t length)
{
    const struct timespec nap = {.tv_nsec = NAP};
    struct uffdio_pages pages = {.range = {.start = address, .length = length}};

    if (!ioctl(userfaultfd, UFFDIO_CONTINUE, &pages))
        return pages.mapped;
    if (errno == EEXIST)
        return wake_page(userfaultfd, address);
    if (errno == EFAULT)
        return map_zeros(userfaultfd, address);
    if (errno != EAGAIN)
        return -errno;
    if (pages.mapped > 0)
        return pages.mapped;
    nanosleep(&nap, NULL);
    return 0;
}

static void note_failed(struct failure *failure, uint64_t first, uint64_t end, int error)
{
    failure->first = failure->error ? smaller(failure->first, first) : first;
    failure->end = failure->error && failure->end > end ? failure->end : end;
    failure->error = error;
}

/* Let the guest see the pages from `first` on, which have arrived. Those that it has waited for are noted in the
 * journal, and the rest of the pages in `failure` if it cannot be done. A guest that has ended needs none. */
void install(const struct block *block, int userfaultfd, uint64_t first, uint64_t end, struct failure *failure)
{
    uint64_t at = first * PAGE;

    while (at < end * PAGE && userfaultfd >= 0) {
        int64_t mapped = map_pages(userfaultfd, block->address + at, end * PAGE - at);

        if (mapped == -ESRCH)
            return;
        if (mapped < 0) {
            note_failed(failure, at / PAGE, end, (int)-mapped);
            end = at / PAGE;
        } else {
            at += (uint64_t)mapped;
        }
    }
    note_awaited(block, first, end);
}

/* -- for a caller that stores pages itself ------------------------------------------------------------------------- */

static int are_valid(const struct block *block, const int64_t *pages, uint64_t count)
{
    if (!is_valid_block(block))
        return 0;
    for (uint64_t i = 0; i < count; i++)
        if (pages[i] < 0 || (uint64_t)pages[i] >= block->pages)
            return 0;
    return 1;
}

/* Claim pages; which of them the caller is to store. All of these return 0, or -1 for a page that the block has not. */
int corefw_claim(const struct block *block, const int64_t *pages, uint64_t count, uint8_t *claimed)
{
    if (!are_valid(block, pages, count))
        return -1;
    for (uint64_t i = 0; i < count; i++)
        claimed[i] = (uint8_t)claim(block, (uint64_t)pages[i]);
    return 0;
}

int corefw_give_up(const struct block *block, const int64_t *pages, uint64_t count)
{
    if (!are_valid(block, pages, count))
        return -1;
    for (uint64_t i = 0; i < count; i++)
        give_up(block, (uint64_t)pages[i]);
    return 0;
}

/* The caller has stored these pages; which of them the guest waits for. */
int corefw_mark_received(const struct block *block, const int64_t *pages, uint64_t count, uint8_t *awaited)
{
    if (!are_valid(block, pages, count))
        return -1;
    for (uint64_t i = 0; i < count; i++) {
        mark_received(block, (uint64_t)pages[i]);
        awaited[i] = (uint8_t)is_awaited(block, (uint64_t)pages[i]);
    }
    return 0;
}

/* The guest waits for these pages; which of them have not arrived. */
int corefw_await(const struct block *block, const int64_t *pages, uint64_t count, uint8_t *missing)
{
    if (!are_valid(block, pages, count))
        return -1;
    for (uint64_t i = 0; i < count; i++) {
        await_page(block, (uint64_t)pages[i]);
        missing[i] = !has_been_received(block, (uint64_t)pages[i]);
    }
    return 0;
}
