"""Guest memory on Linux: blocks behind memfds, their dirty logs, userfaultfd.

runs          page numbers <-> runs of pages
blocks        MemfdBlock: a RamBlock
userfault     the userfaultfd system call, what of it is needed
faults        FaultQueue: the guest's page faults in postcopy
pagemap       PagemapLog: the dirty log by PAGEMAP_SCAN
hashes        HashLog: the dirty log by comparing hashes, on any Linux
logs          which dirty log this host can have
preallocation RAM that is allocated while a destination waits; populate is the program that does it
"""
