"""When the memory is full: how it is recognised, and how the same is done on fewer things at a time, or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from .errors import LorasmithError

if TYPE_CHECKING:
    from .models import Base

T = TypeVar("T")
Made = TypeVar("Made")

OUT_OF_MEMORY = (RuntimeError, MemoryError)
"""What libraries raise where the memory is full, among others: `is_full` tells."""


def is_full(error: Exception) -> bool:
    """Whether an error says that the memory of the GPU or of the computer is full; accelerate knows most of the words
    that libraries have for it."""
    is_named = isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)
    return is_named or any(words in str(error) for words in _FURTHER_WORDS)


_FURTHER_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def memory_of(device: torch.device) -> str:
    return "the computer's memory" if device.type == "cpu" else "the GPU's memory"


@contextmanager
def full_memory_is(failure: LorasmithError) -> Iterator[None]:
    """Within the block a full memory is told as this failure."""
    try:
        yield
    except OUT_OF_MEMORY as error:
        if not is_full(error):
            raise
        raise failure from error


def until_it_fits(work: Callable[[int], Made], at_once: int, undo: Callable[[], object]) -> tuple[Made, int]:
    """What `work` makes of `at_once` things at a time; where the memory is full, of half as many, down to one. Before
    it is tried again, `undo` takes back what the failed try has left. Returns also how many it took in the end.

    Raises:
        RuntimeError, MemoryError: as `work`, if the memory is full with a single one.
    """
    while True:
        try:
            return work(at_once), at_once
        except OUT_OF_MEMORY as error:
            if at_once == 1 or not is_full(error):
                raise
        undo()  # no sooner: the error held on to all that the failed try had in memory
        clear_device_cache(garbage_collection=True)
        at_once = half(at_once)


def in_halves(work: Callable[[Sequence[T]], list[Made]], things: Sequence[T]) -> list[Made]:
    """What `work` makes of all things together; where the memory is full, of each half of them, down to one.

    Raises:
        RuntimeError, MemoryError: as `work`, if the memory is full with a single one.
    """
    try:
        return work(things)
    except OUT_OF_MEMORY as error:
        if len(things) == 1 or not is_full(error):
            raise
    clear_device_cache()
    first = half(len(things))
    return in_halves(work, things[:first]) + in_halves(work, things[first:])


def where_it_fits(base: Base, work: Callable[[], Made]) -> Made:
    """What `work` makes of a base where that is; where a GPU's memory is full, of the base in the computer's memory,
    which takes longer. Afterwards it is where it was."""
    places = base.places()
    try:
        return work()
    except OUT_OF_MEMORY as error:
        if all(device.type == "cpu" for _, device in places) or not is_full(error):
            raise
    base.to("cpu")
    clear_device_cache(garbage_collection=True)
    try:
        return work()
    finally:
        base.put_back(places)


def half(number: int) -> int:
    """The larger half."""
    return -(-number // 2)


def parts_of(batches: Sequence[Sequence[T]], at_once: int) -> list[tuple[int, Sequence[T]]]:
    """Batches in parts of at most `at_once`, each behind the number of things that stand before it in all of them."""
    parts = [batch[start : start + at_once] for batch in batches for start in range(0, len(batch), at_once)]
    before = accumulate(map(len, parts), initial=0)
    return list(zip(before, parts, strict=False))
