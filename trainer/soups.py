"""The mean of several checkpoints, of one run or of two: a model of its own, written like any other.

Model soups (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482) and LAWA (Kaddour 2022,
https://arxiv.org/abs/2209.14981): what lies between points that were reached from the same weights is often better
than any of them. Shares sum to 1; how strongly the mean then acts is a matter of strengths. A negative share leads away
from a checkpoint, on the line through it and the others, where nothing was trained; so it has to be asked for.

Of whole models the weights are averaged, number by number. Of adapters it is the change of each layer's weight, and
exactly so; then it is cut back to the rank of the runs, or to a larger one, by SVD (Eckart & Young 1936). New tokens
are averaged as vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..datasets.workers import Progress
from .adapter import base_weight, deltas, load_adapter_state, reads_tokens, settle, strength, trained_layers
from .bases import BaseInfo
from .checkpoint import TrainState, load_state, open_adapter
from .config import RunConfig
from .delta import Changes, Delta, baked
from .errors import RunError, UserError
from .full import trained_weights
from .interpolation import added
from .jobs import RunFolder, open_run
from .loraread import merged
from .models import Base
from .pivotal import token_embeddings, unread
from .plan import as_trained, base_of
from .release import Trained
from .run import base_to_load, saved_step
from .strengths import Strengths
from .verify import Layer


@dataclass(frozen=True)
class Ingredient:
    """A checkpoint, and its share in the mean."""

    run: RunFolder
    config: RunConfig
    state: TrainState
    share: float

    @property
    def where(self) -> str:
        return str(self.run.checkpoint(self.state.step))

    def opened(self) -> Any:
        """Its weights, of which each is read when it is asked for: a whole model's would fill the memory."""
        return open_adapter(self.run.checkpoint(self.state.step))

    def weights(self) -> dict[str, Tensor]:
        """All of them, as copies: an open file could not be pruned on Windows."""
        with self.opened() as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)


@dataclass(frozen=True)
class Interpolated:
    """The mean of checkpoints, as a live model and as what is written of it."""

    trained: Trained
    """The base acts as the mean. Its step and images are those of the latest checkpoint of the first run."""
    changes: Changes | None
    """Plain LoRAs; None for a whole model, whose weights are the mean."""
    name: str
    ingredients: tuple[Ingredient, ...]
    lost: Mapping[str, float]
    """|rest| / |change| by component: what was cut off to keep the rank. Empty for a whole model: nothing is."""

    @property
    def merged_from(self) -> list[str]:
        """What it is the mean of, in words: `style step 400 (0.25)`."""
        return [f"{one.config.name} step {one.state.step} ({one.share:.4g})" for one in self.ingredients]

    @contextmanager
    def at(self, strengths: Strengths) -> Iterator[Base]:
        """Within the block the base acts as the mean at these strengths; then as the mean again.

        Raises:
            ConfigError: if a block that is named holds nothing of it.
        """
        base = self.trained.base
        if self.changes is None:
            with strength(base, strengths):
                yield base
            return
        strengths.refuse_idle(trained_layers(base))
        further = {
            component: [
                delta.times(factor - 1) for delta in own if (factor := strengths.of(component, delta.name)) != 1
            ]
            for component, own in self.changes.items()
        }
        read = nullcontext() if reads_tokens(base, strengths) else unread(base)
        with read, merged(base.components, further, 1.0):
            yield base


def interpolate_run(
    path: Path,
    steps: Sequence[int],
    weights: Sequence[float] = (),
    other: Path | None = None,
    rank: int | None = None,
    extrapolate: bool = False,
    progress: Progress | None = None,
) -> Interpolated:
    """The weighted mean of several checkpoints of a run; with `other`, of one of this run and one of the other.

    Of two runs, no steps mean their newest checkpoints. Weights are equal if none are given, and are brought to a sum
    of 1; negative ones are for `extrapolate`. Each layer keeps the larger rank of the runs, or gets the one given, as
    far as it has as much to say: from the sum of the ranks on, nothing is lost. The mean of anything but plain LoRAs is
    written as such, and `rank` must then be given.

    Raises:
        UserError: if fewer than two checkpoints are named, for weights that make no mean, or a rank that is missing or
            has no effect.
        RunError: if a checkpoint is not there or damaged, or if two cannot be averaged: they are of different bases,
            one is a whole model, or they train different weights, or tokens.
    """
    ingredients = _gathered(path, steps, weights, other, extrapolate)
    _require_alike(ingredients)
    if ingredients[0].config.adapter.kind == "full":
        if rank is not None:
            raise UserError("has no effect: the run trained the base's own weights", "--rank", "Remove it.")
        base, changes, lost = _mean_model(ingredients, progress), None, {}
    else:
        _require_rank(ingredients, rank)
        base, changes, lost = _mean_adapter(ingredients, rank, progress)
    first = max((one for one in ingredients if one.run == ingredients[0].run), key=lambda one: one.state.step)
    trained = Trained(first.run, first.config, base, first.state.step, first.state.images)
    return Interpolated(trained, changes, _name_of(ingredients), tuple(ingredients), lost)


