"""The benchmark: migfw beside a real QEMU, on this machine, in one run.

The law: nothing is compared across runs or machines. Both sides do the same work in turns, in fresh processes, each on
memory that the host has backed beforehand; what is reported is the median of the pairwise ratios.

    run.py        the command: `make bench`, `python bench/run.py --help`
    scenarios/    what is measured, one module for each question
    engines.py    the processes: `migfw run` and QEMU, driven over the same QMP
    migrating.py  one migration and its figures
    sampling.py   turns, pairs, medians; processor time and memory of a process
    warming.py    has the host back memory before it is used
    results.py    rows, charts, outcomes
    facts.py      what machine and which versions this was
    report/       the table, the JSON document and the HTML page
"""
