"""All that the loss of one batch reads beside the weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .models import Conditions, Tokens


@dataclass(frozen=True)
class Inputs:
    """What the denoiser sees of a batch, and what its prediction is compared with."""

    noisy: Tensor
    """(batch, 4, h, w), in the precision of the base."""
    t: Tensor
    """Time-steps, (batch,)."""
    text: Tokens | Conditions
    """Token ids if text encoders are trained, conditions if not."""
    sizes: Tensor
    """(batch, 6), as `Family.predict` has them."""
    target: Tensor
    """(batch, 4, h, w)."""
    weight: Tensor
    """What the loss of each image is multiplied by, (batch,)."""
    huber_c: Tensor
    """(batch,)."""
    mask: Tensor | None
    """What the error of each latent is multiplied by, (batch, 1, h, w); None if no image has a mask."""

    @property
    def seen(self) -> tuple[Tensor, Tensor, Tokens | Conditions, Tensor]:
        """What the denoiser is given."""
        return self.noisy, self.t, self.text, self.sizes

    @property
    def images(self) -> int:
        return len(self.t)

    @property
    def form(self) -> Hashable:
        """Equal for batches that take the same operations: shapes, precisions, and how captions are divided."""
        divided = tuple(self.text.chunks) if isinstance(self.text, Tokens) else None
        return divided, self.mask is None, tuple((tensor.shape, tensor.dtype) for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All of them, always in the same order."""
        text = self.text.ids if isinstance(self.text, Tokens) else (self.text.hidden, self.text.pooled)
        others = (self.noisy, self.t, self.sizes, self.target, self.weight, self.huber_c, self.mask)
        yield from (tensor for tensor in (*others, *text) if tensor is not None)

    def to(self, device: torch.device, copy: bool = False) -> Inputs:
        """From the computer's memory to a device, without waiting for a GPU to have it; with `copy` in memory of their
        own in any case."""

        def moved(tensor: Tensor) -> Tensor:
            there = tensor.pin_memory() if device.type == "cuda" else tensor
            return there.to(device, non_blocking=device.type == "cuda", copy=copy)

        if isinstance(self.text, Tokens):
            text = Tokens([moved(ids) for ids in self.text.ids], self.text.chunks)
        else:
            pooled = self.text.pooled
            text = Conditions(moved(self.text.hidden), None if pooled is None else moved(pooled))
        return Inputs(
            noisy=moved(self.noisy),
            t=moved(self.t),
            text=text,
            sizes=moved(self.sizes),
            target=moved(self.target),
            weight=moved(self.weight),
            huber_c=moved(self.huber_c),
            mask=None if self.mask is None else moved(self.mask),
        )

    def take_in(self, others: Inputs) -> None:
        """Put what others of the same form hold into the memory of these, without waiting for a GPU to have it."""
        for mine, given in zip(self.tensors(), others.tensors(), strict=True):
            mine.copy_(given.pin_memory() if mine.is_cuda else given, non_blocking=True)
