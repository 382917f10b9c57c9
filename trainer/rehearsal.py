"""Whether an optimizer can train here: it is tried on a small problem before a run begins.

Hundreds of optimizers have a name, and some cannot take part: they want a closure or a second pass, ignore the learning
rate, draw random numbers, or keep what no checkpoint can hold. What they do says so more surely than a list.
"""

from __future__ import annotations

import difflib
import io
import math
import pickle
import warnings
from collections.abc import Iterator
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from .config import OptimizerSection, RunConfig
from .errors import ConfigError, Problem, first_line
from .idle import RATE_FREE, RATES, is_default
from .optim import (
    averages_itself,
    make_optimizer,
    optimizer_class,
    own_betas,
    parameters_of,
    set_learning_rates,
    with_own_betas,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer

_OURS = {
    "params": "adapter",
    "lr": "optimizer.lr",
    "betas": "optimizer.beta1 and optimizer.beta2",
    "weight_decay": "optimizer.weight_decay",
    "fused": "runtime.precision",
}
"""Arguments that other settings give."""

_STEPS = 8  # rectified Adam (Liu et al. 2020) changes nothing in its first five


def check_optimizer(config: RunConfig) -> None:
    """Find what is wrong with the optimizer's settings without the model.

    Raises:
        ConfigError: if no optimizer has this name, its package is missing, a setting has no effect on it, an option is
            unknown, or it cannot train here.
    """
    settings = config.optimizer
    if settings.kind == "adamw" and not settings.options:
        return  # the default takes all settings; torch need not be loaded to know that
    kind = optimizer_class(settings.kind)
    if problems := [*_misfits(settings, kind), *_of_options(settings, kind), *_idle(settings, kind), *_rates(config)]:
        raise ConfigError.of(problems)
    rates = [getattr(settings, key) for part, key in RATES.items() if getattr(config.adapter, part)]
    _rehearse(with_own_betas(settings), rates)


# ---------------------------------------------------------------------------------------------------------------------
# what its constructor says


def _misfits(settings: OptimizerSection, kind: type[Optimizer]) -> Iterator[Problem]:
    first, *others = parameters_of(kind).values()
    if first.name != "params":
        what = f"{settings.kind} takes a whole {first.name}, not groups of weights with learning rates of their own"
        yield Problem("optimizer.kind", what, "Choose another one.")
        return
    for one in others:
        if one.default is Parameter.empty and one.name not in settings.options:
            what = f"{settings.kind} cannot be made without {one.name}"
            yield Problem("optimizer.kind", what, f"If it is a plain value, set optimizer.options.{one.name}.")
    for key, own in zip(("beta1", "beta2"), own_betas(kind), strict=False):
        if not 0 <= own < 1 and key not in settings.model_fields_set:
            what = f"the authors of {settings.kind} chose {own:g}, and only betas below 1 can be set"
            yield Problem(f"optimizer.{key}", what, "Give one below 1, or choose another optimizer.kind.")


def _of_options(settings: OptimizerSection, kind: type[Optimizer]) -> Iterator[Problem]:
    known = [name for name in parameters_of(kind) if name not in _OURS]
    for name in settings.options:
        where = f"optimizer.options.{name}"
        if name in _OURS:
            yield Problem(where, "is given by another setting", f"Use {_OURS[name]}.")
        elif name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            fix = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(known)}."
            yield Problem(where, f"is no option of {settings.kind}", fix)


def _idle(settings: OptimizerSection, kind: type[Optimizer]) -> Iterator[Problem]:
    taken = parameters_of(kind)
    for key, argument in (("beta1", "betas"), ("beta2", "betas"), ("weight_decay", "weight_decay")):
        if argument not in taken and not is_default(settings, key):
            what = f"has no effect, because {settings.kind} takes no {argument}"
            yield Problem(f"optimizer.{key}", what, "Remove it; what it takes instead can stand in optimizer.options.")
    if settings.options.get("is_paged") and not _has_nvidia():
        what = "has no effect, because this computer has no NVIDIA GPU"
        yield Problem("optimizer.options.is_paged", what, "Remove it.")
    if settings.ema_decay and averages_itself(kind):
        what = f"has no effect, because {settings.kind} averages the weights itself"
        yield Problem("optimizer.ema_decay", what, "Remove it.")


def _has_nvidia() -> bool:
    import torch

    return torch.cuda.is_available()


