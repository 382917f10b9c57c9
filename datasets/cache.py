"""Latents, loss masks and text embeddings on disk, keyed by all they depend on: an entry is right or absent.

The key of latents is a hash of the image file's bytes, the view, the VAE in its precision and `CODE_VERSION`; of a mask
is one of its file's bytes and the view; of embeddings, of the caption and the text encoders' weights. Entries live
outside the dataset folder, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..trainer.errors import DataError
from ..trainer.files import atomic_file, sha256_of
from .dataset import Example, Showing, read_mask, read_pixels
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


class Cache:
    """A folder of safetensors files, each named by the hash of what it was made from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, *made_from: object) -> Path:
        key = hashlib.sha256(json.dumps([CODE_VERSION, *made_from]).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, path: Path) -> dict[str, Tensor] | None:
        """An entry's tensors; None if it is absent or damaged."""
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError):
            return None

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary)


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
            DataError: if an image has changed since it was scanned, or its latents are not finite.
        """
        views = [(example, view) for example in examples for view in example.views]
        missing = [pair for pair in views if self.cache.read(self.path(*pair)) is None]
        present, files = len(views) - len(missing), _Unchanged()
        progress(present, len(views))
        with ThreadPoolExecutor(_READERS) as readers:
            batches = list(batches_of_one_size(missing, 0 if base.device.type == "cpu" else _PIXELS_AT_ONCE))
            coming = [readers.submit(_pixels_of, batch) for batch in batches[:_READERS]]
            for number, batch in enumerate(batches):
                pixels = coming.pop(0).result()
                if number + _READERS < len(batches):
                    coming.append(readers.submit(_pixels_of, batches[number + _READERS]))
                for (example, view), entry in zip(batch, encode(base, batch, pixels), strict=True):
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
                raise DataError(
                    "its cached latents have gone", str(shown.example.item.path), "Resume the run to make them anew."
                )
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
    return np.stack([read_pixels(example, view) for example, view in batch])


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
        size_and_date = file.stat().st_size, file.stat().st_mtime_ns
        if self.seen.get(file) != size_and_date and sha256_of(file) != sha256:
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
        for done, (example, view) in enumerate(missing):
            progress(done, len(missing))
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
            raise DataError("its cached mask has gone", where, "Resume the run to make it anew.")
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
        for done, caption in enumerate(missing):
            progress(done, len(missing))
            with torch.no_grad():
                conditions = base.encode([caption]).to("cpu", torch.float32)
            entry = {"hidden": conditions.hidden[0].contiguous()}
            if conditions.pooled is not None:
                entry["pooled"] = conditions.pooled[0].contiguous()
            self.cache.write(self.path(caption), entry)
        progress(len(missing), len(missing))
        return len(missing)

    def read(self, captions: Sequence[str]) -> Conditions:
        """Conditions of a batch of captions, fp32 on the CPU."""
        from ..trainer.models import Conditions, same_length

        entries = []
        for caption in captions:
            entry = self.cache.read(self.path(caption))
            if entry is None:
                raise DataError("its cached text embedding has gone", repr(caption), "Resume the run to make it anew.")
            entries.append(entry)
        pooled = torch.stack([entry["pooled"] for entry in entries]) if "pooled" in entries[0] else None
        return Conditions(same_length([entry["hidden"] for entry in entries]), pooled)
