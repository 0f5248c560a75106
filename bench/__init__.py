"""The benchmark: compare migfw with a real QEMU on this machine, in one run.

Invariant: nothing is compared across runs or machines. Both sides take turns at the same work, in fresh processes,
under the same congestion control, with their guests' RAM allocated beforehand; the result is the median of the pairs'
ratios.

    run.py        the command: `make bench`, `make bench-full`, `python bench/run.py --help`
    scenarios/    what is measured, one module for each question
    engines.py    the processes: `migfw run` and QEMU, driven over the same QMP
    migrating.py  one migration and its figures
    sampling.py   turns, pairs, medians; processor time and memory of a process
    warming.py    makes the host allocate memory before a run
    network.py    a loopback network with one congestion control for both sides
    results.py    rows, charts, outcomes
    facts.py      the machine and the versions
    report/       the table, the JSON document and the HTML page
"""
