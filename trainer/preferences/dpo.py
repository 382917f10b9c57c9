"""Diffusion-DPO as pure functions, and the weights that it measures against.

Diffusion-DPO (Wallace et al. 2023, https://arxiv.org/abs/2311.12908, eq. 14): the UNet should be better at the picture
that was preferred, and worse at the other, than a frozen reference is, with the same noise and time-step for both.

A single thumb has no other picture beside it. It is compared with the reference alone, which is a likelihood whose
weight is bounded and sinks as it is learned: the human utility of Diffusion-KTO (Li et al. 2024,
https://arxiv.org/abs/2404.04465) with 0 as its reference point and the logarithm of the sigmoid. Its gradient is that
of a weighted likelihood (Lee et al. 2023, https://arxiv.org/abs/2302.12192) whose weight lies between 0 and 1 for a
thumb up, between -1 and 0 for one down.

Errors are weighted means of squares over each picture, (batch,).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid


def implicit_reward(error: Tensor, reference_error: Tensor, beta: float) -> Tensor:
    """-beta / 2 (error - reference error), (batch,), in nats: by how much likelier than under the reference a picture
    is now. `beta` is the beta T of the paper over means in place of sums, `beta_dpo` of its authors' code, whose half
    this is too."""
    return -beta / 2 * (error - reference_error)


def preference_loss(margin: Tensor) -> Tensor:
    """-log sigmoid(margin), (batch,): log 2 where nothing is learned yet. The margin is the implicit reward of the
    better picture minus that of the worse one; of a single picture its own, or for a thumb down minus its own."""
    return -logsigmoid(margin)


def margins(reward: Tensor, signs: Sequence[int], units: Sequence[int]) -> Tensor:
    """Of each unit of a batch, (units,), from the rewards of its pictures, (pictures,): those of `signs` first, one of
    each unit, then the worse ones of pairs; `units` says of all which unit they belong to."""
    count = len(signs)
    own = reward.new_tensor(signs) * reward[:count]
    worse = torch.tensor(units[count:], dtype=torch.long, device=reward.device)
    return own.index_add(0, worse, -reward[count:])


class Reference:
    """The weights that a run begins with, which it must not leave far. They take the place of the trained ones for a
    forward pass, so that base and adapter are in memory once."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.weights = _copies(parameters)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Within the block the parameters are those of the reference, and no gradients are made; after it they are
        what they were, bit for bit. To be entered before the pass whose gradients are wanted: that keeps what it read.
        """
        trained = _copies(self.parameters)
        try:
            with torch.no_grad():
                _write(self.parameters, self.weights)
                yield
        finally:
            _write(self.parameters, trained)


def _copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _write(parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