def _rates(config: RunConfig) -> Iterator[Problem]:
    """Optimizers that find their learning rate find one for all weights."""
    settings, adapter = config.optimizer, config.adapter
    if settings.kind not in RATE_FREE:
        return
    key = "lr" if adapter.unet else "text_encoder_lr"
    rate = getattr(settings, key)
    others = {f"block.{number}.lr": block.lr for number, block in enumerate(config.block) if block.lr}
    if adapter.unet and adapter.text_encoder:
        others["optimizer.text_encoder_lr"] = settings.text_encoder_lr
    if adapter.new_tokens:
        others["optimizer.token_lr"] = settings.token_lr
    for where, other in others.items():
        if other != rate:
            what = f"is {other:g}, but {settings.kind} finds one rate for all, and optimizer.{key} is {rate:g}"
            yield Problem(where, what, f"Set it to {rate:g}.")
    if settings.loraplus_ratio != 1:
        yield Problem("optimizer.loraplus_ratio", f"{settings.kind} finds one rate for all weights", "Remove it.")


# ---------------------------------------------------------------------------------------------------------------------
# what it does


def _rehearse(settings: OptimizerSection, rates: list[float]) -> None:
    import torch

    where = "optimizer.options" if settings.options else "optimizer.kind"
    fix = "Mend them, or choose another optimizer.kind." if settings.options else "Choose another one."
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is worth telling comes again in the run itself
            reason = _unfit(settings, rates)
    except Exception as error:  # of someone else's class, with values that a person gave
        raise ConfigError(
            f"{settings.kind} fails on a small problem: {first_line(error).rstrip('.')}", where, fix
        ) from error
    if reason:
        raise ConfigError(f"{settings.kind} {reason}", where, fix)


def _unfit(settings: OptimizerSection, rates: list[float]) -> str:
    """Why the optimizer cannot be used; empty if it can."""
    start = Trial(settings, rates)
    trained = Trial(settings, rates).run(_STEPS)
    if not all(map(math.isfinite, trained.distances(start))):
        return "comes to no finite numbers at these learning rates"
    if any(moved == 0 for moved in trained.distances(start)):
        return "leaves some weights as they are"
    if any(trained.distances(Trial(settings, rates, seed=1).run(_STEPS))):
        return "draws random numbers, so no run could be repeated or resumed exactly"
    faint = Trial(settings, rates).run(_STEPS, factor=1e-3)
    if sum(faint.distances(start)) > 0.5 * sum(trained.distances(start)):
        return "does not follow the learning rate, so neither optimizer.lr nor the schedule would have an effect"

    halfway = Trial(settings, rates).run(_STEPS // 2)
    try:
        resumed = halfway.saved_and_loaded().run(_STEPS // 2)
    except pickle.UnpicklingError:
        return "keeps something in its state that a checkpoint cannot hold"
    return "does not continue exactly from a checkpoint" if any(trained.distances(resumed)) else ""


class Trial:
    """Some small weights of all shapes that are trained here, and an optimizer that draws them to fixed values."""

    def __init__(self, settings: OptimizerSection, rates: list[float], seed: int = 0) -> None:
        import torch

        self.settings, self.rates = settings, [max(rates), min(rates)]
        shapes = [(64, 64), (8, 4), (4, 8, 3, 3), (8, 4, 1, 1), (8,), (4, 4, 8)]
        drawn = torch.Generator().manual_seed(0)
        self.targets = [torch.randn(shape, generator=drawn) for shape in shapes]
        # as small as an adapter's; of each pair of matrices the second starts at zero
        starts = [1e-3 * target.roll(1) * (number % 2 == 0) for number, target in enumerate(self.targets)]
        self.weights = [torch.nn.Parameter(start) for start in starts]
        torch.manual_seed(seed)
        groups = [self.weights[:2], self.weights[2:]]
        self.optimizer = make_optimizer(
            settings, [{"params": group, "lr": rate} for group, rate in zip(groups, self.rates, strict=True)]
        )

    def run(self, steps: int, factor: float = 1.0) -> Trial:
        """Train for some steps at a share of the learning rates."""
        for _ in range(steps):
            set_learning_rates(self.optimizer, self.rates, factor)
            for weight, target in zip(self.weights, self.targets, strict=True):
                weight.grad = (weight.detach() - target) / target.numel()
            self.optimizer.step()
        return self

    def saved_and_loaded(self) -> Trial:
        """Another one that stands where this one does, by way of a file."""
        import torch

        file, other = io.BytesIO(), Trial(self.settings, self.rates)
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        state: dict[str, Any] = torch.load(file, weights_only=True)
        with torch.no_grad():
            for weight, mine in zip(other.weights, self.weights, strict=True):
                weight.copy_(mine)
        other.optimizer.load_state_dict(state)
        return other

    def distances(self, other: Trial) -> list[float]:
        """How far apart the weights are, each tensor by itself."""
        pairs = zip(self.weights, other.weights, strict=True)
        return [float((mine.detach() - theirs.detach()).abs().sum()) for mine, theirs in pairs]
