"""Is anything lost when something goes wrong? `python -m tools.faults` brings each fault about in real runs, and looks.

processes  `lorasmith` commands in processes of their own, forked from one that has imported everything already
injections what is done to such a process from within, before its command begins
material   a small base, some pictures, and runs of them: one unbroken, one killed half-way
trial      one try: a folder of its own, in which a run is begun, struck and resumed
survival   what it is to survive, for every fault alike
fault      a fault: its name, how it strikes, how often it is tried
kinds      the faults, by what goes wrong
registry   all of them
report     the table

It forks, sends signals and mounts small disks: for Linux and, without the disks, other POSIX systems.
"""
