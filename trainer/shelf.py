"""Where the weights of frozen modules rest while memory is for what trains: beside a GPU in the computer's memory,
without one on the disk."""

from __future__ import annotations

import ctypes
import sys
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import TrainingError

LEAST = 2**26
"""Bytes: modules with fewer weights stay where they are, for it would gain nothing to write them."""


class Resting:
    """Frozen modules that rest but when they are worked with. A GPU's memory is for what trains, and they wait in the
    computer's; without a GPU they wait on the disk, if they are large."""

    def __init__(
        self, name: str, modules: Sequence[nn.Module], device: torch.device, folder: Path, warn: Callable[[str], None]
    ) -> None:
        """`device` is where they work; `warn` is told if `folder`, where they would rest on the disk, takes no more."""
        self.name, self.modules, self.device, self.folder, self.warn = name, modules, device, folder, warn
        self.shelf, self.workers = self._make_shelf(), 0

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Within the block they rest. After it they stay in memory: the computer's, also beside a GPU."""
        try:
            self.let_rest()
            yield
        finally:
            if self.shelf is not None:
                self.shelf.take_back()
                self.shelf = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the block they can be called; after the outermost they rest."""
        self.workers += 1
        try:
            if self.workers == 1:
                self.let_work()
            yield
        finally:
            self.workers -= 1
            if not self.workers:
                self.let_rest()

    def let_rest(self) -> None:
        for module in self.modules:
            module.to(torch.device("cpu"))
        if self.shelf is not None:
            try:
                self.shelf.put_away()
            except OSError as error:
                self.shelf = None
                why = f"{self.folder} takes no more ({error.strerror or error})"
                self.warn(f"weights of {self.name} stay in memory: {why}")

    def let_work(self) -> None:
        if self.shelf is not None:
            self.shelf.take_back()
        for module in self.modules:
            module.to(self.device)

    def _make_shelf(self) -> Shelf | None:
        """Each process of several has its own."""
        if self.device.type != "cpu" or not Shelf.pays(self.modules):
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return Shelf(self.modules, self.folder)
        except OSError:  # the caches tell what is wrong with it, when they must be written
            return None


class Shelf:
    """Modules whose weights are written to the disk once, given up, and read back whenever they are needed.

    The file has no name, or is removed by the system when the process ends, however that comes about.
    """

    def __init__(self, modules: Sequence[nn.Module], folder: Path) -> None:
        self.tensors = list(_tensors(modules))
        self.shapes, self.checksums = [tensor.shape for tensor in self.tensors], list[int]()
        self.file = tempfile.TemporaryFile(dir=folder, prefix=".resting-")  # noqa: SIM115  # it is open as long as this is
        weakref.finalize(self, self.file.close)
        self.is_away = False

    @staticmethod
    def pays(modules: Sequence[nn.Module]) -> bool:
        """Whether they are on a CPU, and large enough."""
        tensors = list(_tensors(modules))
        return all(t.device.type == "cpu" for t in tensors) and sum(t.nbytes for t in tensors) >= LEAST

    def put_away(self) -> None:
        """Give the weights up; they are frozen, and written the first time only.

        Raises:
            OSError: if the disk does not take them; then they stay where they are.
        """
        if self.is_away:
            return
        if not self.checksums:
            self.checksums = self._write()
        for tensor in self.tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        self.is_away = True
        _give_back_what_is_free()

    def _write(self) -> list[int]:
        checksums = []
        for tensor in self.tensors:
            content = _bytes_of(tensor.detach().contiguous())
            self.file.write(content)
            checksums.append(zlib.crc32(content))
        self.file.flush()
        return checksums

    def take_back(self) -> None:
        """Put the weights back, bit for bit.

        Raises:
            TrainingError: if they are not what was written.
        """
        if not self.is_away:
            return
        self.file.seek(0)
        for tensor, shape, checksum in zip(self.tensors, self.shapes, self.checksums, strict=True):
            found = torch.empty(shape, dtype=tensor.dtype)
            content = _bytes_of(found)
            if self.file.readinto(content) != len(content) or zlib.crc32(content) != checksum:
                what = "the disk did not give back weights of VAE or text encoders as they were written"
                fix = "Look at the disk of runtime.cache, and resume the run; the last checkpoint stands."
                raise TrainingError(what, "runtime.cache", fix)
            tensor.data = found
        self.is_away = False


def _give_back_what_is_free() -> None:
    """glibc keeps what was freed in its heap, for this process alone; musl has no such call, nor have other systems."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _tensors(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    """All weights and buffers that hold something."""
    for module in modules:
        yield from (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.numel())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(cast(Any, tensor.flatten().view(torch.uint8).numpy()))
