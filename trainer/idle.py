"""Settings that would have no effect, and settings that rule each other out: each is an error, never a silence.

A complete file spells out the defaults as well, so a setting may always stand at its default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .errors import Problem
from .formats import formats_of

if TYPE_CHECKING:
    from .config import RunConfig, Section

NESTED_PROBLEMS = "several settings have no effect"

LOW_RANK = ("lora", "dora", "loha", "lokr")
ADAPTERS = (*LOW_RANK, "oft", "boft")
ADDED = ("lora", "loha", "lokr")
"""Adapters whose change is added to what a layer gives, so that they need not know its weight exactly."""
_TAGS, _DRAWN = ("shuffle_caption", "caption_tag_dropout"), ("crop", "crop_jitter", "colour_jitter")
_VARYING = (*_TAGS, "wildcards", *_DRAWN, "flip", "regularization", "machine_weight", "machine_caption_dropout")
"""Settings of a `[[data]]` table that a pair of pictures cannot share, or that rated pictures cannot have."""

ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "adapter.rank": ("adapter.kind", LOW_RANK),
    "adapter.alpha": ("adapter.kind", LOW_RANK),
    "adapter.conv_rank": ("adapter.targets", ("all",)),
    "adapter.conv_alpha": ("adapter.targets", ("all",)),
    "adapter.rslora": ("adapter.kind", ("lora", "dora")),
    "adapter.init": ("adapter.kind", ("lora", "dora")),
    "adapter.dropout": ("adapter.kind", ("lora", "dora")),
    "adapter.rank_dropout": ("adapter.kind", ("loha", "lokr")),
    "adapter.module_dropout": ("adapter.kind", ("loha", "lokr", "oft", "boft")),
    "adapter.decompose_factor": ("adapter.kind", ("lokr",)),
    "adapter.block_size": ("adapter.kind", ("oft", "boft")),
    "adapter.targets": ("adapter.kind", ADAPTERS),
    "adapter.start_from": ("adapter.kind", ("lora",)),
    "optimizer.loraplus_ratio": ("adapter.kind", ("lora", "dora")),
    "optimizer.schedule_cycles": ("optimizer.schedule", ("cosine-restarts",)),
    "optimizer.schedule_power": ("optimizer.schedule", ("polynomial",)),
    "optimizer.schedule_decay": ("optimizer.schedule", ("wsd",)),
    "optimizer.schedule_floor": (
        "optimizer.schedule",
        ("cosine", "linear", "cosine-restarts", "polynomial", "rex", "wsd"),
    ),
    "objective.min_snr_gamma": ("objective.weighting", ("min-snr", "soft-min-snr")),
    "objective.huber_c": ("objective.loss", ("huber",)),
    "objective.huber_schedule": ("objective.loss", ("huber",)),
    "objective.timestep_mean": ("objective.timesteps", ("logit-normal",)),
    "objective.timestep_std": ("objective.timesteps", ("logit-normal",)),
    "export.tag_threshold": ("export.metadata", ("safe",)),
    "export.strength": ("adapter.kind", ADAPTERS),
    "validation.share": ("validation.by", ("loss",)),
    "validation.min_images": ("validation.by", ("loss",)),
    "runtime.fast_lora": ("adapter.kind", ("lora",)),
    "runtime.autocast": ("adapter.kind", ("lora",)),
    "runtime.flat_optimizer": ("optimizer.kind", ("adamw",)),
    "runtime.checkpointed_blocks": ("runtime.gradient_checkpointing", (True,)),
}
"""Settings by the one setting, and the values of it, with which they have an effect."""

CAPTURED_WITH: dict[str, tuple[Any, ...]] = {
    "adapter.kind": ("lora", "dora", "lokr"),  # of the others each step makes constants, or looks at what it solved
    "adapter.dropout": (0.0,),
    "adapter.rank_dropout": (0.0,),
    "adapter.module_dropout": (0.0,),
    "optimizer.kind": ("adamw",),
    "preference.start": ("",),
    "runtime.flat_optimizer": (True,),
    "runtime.gradient_checkpointing": (False,),
    "runtime.precision": ("auto", "bf16", "fp32"),
}
"""What a step must be like to be a CUDA graph: it always does the same, draws nothing from PyTorch's own generators,
and nothing of it waits for the GPU."""

OF_SWITCHES: dict[str, tuple[tuple[str, ...], str]] = {
    "prior_loss_weight": (("regularization",), "data.regularization = true"),
    "caption_separator": (_TAGS, "data.shuffle_caption = true"),
    "keep_tokens": (_TAGS, "data.shuffle_caption = true"),
    "keep_tokens_separator": (_TAGS, "data.shuffle_caption = true"),
    "caption_variants": ((*_TAGS, "wildcards"), "data.shuffle_caption = true"),
    "augmentations": (_DRAWN, 'data.crop = "random"'),
}
"""Settings of a `[[data]]` table by those of which one at least must be set for them to have an effect."""

OF_NUMBERS = {
    "sample.prompts": "sample.every",  # the other settings of the section serve `lorasmith sample` as well
    "validation.by": "validation.every",
    "validation.share": "validation.every",
    "validation.min_images": "validation.every",
    "validation.draws": "validation.every",
    "validation.seed": "validation.every",
    "validation.patience": "validation.every",
    "save.keep_best": "validation.every",
    "objective.multires_noise_discount": "objective.multires_noise_iterations",
    "optimizer.token_lr": "adapter.new_tokens",
    "adapter.token_init": "adapter.new_tokens",
}
"""Settings by the number that must be above 0 for them to have an effect."""

RATES = {"unet": "lr", "text_encoder": "text_encoder_lr"}
"""What can be trained, and its learning rate."""
RATE_OF = {f"adapter.{part}": f"optimizer.{key}" for part, key in RATES.items()}
"""Learning rates by the switch of the part they belong to."""
RATE_FREE = ("prodigy", "dadaptadagrad", "dadaptadam", "dadaptadan", "dadaptlion", "dadaptsgd")
"""Optimizers that find their own learning rate; what is given multiplies it."""


def dropped_by(switch: str, value: Any) -> Iterator[str]:
    """The settings that a choice makes idle, or that are no longer meant with it.

    Who makes it above a file or a recipe, that is with `--set` or in the file, need not take them back one by one.
    """
    yield from (dotted for dotted, (choice, values) in ONLY_WITH.items() if choice == switch and value not in values)
    yield from (dotted for dotted, number in OF_NUMBERS.items() if number == switch and not value)
    if switch in ("validation.every", "save.keep_best") and not value:
        yield "export.checkpoint"
    if switch == "validation.share" and not value:
        yield "validation.min_images"
    if switch in RATE_OF and not value:
        yield RATE_OF[switch]
    if switch == "runtime.precision" and value == "fp32":
        yield "runtime.autocast"
    if value not in CAPTURED_WITH.get(switch, (value,)):
        yield "runtime.cuda_graphs"
    if switch == "optimizer.kind" and str(value).lower() in RATE_FREE:
        yield from RATE_OF.values()


def problems_of(config: RunConfig) -> Iterator[Problem]:
    """All problems of a configuration whose single values are right."""
    yield from _idle_rates(config)
    yield from _idle_choices(config)
    yield from _idle_numbers(config)
    yield from _idle_blocks(config)
    yield from _idle_of_data(config)
    yield from _idle_formats(config)
    yield from _idle_preference(config)
    yield from _uncaptured(config)
    yield from _contradictions(config)


def is_default(section: Section, key: str) -> bool:
    return getattr(section, key) == type(section).model_fields[key].get_default(call_default_factory=True)


def _at(config: RunConfig, dotted: str) -> tuple[Section, str]:
    section, _, key = dotted.partition(".")
    return getattr(config, section), key


def _value(config: RunConfig, dotted: str) -> Any:
    return getattr(*_at(config, dotted))


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _idle_rates(config: RunConfig) -> Iterator[Problem]:
    adapter, optimizer = config.adapter, config.optimizer
    if not (adapter.unet or adapter.text_encoder):
        yield Problem(
            "adapter.unet", "nothing is trained: adapter.text_encoder is off as well", "Set one of the two to true."
        )
    for part, key in RATES.items():
        trained = getattr(adapter, part)
        if trained and getattr(optimizer, key) == 0:
            yield Problem(
                f"optimizer.{key}",
                f"is 0, so adapter.{part} would be trained without changing",
                f"Give a rate above 0, or set adapter.{part} = false.",
            )
        elif not trained and getattr(optimizer, key) > 0:
            yield Problem(
                f"optimizer.{key}",
                f"has no effect, because adapter.{part} is false",
                f"Remove it (or set it to 0), or set adapter.{part} = true.",
            )


def _idle_choices(config: RunConfig) -> Iterator[Problem]:
    for dotted, (switch, values) in ONLY_WITH.items():
        if not is_default(*_at(config, dotted)) and (now := _value(config, switch)) not in values:
            what = f"has no effect, because {switch} is {_shown(now)}"
            yield Problem(dotted, what, f"Remove it, or set {switch} = {_shown(values[0])}.")


def _idle_numbers(config: RunConfig) -> Iterator[Problem]:
    for dotted, switch in OF_NUMBERS.items():
        if not is_default(*_at(config, dotted)) and _value(config, switch) == 0:
            yield Problem(dotted, f"has no effect, because {switch} is 0", f"Remove it, or set {switch} above 0.")


def needs_whole_weights(config: RunConfig) -> str:
    """Why the base's weights cannot be kept in few bits; empty if they can."""
    kind, init = config.adapter.kind, config.adapter.init
    if kind == "full":
        return 'adapter.kind is "full", and they are what is trained'
    if kind not in ADDED:
        return f"adapter.kind is {_shown(kind)}, which changes them as a whole and would change what was lost"
    if init in ("pissa", "olora"):
        return f"adapter.init is {_shown(init)}, which takes a part out of them"
    return ""


