"""Optimizers by name, and the learning-rate schedule. Packages are imported only when they are asked for."""

from __future__ import annotations

import difflib
import inspect
import io
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from .config import OptimizerSection, RunConfig
from .errors import ConfigError
from .idle import RATES, is_default
from .startup import import_late

if TYPE_CHECKING:
    from torch.optim import Optimizer

NAMED = {
    "adamw": ("torch.optim", "AdamW"),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "lion8bit": ("bitsandbytes.optim", "Lion8bit"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "adamw-schedulefree": ("schedulefree", "AdamWScheduleFree"),
    "radam-schedulefree": ("schedulefree", "RAdamScheduleFree"),
    "sgd-schedulefree": ("schedulefree", "SGDScheduleFree"),
}
"""Optimizers from their authors' packages, as (module, class); every other one is pytorch-optimizer's."""

_DECOUPLED = ("weight_decouple", "decoupled_weight_decay", "decouple")  # how the packages spell it


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer


def make_optimizer(settings: OptimizerSection, groups: list[dict], fused: bool = True) -> Optimizer:
    """The optimizer over parameter groups, each with its own learning rate; `check_optimizer` has passed it.

    `fused` is AdamW's fast form; under fp16's gradient scaler it would hide which steps were skipped.

    Raises:
        ConfigError: if no optimizer has this name, or its package is not installed.
    """
    kind = optimizer_class(settings.kind)
    arguments = arguments_of(settings, kind)
    if settings.kind == "adamw":
        arguments["fused"] = fused
    with redirect_stdout(io.StringIO()):  # where prodigyopt greets, and where our results go
        optimizer = kind(groups, **arguments)
    if averages_itself(kind):
        optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]  # they start with the weights to be used
    return optimizer


def load_optimizer(
    optimizer: Optimizer, state: dict[str, Any], settings: OptimizerSection, before: Mapping[str, Any]
) -> bool:
    """Let an optimizer go on from a saved state; False if that is of another kind, or of other groups.

    `before` are the settings that it was saved under. A state brings them along, so where some are others now, those
    that there are now are put in their place.
    """
    saved, now = ([len(one["params"]) for one in groups] for groups in (state["param_groups"], optimizer.param_groups))
    if before.get("kind", settings.kind) != settings.kind or saved != now:
        return False
    given = arguments_of(settings, optimizer_class(settings.kind))
    made = [{key: group[key] for key in given if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if before and before != settings.model_dump():
        for group, arguments in zip(optimizer.param_groups, made, strict=True):
            group.update(arguments)
    return True


def optimizer_class(kind: str) -> type[Optimizer]:
    """The class of a name, in whichever case.

    Raises:
        ConfigError: if no optimizer has this name, or its package is not installed.
    """
    name = kind.lower()
    if name in NAMED:
        module, class_name = NAMED[name]
        return getattr(_imported(module, kind), class_name)
    others = _others(kind)
    if name not in others:
        close = difflib.get_close_matches(name, [*NAMED, *others], n=1)
        known = f"Known are {', '.join(NAMED)}, lion, adafactor, came and the others of pytorch-optimizer."
        what = f'no optimizer is called "{kind}"'
        raise ConfigError(what, "optimizer.kind", f"Did you mean {close[0]}?" if close else known)
    return others[name]


def _others(kind: str) -> dict[str, type[Optimizer]]:
    from torch.optim import Optimizer

    things = vars(_imported("pytorch_optimizer", kind)).values()
    return {
        thing.__name__.lower(): thing for thing in things if isinstance(thing, type) and issubclass(thing, Optimizer)
    }


def _imported(module: str, kind: str) -> Any:
    if module.startswith("bitsandbytes"):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses 4-bit kernels, which no optimizer uses
    try:
        return import_late(module)
    except ImportError as error:
        what = f'"{kind}" is looked for in {module.partition(".")[0]}, which is not installed'
        raise ConfigError(what, "optimizer.kind", 'pip install "lorasmith[optimizers]"') from error


def parameters_of(kind: type[Optimizer]) -> dict[str, Parameter]:
    """What the constructor takes by name. Those that take anything ignore what they do not know."""
    taken = inspect.signature(kind).parameters
    return {name: one for name, one in taken.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}


def own_betas(kind: type[Optimizer]) -> tuple[float, ...]:
    """The betas that its authors chose, the first two of them those of `optimizer.beta1` and `beta2`; () if none."""
    taken = parameters_of(kind)
    return taken["betas"].default if "betas" in taken else ()


def averages_itself(kind: type[Optimizer]) -> bool:
    """Whether it trains other weights than are to be used, as schedule-free ones do (Defazio et al. 2024)."""
    return hasattr(kind, "train") and hasattr(kind, "eval")


def arguments_of(settings: OptimizerSection, kind: type[Optimizer]) -> dict[str, Any]:
    """What the constructor is given beside the parameter groups."""
    taken = parameters_of(kind)
    given: dict[str, Any] = {"weight_decay": settings.weight_decay, **_presets(settings)}
    arguments = {name: value for name, value in given.items() if name in taken} | settings.options
    if betas := own_betas(kind):
        arguments["betas"] = (settings.beta1, settings.beta2, *betas[2:])
    return arguments


def _presets(settings: OptimizerSection) -> Mapping[str, Any]:
    """Options without which our settings would not mean what they say; `optimizer.options` overrides them."""
    presets: dict[str, Any] = dict.fromkeys(_DECOUPLED, True)
    if settings.kind == "adafactor":
        presets |= {"relative_step": False, "scale_parameter": False}  # else it makes its own learning rate
    if settings.kind == "prodigy":
        presets["safeguard_warmup"] = settings.warmup > 0  # as its authors say
    return presets


def with_own_betas(settings: OptimizerSection) -> OptimizerSection:
    """The settings with the authors' betas where none were given, so that a complete file tells what is used."""
    if settings.kind == "adamw":
        return settings
    chosen = dict(zip(("beta1", "beta2"), own_betas(optimizer_class(settings.kind)), strict=False))
    return settings.model_copy(update={key: own for key, own in chosen.items() if key not in settings.model_fields_set})


# ---------------------------------------------------------------------------------------------------------------------
# learning rates


def schedule_factor(settings: OptimizerSection, step: int, steps: int) -> float:
    """What the learning rates are multiplied with at `step` (the first is 0) of `steps`.

    It rises linearly over the first `warmup` share of the steps, never from exactly zero, then follows the schedule,
    whose fall ends at `schedule_floor`.
    """
    warmup_steps = round(settings.warmup * steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if settings.schedule == "wsd":
        left = _left_of_decay(settings.schedule_decay, step, steps)
    else:
        left = _left(settings, (step - warmup_steps) / max(1, steps - warmup_steps))
    return settings.schedule_floor + (1 - settings.schedule_floor) * left


def _left(settings: OptimizerSection, z: float) -> float:
    """How much is left of a falling schedule after a share z of it, from 1 at z = 0 to 0 at z = 1.

    cosine: 1/2 (1 + cos(pi z)), and its restarts (Loshchilov & Hutter 2017); rex: (1 - z) / (1/2 + 1/2 (1 - z))
    (Chen et al. 2021).
    """
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * z))
    if settings.schedule == "cosine-restarts":
        return 0.5 * (1 + math.cos(math.pi * (z * settings.schedule_cycles % 1)))
    if settings.schedule == "linear":
        return 1 - z
    if settings.schedule == "polynomial":
        return (1 - z) ** settings.schedule_power
    if settings.schedule == "rex":
        return (1 - z) / (0.5 + 0.5 * (1 - z))
    return 1.0


def _left_of_decay(share: float, step: int, steps: int) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): a line over the last `share` of the steps."""
    return min(1.0, (steps - step) / max(1, round(share * steps)))


def set_learning_rates(optimizer: Optimizer, base_rates: list[float], factor: float) -> list[float]:
    """Set each group's rate to its base rate times `factor`, and return them."""
    rates = [rate * factor for rate in base_rates]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return rates