def _name_of(ingredients: Sequence[Ingredient]) -> str:
    """`style-mean-400-600`, `style-mean-400-25pct-600-75pct`, `style-mean-600-other-800`."""
    first, parts = ingredients[0].config.name, []
    equal = len({one.share for one in ingredients}) == 1
    for one in ingredients:
        parts += [one.config.name] if one.run != ingredients[0].run else []
        parts += [str(one.state.step)] + ([] if equal else [f"{100 * one.share:.3g}pct"])
    return "-".join([first, "mean", *parts])


# ---------------------------------------------------------------------------------------------------------------------
# what is averaged


def _gathered(
    path: Path, steps: Sequence[int], weights: Sequence[float], other: Path | None, extrapolate: bool
) -> list[Ingredient]:
    run = open_run(path)
    named: list[tuple[RunFolder, int | None]] = [(run, step) for step in steps]
    if other is not None:
        second = open_run(other)
        if second.path.resolve() == run.path.resolve():
            raise UserError("is the same run", str(other), "Name two of its checkpoints by their steps, and no other.")
        if len(steps) not in (0, 2):
            what = f"{len(steps)} steps are named, for two runs"
            raise UserError(what, "--steps", "Name one of each run, or none for the newest.")
        named = list(zip((run, second), steps or (None, None), strict=True))
    elif len(set(steps)) < 2 or len(set(steps)) < len(steps):
        there = ", ".join(map(str, run.saved_steps())) or "none"
        what = "a mean is of two different checkpoints at least"
        raise UserError(what, "--steps", f"Name each once. Checkpoints: {there}.")
    shares = _shares(weights, len(named), extrapolate)
    found = []
    for (owner, step), share in zip(named, shares, strict=True):
        saved = saved_step(owner, step)
        found.append(Ingredient(owner, owner.read_config(), load_state(owner.checkpoint(saved)), share))
    return found


def _shares(weights: Sequence[float], count: int, extrapolate: bool) -> list[float]:
    """As many numbers, whose sum is 1."""
    weights = weights or [1.0] * count
    what = fix = ""
    if len(weights) != count:
        what, fix = f"{len(weights)} weights for {count} checkpoints", "Give one for each, or none for equal ones."
    elif not all(map(math.isfinite, weights)):
        what, fix = "a weight is no number", "Give numbers, as 1,1,2."
    elif min(weights) < 0 and not extrapolate:
        what = f"{min(weights):g} leads away from a checkpoint, to where nothing was trained"
        fix = "Give positive weights, or ask for it with --extrapolate."
    elif not (total := math.fsum(weights)) > 0:
        what, fix = f"the weights sum to {total:g}", "Let their sum be larger than 0; they are then brought to 1."
    if what:
        raise UserError(what, "--weights", fix)
    return [weight / math.fsum(weights) for weight in weights]


def _require_alike(ingredients: Sequence[Ingredient]) -> None:
    first = ingredients[0]
    for one in ingredients[1:]:
        for what, fix in _differences(first, one):
            raise RunError(what, one.where, fix)


def _differences(first: Ingredient, one: Ingredient) -> Iterator[tuple[str, str]]:
    """Why two checkpoints have no mean, and what to do."""
    mine, theirs = first.config.adapter, one.config.adapter
    same_base = "Choose runs on the same base."
    if one.state.base != first.state.base:
        yield f"was trained on another base than {first.where}", same_base
    if one.run == first.run:
        return
    if _noise_of(one.config) != _noise_of(first.config):
        yield f"was trained with another objective.prediction or zero_terminal_snr than {first.where}", same_base
    if (mine.kind == "full") != (theirs.kind == "full"):
        yield f"holds a {theirs.kind}, and {first.where} a {mine.kind}", "Choose two whole models, or two adapters."
    words = [(c.adapter.new_tokens, c.trigger if c.adapter.new_tokens else "") for c in (first.config, one.config)]
    if words[0] != words[1]:
        what = f"has other new tokens than {first.where}"
        yield what, "Choose runs of the same trigger and adapter.new_tokens."


