"""What a run will do, before it does it: everything that must fail fails here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..datasets.buckets import BatchOrder, images_by_step
from ..datasets.dataset import Example, Source, bucket_counts, dataset_fingerprint, load_examples
from .bases import BaseInfo, inspect_base
from .config import RunConfig
from .errors import ConfigError, LorasmithError, Problem, UserError

PREVIEWS_BY_DEFAULT = 4
_MUCH_ENLARGED = 1.5
_MUCH_CROPPED = 0.25


@dataclass(frozen=True)
class Plan:
    """A validated configuration together with what it was found to mean."""

    config: RunConfig
    base: BaseInfo
    examples: list[Example]
    processes: int = 1

    @cached_property
    def order(self) -> BatchOrder:
        return BatchOrder([example.entry for example in self.examples], self.config.budget.batch, self.config.seed)

    @property
    def batches_per_step(self) -> int:
        """Over all processes."""
        return self.config.budget.accumulate * self.processes

    @cached_property
    def images_by_step(self) -> list[int]:
        return images_by_step(self.order, self.batches_per_step, self.config.budget.images)

    @property
    def steps(self) -> int:
        return len(self.images_by_step)

    @property
    def images(self) -> int:
        """Images that will be seen: the budget, and at most the rest of the last step."""
        return self.images_by_step[-1]

    @cached_property
    def dataset_fingerprint(self) -> str:
        return dataset_fingerprint(self.examples)

    @property
    def cache(self) -> Path:
        import platformdirs

        return Path(self.config.runtime.cache or platformdirs.user_cache_dir("lorasmith", appauthor=False)).expanduser()

    def facts(self) -> dict[str, Any]:
        """The plan as plain values, for `--json` and `events.jsonl`."""
        return {
            "name": self.config.name,
            "base": {"model": self.base.short_name, "family": self.base.family, "prediction": self.prediction},
            "images": len(self.examples),
            "captions": len(self.captioned),
            "caption_sources": dict(self.caption_sources()),
            "buckets": {f"{width}x{height}": n for (width, height), n in bucket_counts(self.examples).items()},
            "steps": self.steps,
            "images_seen": self.images,
            "shows_per_image": round(self.images / sum(e.entry.shows for e in self.examples), 2),
            "batch": self.config.budget.batch * self.batches_per_step,
            "prompts": self.config.sample.prompts,
            "warnings": list(self.warnings()),
        }

    @property
    def prediction(self) -> str:
        chosen = self.config.objective.prediction
        return self.base.prediction if chosen == "auto" else chosen

    @property
    def captioned(self) -> list[Example]:
        """Examples whose final caption is not empty."""
        return [example for example in self.examples if example.caption]

    def caption_sources(self) -> Counter[str]:
        """How many captions come from each kind of source."""
        return Counter(_kind_of_source(example) for example in self.examples)

    def warnings(self) -> Iterator[str]:
        """What a person should look at before training."""
        uncaptioned = [example for example in self.examples if not example.caption]
        if uncaptioned:
            yield (
                f"{_images(len(uncaptioned))} will be trained with an empty caption: {_names(uncaptioned)}. "
                "Add captions, or set data.trigger."
            )
        enlarged = [example for example in self.examples if example.fit.enlargement > _MUCH_ENLARGED]
        if enlarged:
            yield f"{_images(len(enlarged))} will be soft, enlarged over {_MUCH_ENLARGED} times: {_names(enlarged)}."
        cropped = [example for example in self.examples if example.fit.cropped_share > _MUCH_CROPPED]
        if cropped:
            yield f"{_images(len(cropped))} will lose over {_MUCH_CROPPED:.0%} of their area to the crop: {_names(cropped)}."
        seen: dict[str, Example] = {}
        for example in self.examples:
            if example.item.sha256 in seen:
                yield f"{example.name} is the same file as {seen[example.item.sha256].name}; it counts twice."
            seen.setdefault(example.item.sha256, example)
        if self.prediction != self.base.prediction:
            yield f"objective.prediction is {self.prediction}, but the base's scheduler says {self.base.prediction}."


def make_plan(config: RunConfig) -> Plan:
    """Look at everything a run needs, and load no weights.

    Raises:
        UserError: with every problem that was found, each with its place and its fix.
    """
    problems: list[Problem] = []
    base = _collect(problems, lambda: inspect_base(config.base.model))
    _collect(problems, lambda: check_devices(config))
    sources = _sources(config, base)
    examples = _collect(problems, lambda: load_examples(sources, base.bucket_step if base else 64))
    if problems or base is None or examples is None:
        raise UserError.of(problems)
    if config.sample.every and not config.sample.prompts:
        config = config.model_copy(deep=True)
        config.sample.prompts = prompts_from(examples)
    if config.runtime.cache:
        _check_cache_is_outside(config)
    return Plan(config, base, examples, processes=int(os.environ.get("WORLD_SIZE", "1")))


def prompts_from(examples: list[Example]) -> list[str]:
    """A few different captions, spread evenly over the examples."""
    captions = list(dict.fromkeys(example.caption for example in examples if example.caption)) or [""]
    stride = max(1, len(captions) // PREVIEWS_BY_DEFAULT)
    return captions[::stride][:PREVIEWS_BY_DEFAULT]


def check_devices(config: RunConfig) -> None:
    """Settings that this computer cannot honour.

    Raises:
        ConfigError: xformers or fp16 without an NVIDIA GPU.
    """
    runtime = config.runtime
    if runtime.attention != "xformers" and runtime.precision != "fp16":
        return
    import torch

    if torch.cuda.is_available():
        return
    if runtime.attention == "xformers":
        raise ConfigError(
            "xformers needs an NVIDIA GPU, and this computer has none",
            "runtime.attention",
            'Set runtime.attention = "auto".',
        )
    raise ConfigError(
        "fp16 needs an NVIDIA GPU, and this computer has none",
        "runtime.precision",
        'Set runtime.precision = "auto", "fp32" or "bf16".',
    )


def _sources(config: RunConfig, base: BaseInfo | None) -> list[Source]:
    native = base.resolution if base else 512
    return [
        Source(Path(data.path), data.trigger, data.weight, data.resolution or native, data.caption_dropout)
        for data in config.data
    ]


def _check_cache_is_outside(config: RunConfig) -> None:
    cache = Path(config.runtime.cache).expanduser().resolve()
    for data in config.data:
        if cache.is_relative_to(Path(data.path)):
            raise ConfigError(
                f"{cache} lies inside the dataset folder {data.path}",
                "runtime.cache",
                "Choose a folder outside of it, or leave it empty.",
            )


def _collect(problems: list[Problem], check: Any) -> Any:
    """The check's result; or None, with its problems added to the list."""
    try:
        return check()
    except LorasmithError as error:
        problems += error.problems
        return None


def _kind_of_source(example: Example) -> str:
    source = example.item.source
    if source == "none":
        return "trigger alone" if example.caption else "no caption"
    if not example.item.caption:
        return "empty caption file" if not example.caption else "trigger alone (empty caption file)"
    return (
        source
        if source == "folder name"
        else source.split(" line ")[0]
        if " line " in source
        else "*" + Path(source).suffix
    )


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _names(examples: list[Example], limit: int = 3) -> str:
    shown = ", ".join(example.name for example in examples[:limit])
    return shown if len(examples) <= limit else f"{shown} and {len(examples) - limit} more"