def _idle_blocks(config: RunConfig) -> Iterator[Problem]:
    kind = config.adapter.kind
    for number, block in enumerate(config.block):
        if not (block.rank or block.alpha or block.lr):
            yield Problem(f"block.{number}", "changes nothing", "Give it a rank, an alpha or a learning rate.")
        for key in ("rank", "alpha"):
            if getattr(block, key) and kind not in LOW_RANK:
                what = f"has no effect, because adapter.kind is {_shown(kind)}"
                yield Problem(f"block.{number}.{key}", what, 'Remove it, or set adapter.kind = "lora".')


def _idle_of_data(config: RunConfig) -> Iterator[Problem]:
    """Settings of a set of images that wait for another one."""
    for number, data in enumerate(config.data):
        for key, (switches, fix) in OF_SWITCHES.items():
            if not is_default(data, key) and all(is_default(data, switch) for switch in switches):
                named = " and ".join(f"data.{switch}" for switch in switches)
                without = f"has no effect, because {named} {'is' if len(switches) == 1 else 'are'} not set"
                yield Problem(f"data.{number}.{key}", without, f"Remove it, or set {fix}.")
        if data.mask == "none" and data.unmasked_weight:
            what = 'has no effect, because data.mask is "none"'
            yield Problem(f"data.{number}.unmasked_weight", what, "Remove it.")
    if all(data.regularization for data in config.data):
        what = "all images are regularization images, so no style would be learned"
        yield Problem("data.0.regularization", what, "Add a [[data]] table with the images of the style.")


