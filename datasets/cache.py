"""Latents, loss masks and text embeddings on disk, keyed by all they depend on: an entry is right or absent.

The key of latents is a hash of the image file's bytes, the view, the VAE in its precision and `CODE_VERSION`; of a mask
is one of its file's bytes and the view; of embeddings, of the caption and the text encoders' weights. Entries live
outside the dataset folder, and may be deleted at any time. Each holds a checksum, which is compared at every read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import astuple
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..trainer.errors import DataError
from ..trainer.files import quick_file, remove_leftovers, sha256_of
from ..trainer.memory import full_memory_is, in_halves, memory_of
from .dataset import Example, Showing, read_mask, read_pixels
from .images import UnreadableImageError
from .views import View
from .workers import Progress

if TYPE_CHECKING:
    from ..trainer.models import Base, Conditions

CODE_VERSION = 2
"""Raise it when the same image would give other latents, or the same caption other embeddings."""

_PIXELS_AT_ONCE = 4 * 1024 * 1024
"""Pictures of one size are encoded together up to so many pixels, on a GPU. On a CPU it would gain nothing, and the
last bits of a picture's latents would depend on its neighbours: an interrupted run could not be repeated exactly."""
_READERS = 2
"""Threads that decode the next pictures while these are encoded."""


class GoneError(DataError):
    """What was in a cache when it was filled is there no more, or damaged."""


class Cache:
    """A folder of safetensors files, each named by the hash of what it was made from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, *made_from: object) -> Path:
        key = hashlib.sha256(json.dumps([CODE_VERSION, *made_from]).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, path: Path) -> dict[str, Tensor] | None:
        """An entry's tensors; None if it is absent, damaged, or cannot be read.

        It is not mapped into memory: where a drive fails, a read is refused, but a map would end the process.
        """
        try:
            content = path.read_bytes()
            stated, found = _checksums(content)
            return load(content) if stated == found else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
            return None

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """
        Raises:
            DataError: if the folder does not take it.
        """
        _, checksum = _checksums(save(tensors))
        content = save(tensors, {_CHECKSUM: checksum})
        try:
            if path.is_dir():  # which no entry is
                shutil.rmtree(path)
            with quick_file(path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            fix = "Make room there, or set runtime.cache to another folder."
            raise DataError(f"cannot be written ({error.strerror or error})", str(self.folder), fix) from error

    def clear_up(self) -> None:
        """Remove what processes that were killed had half written."""
        remove_leftovers(self.folder, below=True)


_CHECKSUM = "checksum"


def _checksums(content: bytes) -> tuple[str | None, str]:
    """The checksum that an entry states, and that of the names, types, shapes and numbers which it holds.

    CRC-32 takes half as long as SHA-256, and finds all but one of four billion damages. It keeps out nobody who means
    harm, but whoever may write into the cache could write true entries too.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    stated = header.pop("__metadata__", {}).get(_CHECKSUM)
    told = json.dumps(header, sort_keys=True).encode()
    return stated, f"{zlib.crc32(memoryview(content)[start:], zlib.crc32(told)):08x}"


