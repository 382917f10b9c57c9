"""Two models of the same shape, blended: each weight lies on the line between theirs.

Of a model and what was fine-tuned from it, such a blend keeps more of what the first one knew than the second one
alone, and often does better than both: robust fine-tuning of zero-shot models (WiSE-FT; Wortsman et al. 2022,
https://arxiv.org/abs/2109.01903).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...datasets.workers import Progress
from ..bases import inspect_base
from ..baseweights import open_alike, refuse_target, rewrite
from ..errors import UserError
from ..export import Precision
from ..strengths import Strengths


def blend_bases(
    first: str,
    second: str,
    share: Strengths,
    target: Path,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> None:
    """Write (1 - s) x first + s x second, with the share s of each weight's block; 0 is the first model, 1 the second.

    Computed in fp32; without a precision each weight keeps the type that it has in the first model, of which the
    configurations and the tokenizers are too. The VAE is a block as any other: `vae=0` keeps the first one's.

    Raises:
        UserError: if the models are not of one family and shape, predict different things, a block of the shares holds
            no weight, or the target is one of the models.
        ExportError: if a weight is not finite, or was not written as it is.
    """
    one, other = inspect_base(first), inspect_base(second)
    refuse_target(target, [other.source])
    if one.prediction != other.prediction and one.prediction_stated and other.prediction_stated:
        what = f"predict different things, {one.prediction} and {other.prediction}: what lies between is neither"
        raise UserError(what, f"{one.short_name} and {other.short_name}", "Name two models that predict the same.")
    _, weights = open_alike(one, other)
    share.refuse_idle((component, name) for component, own in weights.names().items() for name in own)

    def blended(component: str, name: str, tensor: Tensor) -> Tensor:
        between = share.of(component, name)
        return torch.lerp(tensor.float(), weights.tensor(component, name).float(), between)

    sources = [one.short_name, f"{other.short_name} at {share}"]
    rewrite(one, target, blended, precision, target.stem, progress, sources)