def effective_rates(optimizer: Optimizer) -> list[float]:
    """Each group's rate; of an optimizer that finds its own, times the d it has found (Mishchenko & Defazio 2024)."""
    return [group["lr"] * float(group.get("d", 1.0)) for group in optimizer.param_groups]


# ---------------------------------------------------------------------------------------------------------------------
# what a person should look at

_ADAM = (1e-6, 5e-3)
_SIGNS = (1e-7, 5e-4)
_SCHEDULE_FREE = (1e-5, 5e-2)
_FACTOR = (0.1, 2.0)
_USUAL = {
    **dict.fromkeys(("adamw", "adamw8bit", "adam", "nadam", "radam", "stableadamw", "adafactor", "came"), _ADAM),
    **dict.fromkeys(("lion", "lion8bit", "tiger", "signsgd"), _SIGNS),
    **dict.fromkeys(("adamw-schedulefree", "radam-schedulefree"), _SCHEDULE_FREE),
    **dict.fromkeys(("prodigy", "dadaptadam", "dadaptlion", "dadaptadan", "dadaptadagrad", "dadaptsgd"), _FACTOR),
}
"""Learning rates between which LoRAs are trained, where that is known."""


def warnings_of(config: RunConfig) -> Iterator[str]:
    """What is allowed of the optimizer's settings, and seldom meant."""
    settings = config.optimizer
    low, high = _USUAL.get(settings.kind, (0.0, math.inf))
    for part, key in RATES.items():
        rate = getattr(settings, key)
        if getattr(config.adapter, part) and not low <= rate <= high:
            yield f"optimizer.{key} = {rate:g} is unusual for {settings.kind}: {low:g} to {high:g} is usual."
    if "schedulefree" in settings.kind and settings.schedule != "constant":
        yield (
            f'{settings.kind} needs no schedule: it averages instead. Set optimizer.schedule = "constant", '
            "or the rate falls twice."
        )
    yield from _warnings_of_betas(settings)


def _warnings_of_betas(settings: OptimizerSection) -> Iterator[str]:
    if settings.kind == "adamw":
        return
    for key, own in zip(("beta1", "beta2"), own_betas(optimizer_class(settings.kind)), strict=False):
        if is_default(settings, key) and getattr(settings, key) != own:
            now = getattr(settings, key)
            yield f"optimizer.{key} = {now:g} is AdamW's; the authors of {settings.kind} chose {own:g}."
