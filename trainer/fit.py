"""The cheapest settings with which a run fits into a device's memory, and why each of them is chosen.

Tried in this order: what costs nothing; fewer pictures at once, with as many in a step as before; gradient
checkpointing of the largest blocks and then of all, which computes more; half precision, an optimizer of 8 bit, and a
base in 8 bits and then in 4, which change numbers. What is learned is never changed: neither the resolution, nor what
is trained, nor its rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .config import RuntimeSection
from .configfile import validate
from .device import Device, binary
from .errors import UserError
from .footprint import Footprint, footprint, precision_on
from .idle import needs_whole_weights
from .plan import Plan
from .startup import is_installed

_LARGEST = (2, 4)
"""Blocks that recompute before all do: of the way down and the way up, at one size of feature maps and at two."""
Predict = Callable[[Plan, Device], Footprint]
_SMALLER = (
    "Lower data.resolution or adapter.rank, set adapter.text_encoder = false if it is trained, or take a smaller base."
)


@dataclass(frozen=True)
class Change:
    """A setting that has to be another one."""

    setting: str
    value: Any
    why: str

    @property
    def override(self) -> str:
        """As `--set` takes it."""
        return f"{self.setting}={_toml(self.value)}"

    def facts(self) -> dict[str, Any]:
        return {"setting": self.setting, "value": self.value, "why": self.why}


@dataclass(frozen=True)
class Fit:
    """A run that fits, and how it came to."""

    device: Device
    footprint: Footprint
    """With the changes."""
    changes: list[Change] = field(default_factory=list)

    @property
    def toml(self) -> str:
        """The changes as tables of a configuration."""
        tables: dict[str, list[str]] = {}
        for change in self.changes:
            table, _, key = change.setting.partition(".")
            tables.setdefault(table, []).append(f"{key} = {_toml(change.value)}  # {change.why}")
        return "\n".join(line for table, lines in tables.items() for line in (f"[{table}]", *lines))

    def facts(self) -> dict[str, Any]:
        return {
            "device": self.device.name,
            "room_bytes": self.device.room,
            "changes": [change.facts() for change in self.changes],
            "set": [change.override for change in self.changes],
            "toml": self.toml,
            "memory": self.footprint.facts(),
        }


def cheapest_fit(plan: Plan, device: Device, now: Footprint, predict: Predict = footprint) -> Fit:
    """The settings, among those that can be chosen without changing what is learned, with which a run fits; `now` is
    what it takes as it is.

    Raises:
        UserError: if none does, with what the smallest settings would take.
    """
    draft = _Draft(plan, device, now, predict)
    for change in (_free_of_cost, _encoding, _training, _drawing):
        draft = draft if draft.fits else change(draft)
    if not draft.fits:
        raise _refusal(draft)
    return Fit(device, draft.now, list(draft.changes))


@dataclass(frozen=True)
class _Draft:
    """A plan whose settings are changed until it fits."""

    plan: Plan
    device: Device
    now: Footprint
    predict: Predict
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool:
        return self.now.peak <= self.device.room

    @property
    def encodes(self) -> bool:
        """Whether encoding alone fits."""
        return self.now.encoding.size <= self.device.room

    @property
    def trains(self) -> bool:
        """Whether training alone fits."""
        return self.now.training.size <= self.device.room

    @property
    def draws(self) -> bool:
        """Whether drawing alone fits, or nothing is drawn."""
        return not self.now.drawing or self.now.drawing.size <= self.device.room

    def changed(self, *changes: Change) -> _Draft:
        """With some settings changed, and what it takes then."""
        if not changes:
            return self
        overrides = [change.override for change in changes]
        plan = replace(self.plan, config=validate(self.plan.config.model_dump(), "the plan", overrides))
        return replace(self, plan=plan, now=self.predict(plan, self.device), changes=(*self.changes, *changes))


def _refusal(draft: _Draft) -> UserError:
    most = max(draft.now.stages, key=lambda stage: stage.size)
    tried = " ".join(f"--set {change.override}" for change in draft.changes)
    with_what = f" even with the smallest settings ({tried})" if tried else ", and no setting would lower it"
    what = f"{most.name} takes about {binary(most.size)}{with_what}; there are {binary(draft.device.room)}"
    return UserError(what, draft.device.memory, _SMALLER)


# ---------------------------------------------------------------------------------------------------------------------
# what is tried


def _free_of_cost(draft: _Draft) -> _Draft:
    """What takes less memory and no more time."""
    runtime, is_lora = draft.plan.config.runtime, draft.plan.config.adapter.kind == "lora"
    changes: list[Change] = []
    if not runtime.lean_activations:
        why = "keeps nothing that the backward pass can make again at once, with the same result"
        changes.append(Change("runtime.lean_activations", True, why))
    if is_lora and not runtime.fast_lora:
        why = "keeps less of each layer, and is faster, with the same result"
        changes.append(Change("runtime.fast_lora", True, why))
    if is_lora and runtime.autocast:
        why = "computes in the base's precision, which takes less and is faster"
        changes.append(Change("runtime.autocast", False, why))
    return draft.changed(*changes)


def _encoding(draft: _Draft) -> _Draft:
    return draft if draft.encodes else _half_of_the_vae(draft)


def _half_of_the_vae(draft: _Draft) -> _Draft:
    if draft.plan.config.runtime.vae_precision != "fp32":
        return draft
    why = "the VAE takes half; a picture that overflows goes through it anew in fp32"
    return draft.changed(Change("runtime.vae_precision", "bf16", why))


def _training(draft: _Draft) -> _Draft:
    """The first way of training in which single pictures fit, with as many at once as fit."""
    if draft.trains:
        return draft
    batches, smallest = _batches(draft.plan), draft
    for way in _ways(draft):
        single = _in_batches(draft, way, batches[-1])
        if single.trains:
            larger = (_in_batches(draft, way, batch) for batch in batches[:-1])
            return next((found for found in larger if found.trains), single)
        smallest = min(smallest, single, key=lambda one: one.now.training.size)
    return smallest


def _drawing(draft: _Draft) -> _Draft:
    """Previews are decoded in half precision, or left out: they are missed less than a run that does not start."""
    if draft.draws:
        return draft
    smaller = _half_of_the_vae(draft)
    if smaller.draws:
        return smaller
    assert draft.now.drawing
    short = binary(draft.now.drawing.size - draft.device.room)
    why = f"previews would take {short} more than there is; draw them afterwards with lorasmith sample"
    return draft.changed(Change("sample.every", 0, why))


def _ways(draft: _Draft) -> Iterator[list[Change]]:
    """Sets of settings in the order of what they cost, each the one before and something more."""
    config = draft.plan.config
    way: list[Change] = []
    yield way
    for way in _recomputing(config.runtime):
        yield way
    if precision_on(draft.device, config) == "no" and config.adapter.kind != "full":
        why = "halves the base and its activations; numbers have fewer digits"
        way = [*way, Change("runtime.precision", "bf16", why)]
        yield way
    if config.optimizer.kind == "adamw" and is_installed("bitsandbytes"):
        why = "keeps AdamW's two averages in 8 bit, with nearly the same result"
        way = [*way, Change("optimizer.kind", "adamw8bit", why)]
        yield way
    for change in _few_bits(draft):
        yield [*way, change]


def _few_bits(draft: _Draft) -> Iterator[Change]:
    """A frozen base in 8 bits and in 4, where it is in more and its adapter does not mind."""
    config, now = draft.plan.config, draft.plan.config.runtime.base_weights
    if needs_whole_weights(config) or now == "nf4":
        return
    if now == "full":
        why = "keeps the weights of the base's linear layers in 8 bits: more time, and nearly the same result"
        yield Change("runtime.base_weights", "int8", why)
    if draft.device.kind != "mps" and is_installed("bitsandbytes"):
        why = "keeps the weights of the base's linear layers in 4 bits: more time, and less exact than in 8"
        yield Change("runtime.base_weights", "nf4", why)


def _recomputing(runtime: RuntimeSection) -> Iterator[list[Change]]:
    """Of a part of the UNet, and of all of it."""
    what = "computes activations again instead of keeping them: the same result in"
    on = Change("runtime.gradient_checkpointing", True, f"{what} more time, the more the more blocks do so")
    if not runtime.gradient_checkpointing:
        for blocks in _LARGEST:
            why = "the blocks of the largest feature maps keep most; the others cost no more time"
            yield [on, Change("runtime.checkpointed_blocks", blocks, why)]
        yield [replace(on, why=f"{what} about a third more time")]
    elif runtime.checkpointed_blocks:
        yield [Change("runtime.checkpointed_blocks", 0, f"all of it {what} about a third more time")]


def _batches(plan: Plan) -> list[int]:
    """The batch as it is, and smaller ones of which a whole number makes it up."""
    batch = plan.config.budget.batch
    return [size for size in range(batch, 0, -1) if batch % size == 0]


def _in_batches(draft: _Draft, way: list[Change], batch: int) -> _Draft:
    """A way of training with so many pictures at once, and as many in a step as before."""
    budget = draft.plan.config.budget
    if batch == budget.batch:
        return draft.changed(*way)
    images = budget.batch * budget.accumulate
    fewer = Change("budget.batch", batch, f"{budget.batch} pictures at once do not fit")
    more = Change("budget.accumulate", images // batch, f"so that a step still has {images} images")
    return draft.changed(*way, fewer, more)


def _toml(value: Any) -> str:
    return json.dumps(value)
