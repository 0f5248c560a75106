/*
 * Giving way: a thread that has much to do lets one run that has a requested page.
 *
 * That thread wakes up, but need not preempt this one, nor run next: when another that has preempted this one goes to
 * sleep, the scheduler (EEVDF) first makes up to this one for the time lost, until the next tick of the clock, 4 ms where
 * CONFIG_HZ is 250. Linux from 6.18 on lets a thread that yields forfeit what it is owed.
 *
 * A thread that computes all the time would take the processor for a whole turn. So after a yield that took long there
 * is none for a while, in which the processor is shared as usual.
 */
#ifndef GIVEWAY_H
#define GIVEWAY_H

#include <sched.h>
#include <stdint.h>

#include "journal.h" /* nanoseconds */

enum {
    LONG_TURN = 2000000, /* nanoseconds, longer than a requested page takes */
    BETWEEN = 4,         /* times what such a turn took, until the next yield */
};

static inline void give_way(void)
{
    static __thread uint64_t next;
    uint64_t began = nanoseconds(), taken;

    if (began < next)
        return;
    sched_yield();
    taken = nanoseconds() - began;
    if (taken >= LONG_TURN)
        next = began + taken * (1 + BETWEEN);
}

#endif
