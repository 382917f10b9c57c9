"""Latents and text embeddings on disk, keyed by all they depend on: an entry is right or absent, not stale.

The key of latents is a hash of the image file's bytes, the resize and crop, the VAE's weights and `CODE_VERSION`; of
embeddings it is a hash of the caption and the text encoders' weights. Entries live outside the dataset folder, and may
be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..trainer.errors import DataError
from ..trainer.files import atomic_file, sha256_of
from .dataset import Example, read_pixels

if TYPE_CHECKING:
    from ..trainer.models import Base, Conditions

CODE_VERSION = 1
"""Raise it when the same image would give other latents, or the same caption other embeddings."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


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
    """The VAE's posterior of each image: mean and standard deviation, so that each step can draw a fresh sample."""

    def __init__(self, folder: Path, vae_fingerprint: str) -> None:
        self.cache = Cache(folder / "latents")
        self.vae_fingerprint = vae_fingerprint

    def path(self, example: Example) -> Path:
        fit = example.fit
        crop = [*fit.resized, *fit.bucket, fit.crop_left, fit.crop_top]
        return self.cache.path(example.item.sha256, crop, self.vae_fingerprint)

    def fill(self, base: Base, examples: Sequence[Example], progress: Progress) -> int:
        """Encode what is missing; returns how many images were encoded.

        Raises:
            DataError: if an image has changed since it was scanned, or its latents are not finite.
        """
        encoded = 0
        for done, example in enumerate(examples):
            progress(done, len(examples))
            if self.cache.read(self.path(example)) is None:
                entry = encode_image(base, example)
                _check_unchanged(example)
                self.cache.write(self.path(example), entry)
                encoded += 1
        progress(len(examples), len(examples))
        return encoded

    def read(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a batch that shares a bucket, each (batch, 4, h, w), unscaled."""
        entries = [self.cache.read(self.path(example)) for example in examples]
        for entry, example in zip(entries, examples, strict=True):
            if entry is None:
                raise DataError(
                    "its cached latents have gone", str(example.item.path), "Resume the run to make them anew."
                )
        present = [entry for entry in entries if entry is not None]
        return torch.stack([entry["mean"] for entry in present]), torch.stack([entry["std"] for entry in present])


def encode_image(base: Base, example: Example) -> dict[str, Tensor]:
    """The VAE posterior of one image: `mean` and `std`, each (4, h, w), fp32 on the CPU, before the scaling factor."""
    pixels = torch.from_numpy(read_pixels(example).copy()).permute(2, 0, 1)[None].to(base.vae.device)
    with torch.no_grad():
        posterior = base.vae.encode(pixels.float() / 127.5 - 1).latent_dist
    entry = {"mean": posterior.mean[0].float().cpu().contiguous(), "std": posterior.std[0].float().cpu().contiguous()}
    if not all(tensor.isfinite().all() for tensor in entry.values()):
        raise DataError("its latents are not finite", str(example.item.path), "Look at the image, or use another VAE.")
    return entry


def _check_unchanged(example: Example) -> None:
    """The key holds the hash of the bytes that were scanned; other bytes must not be stored under it."""
    if sha256_of(example.item.path) != example.item.sha256:
        raise DataError("has changed since it was scanned", str(example.item.path), "Start again.")


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
        from ..trainer.models import Conditions

        entries = []
        for caption in captions:
            entry = self.cache.read(self.path(caption))
            if entry is None:
                raise DataError("its cached text embedding has gone", repr(caption), "Resume the run to make it anew.")
            entries.append(entry)
        pooled = torch.stack([entry["pooled"] for entry in entries]) if "pooled" in entries[0] else None
        return Conditions(torch.stack([entry["hidden"] for entry in entries]), pooled)
