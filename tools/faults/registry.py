"""All faults, in the order of the table."""

from __future__ import annotations

from .fault import Fault
from .kinds import clock, damage, data, disk, kills, memory, numbers, queue, rivals, signals

FAULTS: list[Fault] = [
    *disk.FAULTS,
    *signals.FAULTS,
    *kills.FAULTS,
    *memory.FAULTS,
    *numbers.FAULTS,
    *data.FAULTS,
    *clock.FAULTS,
    *rivals.FAULTS,
    *damage.FAULTS,
    *queue.FAULTS,
]