def _idle_formats(config: RunConfig) -> Iterator[Problem]:
    there, wanted = formats_of(config), config.export.formats
    for number, format in enumerate(wanted):
        if format not in there:
            what = f"{_shown(format)} is no format of what is trained"
            yield Problem(f"export.formats.{number}", what, f"Formats: {', '.join(map(_shown, there))}.")
        elif format in wanted[:number]:
            yield Problem(f"export.formats.{number}", "names a format again", "Remove one of the two.")


def _idle_preference(config: RunConfig) -> Iterator[Problem]:
    """What has no place in a run that refines another: there, two pictures are compared under the same conditions."""
    if not config.preference.start:
        if not is_default(config.preference, "beta"):
            fix = "Remove it, or set preference.start, as lorasmith refine does."
            yield Problem("preference.beta", "has no effect, because preference.start is not set", fix)
        return
    for dotted in ("adapter.start_from", "objective.loss", "validation.every"):
        if not is_default(*_at(config, dotted)):
            yield Problem(dotted, "has no place in a run that refines another (preference.start)", "Remove it.")
    for number, data in enumerate(config.data):
        for key in _VARYING:
            if not is_default(data, key):
                what = "would show two pictures of a pair in two ways, or does not go with preference.start"
                yield Problem(f"data.{number}.{key}", what, "Remove it.")
        if len(data.resolutions) > 1:
            what = "are several, and a pair is shown in one size (preference.start)"
            yield Problem(f"data.{number}.resolution", what, "Leave one.")


def _uncaptured(config: RunConfig) -> Iterator[Problem]:
    """What no CUDA graph can hold."""
    if not config.runtime.cuda_graphs:
        return
    others = [dotted for dotted, values in CAPTURED_WITH.items() if _value(config, dotted) not in values]
    if others:
        reasons = " and ".join(f"{dotted} is {_shown(_value(config, dotted))}" for dotted in others)
        fixes = " and ".join(f"{dotted} = {_shown(CAPTURED_WITH[dotted][0])}" for dotted in others)
        fix = f"Set runtime.cuda_graphs = false, or {fixes}."
        yield Problem("runtime.cuda_graphs", f"cannot be had, because {reasons}", fix)


def _not_to_be_compiled(config: RunConfig) -> tuple[str, str] | None:
    """What no compiler could look into, and what to set instead."""
    if config.adapter.kind not in ("lora", "full"):
        return f"PEFT's layers of kind {config.adapter.kind}", 'adapter.kind = "lora"'
    if config.runtime.attention == "xformers":
        return "xformers' attention", 'runtime.attention = "auto"'
    return None


