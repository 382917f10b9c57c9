"""What a run will do, before it does it: everything that must fail fails here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..datasets.buckets import BatchOrder, BucketRules, Fit, Shot, Size, fit, images_by_step
from ..datasets.captions import CaptionRules, has_wildcard
from ..datasets.dataset import Example, Source, bucket_counts, load_examples, tag_frequency
from ..datasets.sidecars import METADATA
from ..datasets.unpack import anchored, as_folder, display_name, local_folder, pinned
from ..datasets.views import Augmentation
from ..datasets.workers import Progress
from .bases import BaseInfo, anchored_base, inspect_base
from .clients.table import FORM_OF, unread_by
from .compiled import REPAYS_AFTER, check_compiler
from .config import DataSection, RunConfig
from .errors import ConfigError, LorasmithError, Problem, UserError
from .files import user_cache, writable
from .heldout import bands_of, hold_out
from .optim import warnings_of, with_own_betas
from .origin import Origin
from .preferences.rated import Rated, in_order
from .preferences.start import check_start, start_facts
from .rehearsal import check_optimizer

if TYPE_CHECKING:
    from .fitting import Part

T = TypeVar("T")

PREVIEWS_BY_DEFAULT = 4
_MUCH_ENLARGED = 1.5
_TWINS_NAMED = 3
_HELD_OUT_NAMED = 20
_WIDEST = 8.0
_HIGH_RATE_OF_FULL = 5e-5


@dataclass(frozen=True)
class Plan:
    """A validated configuration together with what it was found to mean."""

    config: RunConfig
    """Complete: paths are absolute, and the previews have prompts."""
    base: BaseInfo
    """As it will be trained: with the prediction type that was asked for."""
    examples: list[Example]
    """All that is trained on."""
    prediction_of_base: str
    """What the base's own scheduler says."""
    parts: list[Part]
    """What is trained, counted on the shape of the base."""
    fast_share: float
    """Of the adapter's layers, that can compute the fast way (`fastlora.py`); 0 where there are none."""
    processes: int = 1
    step: int = 0
    """Where a run that goes on stands in the order of images. What is random follows from it, so that it is all there
    is to a position."""
    seen: int = 0
    """Images it has seen by then."""
    held_out: list[Example] = field(default_factory=list)
    """Images that the validation loss is measured on, and nothing is trained on."""

    @cached_property
    def order(self) -> BatchOrder:
        shown = self.examples[: self.rated.shown] if self.rated else self.examples
        return BatchOrder([example.entry for example in shown], self.config.budget.batch, self.config.seed)

    @cached_property
    def rated(self) -> Rated | None:
        """What was said of the examples, where a run refines another."""
        return Rated.of(self.examples) if self.config.preference.start else None

    def taken_by(self, shots: Sequence[Shot]) -> tuple[Shot, ...]:
        """All showings that a batch takes: of a pair, both."""
        return tuple(self.rated.with_the_worse(shots)[0] if self.rated else shots)

    def bucket_of(self, shot: Shot) -> Size:
        """Width and height in which an image is shown."""
        buckets = self.examples[shot.image].entry.buckets
        return buckets[shot.number % len(buckets)]

    @property
    def batches_per_step(self) -> int:
        """Over all processes."""
        return self.config.budget.accumulate * self.processes

    @cached_property
    def images_by_step(self) -> list[int]:
        """Images seen after each step that is still to be taken."""
        return images_by_step(self.order, self.batches_per_step, self.config.budget.images, self.step, self.seen)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.step + len(self.images_by_step)

    @property
    def images(self) -> int:
        """Images that will have been seen: the budget, and at most the rest of the last step."""
        return self.images_by_step[-1] if self.images_by_step else self.seen

    @cached_property
    def origin(self) -> Origin:
        preference = start_facts(self.config, self.rated) if self.rated else None
        return Origin.of(self.config, self.base, self.examples, self.processes, preference)

    @property
    def cache(self) -> Path:
        return cache_of(self.config)

    def facts(self) -> dict[str, Any]:
        """The plan as plain values, for `--json` and `events.jsonl`."""
        return {
            "name": self.config.name,
            "base": {"model": self.base.short_name, "family": self.base.family, "prediction": self.base.prediction},
            "images": len(self.examples),
            "captions": len(self.captioned),
            "caption_sources": dict(self.caption_sources()),
            "machine_captions": sum(example.item.machine for example in self.examples),
            "masks": sum(example.is_masked for example in self.examples),
            "data": [self._facts_of(source) for source in self.sources],
            "buckets": {f"{width}x{height}": n for (width, height), n in bucket_counts(self.examples).items()},
            "placed": [_placement(example) for example in self.examples],
            "adapter": {"kind": self.config.adapter.kind, "train_only": self.config.adapter.train_only},
            "trained": [asdict(part) for part in self.parts],
            "preference": self.rated.facts() | self.config.preference.model_dump() if self.rated else None,
            "steps": self.steps,
            "images_seen": self.images,
            "shows_per_image": round(self.images / sum(entry.shows for entry in self.order.entries), 2),
            "batch": self.config.budget.batch * self.batches_per_step,
            "if_memory_is_full": self.if_memory_is_full,
            "validation": self.validation(),
            "prompts": self.config.sample.prompts,
            "preview_side": self.base.resolution,
            "techniques": self.techniques(),
            "warnings": list(self.warnings()),
        }

    def validation(self) -> dict[str, Any]:
        """What the validation loss is measured on, or what is scored; nothing where neither is."""
        settings = self.config.validation
        if not settings.every:
            return {}
        if settings.by == "scores":
            asked = {"by": settings.by, "every": settings.every, "patience": settings.patience}
            told = "style gained, prompt kept and copying"
            return asked | {"pictures": settings.draws, "held_out": [], "told": told}
        sides = 2 if self.held_out else 1
        return {
            "by": settings.by,
            "held_out": [example.name for example in self.held_out],
            "every": settings.every,
            "predictions": sides * settings.draws * len(bands_of(self.config.objective)),
            "told": self._validation_in_words,
            "patience": settings.patience,
        }

    @property
    def _validation_in_words(self) -> str:
        settings, images = self.config.validation, len({e.item.sha256 for e in style_of(self.examples)})
        if self.held_out:
            different = len({example.item.sha256 for example in self.held_out})
            of = f"{_images(len(self.held_out))} held out, of {different + images} of the style"
            return f"{of}: {_names(self.held_out, _HELD_OUT_NAMED)}"
        why = "validation.share is 0"
        if settings.share:
            why = f"{_images(images)} are fewer than validation.min_images = {settings.min_images}"
        told = "on training images with noise of its own, which tells what is learned, and not what is learned by heart"
        return f"{told}: none is held out, for {why}"

    def techniques(self) -> list[dict[str, Any]]:
        """What makes it fast and lean on this computer: name, whether it is on, and why."""
        from .techniques import techniques_here

        return [technique.facts() for technique in techniques_here(self.config, self.fast_share)]

    @property
    def if_memory_is_full(self) -> str:
        """What happens then in training."""
        if self.processes > 1:
            return "the run ends, for several processes halve no batches; the last checkpoint stands"
        if self.config.budget.batch == 1:
            return "the run ends, for single images cannot be halved; the last checkpoint stands"
        but = " but for the adapter's dropout" if self.config.adapter.drops else ""
        return f"batches are halved, down to single images, with the same result{but}"

    @property
    def latents_at_once(self) -> int:
        """Of the largest batch, over all its images."""
        largest = max(width * height for width, height in bucket_counts(self.examples))
        pictures = 2 if self.rated and self.rated.worse else 1
        return self.config.budget.batch * pictures * largest // self.base.vae_factor**2

    def batch_of_each_shape(self) -> dict[tuple[int, Size], list[Shot]]:
        """Of the whole run, wherever it stands, by how many pictures a batch has, and their width and height in
        latents."""
        factor, found = self.base.vae_factor, dict[tuple[int, Size], list[Shot]]()
        for batches in islice(self.order.steps(self.batches_per_step), self.steps):
            for batch in batches:
                width, height = self.bucket_of(batch[0])
                found.setdefault((len(self.taken_by(batch)), (width // factor, height // factor)), batch)
        return found

    def captions_read(self) -> set[str]:
        """All that may be read in training, also the empty one."""
        return {"", *(caption for example in self.examples for caption in example.captions)}

    @property
    def shows_per_epoch(self) -> float:
        return sum(example.entry.shows for example in self.examples)

    @property
    def sources(self) -> list[Source]:
        """The sets of images, in order, as they were named."""
        return list(dict.fromkeys(example.source for example in self.examples))

    def _facts_of(self, source: Source) -> dict[str, Any]:
        """How much of the training one set of images is."""
        own = [example for example in self.examples if example.source == source]
        return {
            "name": source.name,
            "images": len(own),
            "share": round(sum(example.entry.shows for example in own) / self.shows_per_epoch, 4),
            "regularization": source.regularization,
            "loss_weight": source.loss_weight,
            "views_per_image": len(own[0].views),
            "captions_per_image": max(len(example.captions) for example in own),
        }

    def dataset_facts(self) -> dict[str, Any]:
        """What an export says of the style's images; in `events.jsonl`, so that it needs neither images nor plan."""
        style = style_of(self.examples)
        counts = Counter((e.source.name, e.item.repeats, e.source.captions.trigger) for e in style)
        return {
            "folders": [[name, images, repeats, trigger] for (name, repeats, trigger), images in counts.items()],
            "buckets": [[width, height, images] for (width, height), images in bucket_counts(self.examples).items()],
            "tag_frequency": tag_frequency(style),
        }

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
        rules = bucket_rules(self.config, self.base)
        enlarged = [e for e in self.examples if max(f.enlargement for f in _fits(e, rules)) > _MUCH_ENLARGED]
        if enlarged:
            yield f"{_images(len(enlarged))} will be soft, enlarged over {_MUCH_ENLARGED} times: {_names(enlarged)}."
        yield from self._warnings_of_crops()
        if self.images < len(self.order.entries):
            yield f"the budget of {self.images} images is too small to show each of the {len(self.order.entries)} once."
        yield from self._warnings_of_twins()
        named = [example for example in self.examples if example.item.source == "folder name"]
        if named:
            yield f"{_images(len(named))} have no caption but their folder's name: {_names(named)}."
        braced = [e for e in self.examples if not e.source.captions.wildcards and any(map(has_wildcard, e.captions))]
        if braced:
            yield (
                f"the captions of {_images(len(braced))} hold wildcards such as {{a|b}}, which are read as they are: "
                f"{_names(braced)}. Set data.wildcards = true if one of the parts is meant."
            )
        if self.config.adapter.kind == "full":
            yield from self._warnings_of_full()
        else:
            yield from unread_by(FORM_OF[self.config.adapter.kind])
        yield from warnings_of(self.config)
        if self.config.runtime.cuda_graphs:
            yield "runtime.cuda_graphs has not been tried on a GPU yet, and the graphs' memory is not in the estimate."
        if self.config.runtime.precision == "bf16":
            yield from _warnings_of_bf16()
        if self.config.runtime.compile and self.steps < REPAYS_AFTER:
            told = "runtime.compile takes a minute or more before the first step"
            yield f"{told}, which {self.steps} steps seldom win back. Set it to false."
        if self.base.zero_terminal_snr and "min-snr" in self.config.objective.weighting:
            weighting = self.config.objective.weighting
            yield f'{weighting} gives the last time-step, pure noise, no weight. Set objective.weighting = "none".'
        yield from self.base.assumptions
        if self.base.prediction != self.prediction_of_base and self.base.prediction_stated:
            yield f"objective.prediction is {self.base.prediction}, but the base says {self.prediction_of_base}."

    def _warnings_of_crops(self) -> Iterator[str]:
        """Images that lose much of themselves, with the setting that would keep most of them."""
        most, rules = self.config.buckets.max_crop, bucket_rules(self.config, self.base)
        cropped = [example for example in self.examples if _lost_under(example, rules) > most]
        if not cropped:
            return
        whose = "loses over {:.0%} of its" if len(cropped) == 1 else "lose over {:.0%} of their"
        told = f"{_images(len(cropped))} {whose.format(most)} area to the crop: {_names(cropped)}."
        now = sum(_lost_under(example, rules) for example in cropped)
        choices = {
            f"buckets.max_ratio = {_WIDEST:g}": replace(rules, max_ratio=_WIDEST),
            f"buckets.step = {self.base.bucket_step}": replace(rules, step=self.base.bucket_step),
        }
        lost = {setting: sum(_lost_under(example, other) for example in cropped) for setting, other in choices.items()}
        best = min(lost, key=lambda setting: lost[setting])
        if lost[best] < 0.8 * now:
            told += f" With {best} {lost[best] / len(cropped):.0%} would be lost, not {now / len(cropped):.0%}."
        else:
            told += " Cut them yourself, to keep what matters."
        yield told

    def _warnings_of_full(self) -> Iterator[str]:
        rate = max(self.config.optimizer.lr, self.config.optimizer.text_encoder_lr)
        if rate >= _HIGH_RATE_OF_FULL:
            yield f"a learning rate of {rate:g} is high for full fine-tuning: 1e-5 is usual, half for text encoders."
        if self.config.save.keep == "all":
            yield "each checkpoint holds the trained weights three times over; save.keep = 2 saves disk space."

    def _warnings_of_twins(self) -> Iterator[str]:
        """Files that are there more than once: an oversight, or one picture with several captions."""
        first: dict[str, Example] = {}
        twins = [(e, f) for e in self.examples if (f := first.setdefault(e.item.sha256, e)) is not e]
        if len(twins) > _TWINS_NAMED:
            names = _names([example for example, _ in twins])
            yield f"{_images(len(twins))} are the same files as others, and count again: {names}."
            return
        for example, original in twins:
            yield f"{example.name} is the same file as {original.name}; it counts twice."


def make_plan(config: RunConfig, progress: Progress | None = None, afresh: bool = True) -> Plan:
    """Look at everything a run needs, and load no weights; one that goes on needs not what it started from.

    Raises:
        UserError: with every problem that was found, each with its place and its fix.
    """
    problems: list[Problem] = []
    base = _collect(problems, lambda: base_of(config))
    _collect(problems, lambda: check_devices(config))
    _collect(problems, lambda: check_compiler(config))
    _collect(problems, lambda: check_folders(config))
    _collect(problems, lambda: check_optimizer(config))
    _collect(problems, lambda: check_resolutions(config, base))
    _collect(problems, lambda: check_buckets(config, base))
    sources = [source for data in config.data if (source := _collect(problems, partial(source_of, data, config, base)))]
    rules = bucket_rules(config, base)
    found = _collect(problems, lambda: load_examples(sources, rules, config.seed, progress))
    examples, held_out = hold_out(found or [], config.validation)
    if config.preference.start:
        _collect(problems, lambda: check_start(config))
        examples = in_order(examples)
        _collect(problems, lambda: Rated.of(examples))
    trained = _collect(problems, lambda: as_trained(base, config) if base else None)
    foreseen = _collect(problems, lambda: _foreseen(trained, config, afresh) if trained else None)
    if problems or base is None or trained is None or found is None or foreseen is None:
        raise UserError.of(problems)
    return Plan(
        config=_completed(config, base, examples),
        base=trained,
        examples=examples,
        prediction_of_base=base.prediction,
        parts=foreseen[0],
        fast_share=foreseen[1],
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        held_out=held_out,
    )


def base_of(config: RunConfig) -> BaseInfo:
    """The base that a configuration names, as it is found."""
    return inspect_base(config.base.model, config.base.vae, config.base.merge)


def _foreseen(info: BaseInfo, config: RunConfig, afresh: bool) -> tuple[list[Part], float]:
    """What is trained, and the share of the adapter's layers that can compute the fast way."""
    from .anatomy import foreseen_base  # brings torch, which the browser app's start must not wait for
    from .fitting import parts
    from .techniques import fast_share

    base = foreseen_base(info, config, afresh)
    check_attention(config, base.unet)
    return parts(base, config), fast_share(base)


def as_trained(base: BaseInfo, config: RunConfig) -> BaseInfo:
    """The base with the prediction type and the end of the noise that were asked for.

    Raises:
        ConfigError: if noise would end in zero SNR where the UNet predicts epsilon: pure noise is all it would see.
    """
    asked = config.objective
    prediction = base.prediction if asked.prediction == "auto" else asked.prediction
    zero = base.zero_terminal_snr if asked.zero_terminal_snr == "auto" else asked.zero_terminal_snr == "on"
    if zero and prediction == "epsilon":
        what = "the noise ends in zero SNR, from which a UNet that predicts epsilon cannot learn"
        fix = 'Set objective.zero_terminal_snr = "off", or objective.prediction = "v_prediction".'
        raise ConfigError(what, "objective.zero_terminal_snr", fix)
    settled = [f"objective.{key} =" for key in ("prediction", "zero_terminal_snr") if getattr(asked, key) != "auto"]
    assumptions = tuple(told for told in base.assumptions if not any(setting in told for setting in settled))
    return replace(base, prediction=prediction, zero_terminal_snr=zero, assumptions=assumptions)


def _completed(config: RunConfig, base: BaseInfo, examples: list[Example]) -> RunConfig:
    """The configuration with absolute paths and preview prompts, so that it means the same from anywhere and later on:
    what a recipe or a name on the Hub stands for may change."""
    config = config.model_copy(deep=True)
    config.runs = str(Path(config.runs).expanduser().absolute())
    config.recipe = ""
    config.optimizer = with_own_betas(config.optimizer)
    for data in config.data:
        data.path = pinned(anchored(data.path, Path.cwd()), cache_of(config))
    config.base.model, config.base.vae = anchored_base(config.base.model), anchored_base(config.base.vae)
    config.base.merge = [f"{file}:{strength!r}" for file, strength in base.merges]
    if config.adapter.start_from:
        config.adapter.start_from = str(Path(config.adapter.start_from).expanduser().absolute())
    if config.preference.start:
        config.preference.start = str(Path(config.preference.start).expanduser().absolute())
    if config.runtime.cache:
        config.runtime.cache = str(Path(config.runtime.cache).expanduser().absolute())
    if config.sample.every and not config.sample.prompts:
        config.sample.prompts = prompts_from(examples)
    return config


def style_of(examples: list[Example]) -> list[Example]:
    """All but the regularisation images."""
    return [example for example in examples if not example.source.regularization]


def prompts_from(examples: list[Example]) -> list[str]:
    """A few different captions of the style, spread evenly over the examples."""
    captions = list(dict.fromkeys(example.caption for example in style_of(examples) if example.caption)) or [""]
    stride = max(1, len(captions) // PREVIEWS_BY_DEFAULT)
    return captions[::stride][:PREVIEWS_BY_DEFAULT]


def check_devices(config: RunConfig) -> None:
    """Settings that this computer cannot honour.

    Raises:
        ConfigError: without an NVIDIA GPU, what needs one; on a CPU, what takes the place of something faster; CUDA
            graphs where no step can be one; weights in 4 bits without what makes them.
    """
    runtime = config.runtime
    if runtime.channels_last:
        _check_order()
    if runtime.cuda_graphs:
        _check_graphs(config)
    if runtime.base_weights == "nf4":
        from .device import kind_here
        from .fewbits import check_nf4

        check_nf4(kind_here())
    asked = {"attention": runtime.attention, "precision": runtime.precision}
    if not set(asked.values()) & _NEED_A_GPU:
        return
    import torch

    for setting, value in asked.items():
        if value in _NEED_A_GPU and not torch.cuda.is_available():
            what = f"{value} needs an NVIDIA GPU, and this computer has none"
            raise ConfigError(what, f"runtime.{setting}", f'Set runtime.{setting} = "auto".')


def _check_order() -> None:
    from .device import kind_here

    if kind_here() == "cpu":
        what = "may pay on a GPU; on a CPU runtime.cpu_kernels, whose place it would take, gains more"
        raise ConfigError(what, "runtime.channels_last", "Set runtime.channels_last = false.")


def _warnings_of_bf16() -> Iterator[str]:
    from .device import has_bf16_on_cpu, kind_here

    if kind_here() == "cpu" and not has_bf16_on_cpu():
        told = 'runtime.precision is "bf16", for which this computer\'s processor has no instructions'
        yield f'{told}: a step takes many times as long as in fp32. Set it to "auto" or "fp32".'


_NEED_A_GPU = {"xformers", "cudnn", "efficient", "fp16"}


def _check_graphs(config: RunConfig) -> None:
    """What a configuration that knows no computer cannot tell of them."""
    import torch

    from .precision import mixed_precision

    where, off = "runtime.cuda_graphs", "Set runtime.cuda_graphs = false"
    if not torch.cuda.is_available():
        raise ConfigError("needs an NVIDIA GPU, and this computer has none", where, f"{off}.")
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"is for one process, and {processes} train together", where, f"{off}, or start one.")
    if mixed_precision(config.runtime.precision) == "fp16":
        what = "cannot be had in fp16, which this GPU computes in: its gradients are looked at in each step"
        raise ConfigError(what, where, f'{off}, or runtime.precision = "fp32".')


def check_attention(config: RunConfig, unet: Any) -> None:
    """A kernel that was asked for is tried on the heads of this UNet, which may be of shapes alone.

    Raises:
        ConfigError: if it cannot run.
    """
    name = config.runtime.attention
    if name in ("auto", "sdpa"):
        return
    import torch

    from .attention import refuse_unfit
    from .device import kind_here
    from .precision import DTYPES, mixed_precision

    if name not in _NEED_A_GPU or torch.cuda.is_available():  # else `check_devices` tells
        refuse_unfit(name, unet, DTYPES[mixed_precision(config.runtime.precision)], torch.device(kind_here()))


def check_folders(config: RunConfig) -> None:
    """What the run writes must not lie among the images it reads, and the cache must be writable.

    Raises:
        ConfigError: naming the setting.
    """
    written = {"runs": Path(config.runs).expanduser().resolve() / config.name}
    cache = cache_of(config).resolve()
    if config.runtime.cache:
        written["runtime.cache"] = cache
    if reason := writable(cache / "latents"):
        raise ConfigError(reason, "runtime.cache", "Set it to a folder you may write to.")
    for setting, folder in written.items():
        for data in config.data:
            images = local_folder(data.path)
            if images and folder.is_relative_to(images):
                what = f"{folder} lies inside the dataset folder {data.path}"
                raise ConfigError(what, setting, "Choose a folder outside of it.")


def check_resolutions(config: RunConfig, base: BaseInfo | None) -> None:
    """No bucket can be smaller than the base's smallest step.

    Raises:
        ConfigError: naming the data table.
    """
    for number, data in enumerate(config.data):
        smallest = min(data.resolutions, default=0)
        if base and 0 < smallest < base.bucket_step:
            what = f"{smallest} px is less than the {base.bucket_step} px this base works in"
            raise ConfigError(what, f"data.{number}.resolution", f"Leave it 0 for the base's {base.resolution} px.")


def check_buckets(config: RunConfig, base: BaseInfo | None) -> None:
    """Bucket settings that this base, or one another, rule out.

    Raises:
        ConfigError: naming the setting.
    """
    given = config.buckets
    if base and given.step % base.bucket_step:
        what = f"{given.step} is no multiple of the {base.bucket_step} px this base works in"
        raise ConfigError(what, "buckets.step", f"Leave it 0, or take {base.bucket_step} or a multiple of it.")
    step = bucket_rules(config, base).step
    for data in config.data:
        for side in data.resolutions or ([base.resolution] if base else []):
            if given.max_edge and given.max_edge < max(step, side // step * step):
                what = f"is less than the side of the square of {side} px"
                raise ConfigError(what, "buckets.max_edge", "Raise it, or lower data.resolution.")
            if given.min_edge > max(step, side // step * step):
                what = f"is more than the side of the square of {side} px"
                raise ConfigError(what, "buckets.min_edge", "Lower it, or raise data.resolution.")


def bucket_rules(config: RunConfig, base: BaseInfo | None) -> BucketRules:
    given = config.buckets
    step = given.step or (base.bucket_step if base else 64)
    return BucketRules(step, given.min_edge, given.max_edge, given.max_ratio, given.upscale)


def source_of(data: DataSection, config: RunConfig, base: BaseInfo | None) -> Source:
    """A `[[data]]` table as the data loader takes it; what is no folder is unpacked into the cache first."""
    return Source(
        path=as_folder(data.path, cache_of(config)),
        label=display_name(data.path),
        resolutions=tuple(data.resolutions or [base.resolution if base else 512]),
        captions=CaptionRules(
            trigger=data.trigger,
            prefix=data.caption_prefix,
            suffix=data.caption_suffix,
            separator=data.caption_separator,
            shuffle=data.shuffle_caption,
            keep_tokens=data.keep_tokens,
            keep_tokens_separator=data.keep_tokens_separator,
            tag_dropout=data.caption_tag_dropout,
            wildcards=data.wildcards,
            variants=data.caption_variants,
        ),
        weight=data.weight,
        machine_weight=data.machine_weight,
        caption_dropout=data.caption_dropout,
        machine_caption_dropout=data.machine_caption_dropout,
        lines=data.caption_lines,
        mask=data.mask,
        unmasked_weight=data.unmasked_weight,
        regularization=data.regularization,
        loss_weight=data.prior_loss_weight if data.regularization else 1.0,
        augmentation=Augmentation(data.flip, data.crop, data.crop_jitter, data.colour_jitter, data.augmentations),
    )


def cache_of(config: RunConfig) -> Path:
    return Path(config.runtime.cache).expanduser() if config.runtime.cache else user_cache()


def _collect(problems: list[Problem], check: Callable[[], T]) -> T | None:
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
    if source == "folder name":
        return source
    table = source.partition(" line ")[0]
    return table if table in METADATA else "*" + Path(source).suffix


def _fits(example: Example, rules: BucketRules) -> list[Fit]:
    """How an image is brought to its bucket at each resolution, before anything random is done to it."""
    return [fit(*example.fit.original, resolution, rules) for resolution in example.source.resolutions]


def _lost_under(example: Example, rules: BucketRules) -> float:
    """The share of an image that buckets crop, at the resolution at which it is most."""
    return max(found.cropped_share for found in _fits(example, rules))


def _placement(example: Example) -> dict[str, Any]:
    """Which image goes where, for machines."""
    sizes = sorted(set(example.entry.buckets))
    return {
        "image": example.name,
        "buckets": [f"{width}x{height}" for width, height in sizes],
        "cropped_share": round(example.fit.cropped_share, 4),
        "enlarged": round(example.fit.enlargement, 3),
        "shows": example.entry.shows,
        "views": len(example.views),
        "captions": len(example.captions),
    }


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _names(examples: list[Example], limit: int = 3) -> str:
    shown = ", ".join(example.name for example in examples[:limit])
    return shown if len(examples) <= limit else f"{shown} and {len(examples) - limit} more"