def _noise_of(config: RunConfig) -> tuple[str, bool]:
    info: BaseInfo = as_trained(base_of(config), config)
    return info.prediction, info.zero_terminal_snr


def _require_rank(ingredients: Sequence[Ingredient], rank: int | None) -> None:
    kinds = {one.config.adapter.kind for one in ingredients} - {"lora"}
    if kinds and rank is None:
        what = f"the mean of changes by {', '.join(sorted(kinds))} is no such change"
        raise UserError(what, "--rank", "Give the rank of the plain LoRA to make of it, as 16.")


# ---------------------------------------------------------------------------------------------------------------------
# whole models


@torch.no_grad()
def _mean_model(ingredients: Sequence[Ingredient], progress: Progress | None) -> Base:
    """sum share x theta, computed in fp64 and set in place: besides the model, one tensor is in memory."""
    first = ingredients[0]
    base = base_to_load(first.run, first.config, first.state.base)
    live = trained_weights(base)
    wanted = {name: list(parameter.shape) for name, parameter in live.items()}
    with ExitStack() as stack:
        files = [(one.share, stack.enter_context(one.opened())) for one in ingredients]
        for one, (_, file) in zip(ingredients, files, strict=True):
            if {name: list(file.get_slice(name).get_shape()) for name in file.keys()} != wanted:  # noqa: SIM118
                what = f"trains other weights than {first.run.path}, so that their mean would be neither"
                raise RunError(what, one.where, "Choose runs of the same adapter.train_only, unet and text_encoder.")
        for done, (name, parameter) in enumerate(live.items(), 1):
            parameter.copy_(sum((share * file.get_tensor(name).double() for share, file in files), torch.zeros(())))
            if progress:
                progress(done, len(live))
    return base


# ---------------------------------------------------------------------------------------------------------------------
# adapters


@torch.no_grad()
def _mean_adapter(
    ingredients: Sequence[Ingredient], rank: int | None, progress: Progress | None
) -> tuple[Base, dict[str, list[Delta]], dict[str, float]]:
    """The base that acts as the mean, what that changes, and the shares that the rank has cut off.

    One checkpoint is in memory at a time; a second run's comes first, so that the base that is left is the first's.
    """
    totals: dict[tuple[str, str], Delta] = {}
    ranks: dict[tuple[str, str], int] = {}
    tokens: dict[str, Tensor] = {}
    base: Base | None = None
    for run in dict.fromkeys(one.run for one in reversed(ingredients)):
        own = [one for one in ingredients if one.run == run]
        del base  # before there is another
        base = base_to_load(run, own[0].config, own[0].state.base)
        for one in own:
            load_adapter_state(base, one.weights())
            for component, module in base.components.items():
                for delta in deltas(module):
                    key, weight = (component, delta.name), base_weight(module, delta.name)
                    totals[key] = added(totals.get(key), one.share, delta, weight)
                    ranks[key] = max(ranks.get(key, 0), delta.rank)
            for name, vectors in token_embeddings(base).items():
                tokens[name] = tokens.get(name, 0) + one.share * vectors.double()
    assert base is not None
    changes, lost = _cut_back(base, totals, {key: rank or own for key, own in ranks.items()}, progress)
    for name, vectors in token_embeddings(base).items():
        vectors.copy_(tokens[name])
    settle(base, changes)
    return base, changes, lost


def _cut_back(
    base: Base, totals: dict[tuple[str, str], Delta], ranks: Mapping[tuple[str, str], int], progress: Progress | None
) -> tuple[dict[str, list[Delta]], dict[str, float]]:
    """The nearest plain LoRAs, and |rest| / |change| by component. Each total is given up on the way."""
    changes: dict[str, list[Delta]] = {}
    sizes: dict[str, tuple[float, float]] = {}
    for done, key in enumerate(list(totals), 1):
        component, total = key[0], totals.pop(key)
        weight = Layer(total, base.components[component]).weight.to(base.device)
        made = baked(total, weight, ranks[key])
        changes.setdefault(component, []).append(made.delta.on("cpu"))
        change, rest = sizes.get(component, (0.0, 0.0))
        sizes[component] = math.hypot(change, made.change), math.hypot(rest, made.rest)
        if progress:
            progress(done, len(ranks))
    return changes, {name: rest / change if change else 0.0 for name, (change, rest) in sizes.items()}