def _contradictions(config: RunConfig) -> Iterator[Problem]:
    adapter, optimizer, objective = config.adapter, config.optimizer, config.objective
    if adapter.targets in ("all-linear", "all") and adapter.text_encoder and not adapter.unet:
        yield Problem(
            "adapter.targets",
            'is the same as "attention+ff", because adapter.unet is false',
            'Set adapter.targets = "attention+ff", or adapter.unet = true.',
        )
    if adapter.kind == "oft" and adapter.targets == "all":
        what = "works on linear layers only: on 3x3 convolutions PEFT's OFT changes the picture before it has learned"
        yield Problem("adapter.kind", what, 'Set adapter.targets = "all-linear", or adapter.kind = "boft".')
    if adapter.targets == "style-blocks" and adapter.text_encoder:
        yield Problem(
            "adapter.targets",
            "names blocks of the UNet alone, and adapter.text_encoder is true",
            "Set adapter.text_encoder = false.",
        )
    for key in ("conv_rank", "conv_alpha"):
        if getattr(adapter, key) and adapter.kind not in LOW_RANK:
            what = f"has no effect, because adapter.kind is {_shown(adapter.kind)}"
            yield Problem(f"adapter.{key}", what, 'Remove it, or set adapter.kind = "lora".')
    if adapter.kind == "dora" and adapter.init in ("pissa", "olora", "eva"):
        yield Problem("adapter.init", 'works with adapter.kind = "lora" only', 'Set adapter.init = "default".')
    if adapter.start_from and adapter.init != "default":
        what = "has no effect, because adapter.start_from says where the adapter starts"
        yield Problem("adapter.init", what, "Remove one of the two.")
    if adapter.new_tokens and adapter.kind == "full":
        yield Problem("adapter.new_tokens", 'goes with an adapter, and adapter.kind is "full"', "Remove it.")
    triggers = {d.trigger for d in config.data if not d.regularization}
    if config.preference.start:  # prompts without the trigger are rated as well
        triggers = triggers - {""} or triggers
    if adapter.new_tokens and len(triggers) != 1:
        what = "gives one trigger new tokens, and the sets of images have several"
        yield Problem("adapter.new_tokens", what, "Give all [[data]] tables of the style the same trigger.")
    elif adapter.new_tokens and triggers == {""}:
        yield Problem("adapter.new_tokens", "needs a trigger to stand for", 'Set data.trigger = "mystyle".')
    elif adapter.new_tokens and not re.fullmatch(r"[\w-]+", config.trigger):
        what = f"are kept in a file that is called as the trigger, and {config.trigger!r} is no plain name"
        yield Problem("adapter.new_tokens", what, "Take a trigger of letters, digits, _ and - only.")
    if objective.zero_terminal_snr == "on" and objective.prediction == "epsilon":
        what = "cannot be learned where the UNet predicts epsilon: pure noise says nothing of the picture"
        yield Problem("objective.zero_terminal_snr", what, 'Set it to "off", or objective.prediction = "v_prediction".')
    if objective.multires_noise_iterations == 1:
        what = "has no effect at 1: the first size is that of the noise itself"
        yield Problem("objective.multires_noise_iterations", what, "Set it to 6, or to 0 for none.")
    if objective.min_timestep > objective.max_timestep:
        yield Problem("objective.min_timestep", "is above objective.max_timestep", "Exchange the two.")
    if config.export.checkpoint == "best" and not config.save.keep_best:
        what = "cannot be had, because save.keep_best is false"
        yield Problem("export.checkpoint", what, 'Set save.keep_best = true, or export.checkpoint = "last".')
    if config.validation.share == 0 and not is_default(config.validation, "min_images"):
        what = "has no effect, because validation.share is 0: no image is held out"
        yield Problem("validation.min_images", what, "Remove it.")
    if config.runtime.autocast and config.runtime.precision == "fp32":
        what = 'has no effect, because runtime.precision is "fp32": nothing is cast'
        yield Problem("runtime.autocast", what, 'Remove it, or set runtime.precision = "bf16".')
    if config.runtime.compile and (uncompiled := _not_to_be_compiled(config)):
        what, otherwise = uncompiled
        what = f"cannot compile {what}, and no part of a block is left out"
        yield Problem("runtime.compile", what, f"Remove it, or set {otherwise}.")
    if config.runtime.base_weights != "full" and (reason := needs_whole_weights(config)):
        what = f"cannot be {_shown(config.runtime.base_weights)}, because {reason}"
        yield Problem("runtime.base_weights", what, 'Set it to "full", or another adapter.kind or adapter.init.')
    if optimizer.schedule == "wsd" and optimizer.warmup + optimizer.schedule_decay > 1:
        what = "and optimizer.warmup are more than the whole run"
        yield Problem("optimizer.schedule_decay", what, "Lower one of the two.")