class LatentCache:
    """The VAE's posterior of each view of each image: mean and standard deviation, so that each step can draw a fresh
    sample."""

    def __init__(self, folder: Path, vae_fingerprint: str) -> None:
        self.cache = Cache(folder / "latents")
        self.vae_fingerprint = vae_fingerprint

    def path(self, example: Example, view: View) -> Path:
        return self.cache.path(example.item.sha256, *_geometry(view), astuple(view.colours), self.vae_fingerprint)

    def fill(self, base: Base, examples: Sequence[Example], progress: Progress) -> int:
        """Encode what is missing, pictures of one size together; returns how many were encoded.

        Raises:
            DataError: if an image has changed since it was scanned, or can be read no more, or its latents are not
                finite, or the cache cannot be written.
        """
        views = [(example, view) for example in examples for view in example.views]
        missing = [pair for pair in views if self.cache.read(self.path(*pair)) is None]
        present, files = len(views) - len(missing), _Unchanged()
        progress(present, len(views))
        if not missing:
            return 0
        self.cache.clear_up()
        with base.at_work("VAE"), ThreadPoolExecutor(_READERS) as readers:
            batches = list(batches_of_one_size(missing, 0 if base.vae.device.type == "cpu" else _PIXELS_AT_ONCE))
            coming = [readers.submit(_pixels_of, batch) for batch in batches[:_READERS]]
            for number, batch in enumerate(batches):
                pixels = coming.pop(0).result()
                if number + _READERS < len(batches):
                    coming.append(readers.submit(_pixels_of, batches[number + _READERS]))
                for (example, view), entry in zip(batch, encode_what_fits(base, batch, pixels), strict=True):
                    files.check(example.item.path, example.item.sha256)
                    self.cache.write(self.path(example, view), entry)
                present += len(batch)
                progress(present, len(views))
        return len(missing)

    def read(self, showings: Sequence[Showing]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a batch that shares a bucket, each (batch, 4, h, w), unscaled."""
        entries = [self.cache.read(self.path(shown.example, shown.view)) for shown in showings]
        for entry, shown in zip(entries, showings, strict=True):
            if entry is None:
                what, where = "its cached latents are gone, or damaged", str(shown.example.item.path)
                raise GoneError(what, where, "Resume the run to make them anew.")
        present = [entry for entry in entries if entry is not None]
        return torch.stack([entry["mean"] for entry in present]), torch.stack([entry["std"] for entry in present])


Shown = tuple[Example, View]


def batches_of_one_size(views: Sequence[Shown], pixels: int) -> Iterator[list[Shown]]:
    """Views grouped by their bucket, as many together as have no more than so many pixels; at least one."""
    by_size = sorted(views, key=lambda pair: pair[1].fit.bucket)
    for (width, height), group in groupby(by_size, key=lambda pair: pair[1].fit.bucket):
        alike = list(group)
        at_once = max(1, pixels // (width * height))
        yield from (alike[start : start + at_once] for start in range(0, len(alike), at_once))


def _pixels_of(batch: Sequence[Shown]) -> np.ndarray:
    return np.stack([_pixels(example, view) for example, view in batch])


def _pixels(example: Example, view: View) -> np.ndarray:
    with _readable(example.item.path):
        return read_pixels(example, view)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """A file that was read when it was scanned may have been removed since, or its disk unplugged."""
    try:
        yield
    except (OSError, UnreadableImageError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        fix = "Put it back, or connect its disk again, and start again."
        raise DataError(f"can be read no more ({why or error})", str(file), fix) from error


def encode_what_fits(base: Base, batch: Sequence[Shown], pixels: np.ndarray) -> list[dict[str, Tensor]]:
    """As `encode`; where the memory does not hold all of them, in halves, down to one picture.

    Raises:
        DataError: if it does not hold a single one.
    """

    def together(part: Sequence[tuple[Shown, np.ndarray]]) -> list[dict[str, Tensor]]:
        mine = [shown for shown, _ in part]
        with full_memory_is(_too_large(*mine[0], base)) if len(mine) == 1 else nullcontext():
            return encode(base, mine, np.stack([own for _, own in part]))

    return in_halves(together, list(zip(batch, pixels, strict=True)))


def _too_large(example: Example, view: View, base: Base) -> DataError:
    width, height = view.fit.bucket
    what = f"{memory_of(base.vae.device)} does not hold it in the VAE, at {width} x {height} pixels"
    smaller = "" if base.vae.dtype != torch.float32 else 'set runtime.vae_precision = "bf16", '
    return DataError(what, str(example.item.path), f"Lower data.resolution, {smaller}or end what else uses it.")


def encode(base: Base, batch: Sequence[Shown], pixels: np.ndarray) -> list[dict[str, Tensor]]:
    """The VAE posteriors of pictures (batch, H, W, 3) of 8 bit: `mean` and `std` of each, (4, h, w), fp32 on the CPU,
    before the scaling factor."""
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(base.vae.device).float() / 127.5 - 1
    with torch.no_grad():
        means, stds = (moment.cpu() for moment in base.posterior(scaled))
    for (example, _), mean, std in zip(batch, means, stds, strict=True):
        if not (mean.isfinite().all() and std.isfinite().all()):
            where, fix = str(example.item.path), "Look at the image, or use another VAE."
            raise DataError("its latents are not finite", where, fix)
    return [{"mean": mean.contiguous(), "std": std.contiguous()} for mean, std in zip(means, stds, strict=True)]


def _geometry(view: View) -> list[object]:
    return [view.fit.original, view.fit.resized, view.fit.bucket, view.fit.crop_left, view.fit.crop_top, view.flip]


class _Unchanged:
    """The key holds the hash of the bytes that were scanned; other bytes must not be stored under it."""

    def __init__(self) -> None:
        self.seen: dict[Path, tuple[int, int]] = {}

    def check(self, file: Path, sha256: str) -> None:
        """A file with many views is read once, unless its size or date changes in between."""
        with _readable(file):
            size_and_date = file.stat().st_size, file.stat().st_mtime_ns
            is_same = self.seen.get(file) == size_and_date or sha256_of(file) == sha256
        if not is_same:
            raise DataError("has changed since it was scanned", str(file), "Start again.")
        self.seen[file] = size_and_date


class MaskCache:
    """The loss weight of each latent, for images that have a mask."""

    def __init__(self, folder: Path, factor: int) -> None:
        self.cache = Cache(folder / "masks")
        self.factor = factor
        """Pixels of one latent, along a side."""

    def path(self, example: Example, view: View) -> Path:
        source = example.item.mask.sha256 if example.item.mask else example.item.sha256
        return self.cache.path(source, *_geometry(view), self.factor, example.source.unmasked_weight)

    def fill(self, examples: Sequence[Example], progress: Progress) -> int:
        """Make what is missing; returns how many were made."""
        views = [(example, view) for example in examples if example.is_masked for view in example.views]
        missing = [pair for pair in views if self.cache.read(self.path(*pair)) is None]
        files = _Unchanged()
        if missing:
            self.cache.clear_up()
        for done, (example, view) in enumerate(missing):
            progress(done, len(missing))
            with _readable(example.item.mask.path if example.item.mask else example.item.path):
                mask = torch.from_numpy(read_mask(example, view, self.factor)).contiguous()
            if example.item.mask:
                files.check(example.item.mask.path, example.item.mask.sha256)
            self.cache.write(self.path(example, view), {"mask": mask})
        return len(missing)

    def read(self, showings: Sequence[Showing], shape: torch.Size) -> Tensor | None:
        """Loss weights (batch, 1, h, w) for latents of this shape, one where an image has no mask; None if none has."""
        if not any(shown.example.is_masked for shown in showings):
            return None
        return torch.stack([self._mask(shown, shape) for shown in showings])

    def _mask(self, shown: Showing, shape: torch.Size) -> Tensor:
        if not shown.example.is_masked:
            return torch.ones(1, *shape[-2:])
        entry = self.cache.read(self.path(shown.example, shown.view))
        if entry is None:
            where = str(shown.example.item.path)
            raise GoneError("its cached mask is gone, or damaged", where, "Resume the run to make it anew.")
        return entry["mask"][None]


class TextCache:
    """Conditions of each caption, for frozen text encoders."""

    def __init__(self, folder: Path, text_fingerprint: str) -> None:
        self.cache = Cache(folder / "text")
        self.text_fingerprint = text_fingerprint

    def path(self, caption: str) -> Path:
        return self.cache.path(caption, self.text_fingerprint)

    def fill(self, base: Base, captions: Sequence[str], progress: Progress) -> int:
        """Encode what is missing; returns how many captions were encoded."""
        missing = [caption for caption in dict.fromkeys(captions) if self.cache.read(self.path(caption)) is None]
        if missing:
            self.cache.clear_up()
            with base.at_work("text encoders"):
                for done, caption in enumerate(missing):
                    progress(done, len(missing))
                    self.cache.write(self.path(caption), _encoded(caption, base))
        progress(len(missing), len(missing))
        return len(missing)

    def read(self, captions: Sequence[str]) -> Conditions:
        """Conditions of a batch of captions, fp32 on the CPU."""
        from ..trainer.models import Conditions, same_length

        entries = []
        for caption in captions:
            entry = self.cache.read(self.path(caption))
            if entry is None:
                what = "its cached text embedding is gone, or damaged"
                raise GoneError(what, repr(caption), "Resume the run to make it anew.")
            entries.append(entry)
        pooled = torch.stack([entry["pooled"] for entry in entries]) if "pooled" in entries[0] else None
        return Conditions(same_length([entry["hidden"] for entry in entries]), pooled)


def _encoded(caption: str, base: Base) -> dict[str, Tensor]:
    with torch.no_grad(), full_memory_is(_too_long(caption, base)):
        conditions = base.encode([caption]).to("cpu", torch.float32)
    pooled = {} if conditions.pooled is None else {"pooled": conditions.pooled[0].contiguous()}
    return {"hidden": conditions.hidden[0].contiguous()} | pooled


def _too_long(caption: str, base: Base) -> DataError:
    what = f"{memory_of(base.text_device)} does not hold it in the text encoders"
    return DataError(what, repr(caption), "End what else uses it, or shorten the caption if it is very long.")
