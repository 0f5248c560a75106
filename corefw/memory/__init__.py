"""Guest memory on Linux: blocks behind memfds, their dirty logs, userfaultfd.

runs          page numbers <-> runs of pages
blocks        MemfdBlock: a RamBlock
userfault     the userfaultfd system call, as far as it is needed
faults        FaultQueue: the guest's page faults in postcopy
pagemap       PagemapLog: the dirty log by PAGEMAP_SCAN
hashes        HashLog: the dirty log by comparing hashes, on any Linux
logs          chooses the dirty log that this host supports
preallocation allocates RAM while a destination waits; populate is the program that does it
"""
