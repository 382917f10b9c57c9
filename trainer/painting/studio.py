"""A base in memory and what is on it: draws the pictures of orders, and loads again only what another order needs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from ..adapter import load_adapter_state, strength
from ..anatomy import skeleton
from ..bases import BaseInfo, inspect_base
from ..checkpoint import open_adapter
from ..config import BaseSection, RunConfig
from ..delta import Changes
from ..errors import RunError, UserError
from ..files import write_text
from ..jobs import RunFolder, open_run
from ..loraread import merged, read_lora
from ..models import Base, load_base
from ..plan import as_trained, base_of
from ..precision import DTYPES, mixed_precision
from ..run import base_to_load
from ..sample import Drawing, draw, save_picture
from ..strengths import Strengths
from .orders import Cell, Order, PictureOrder, checkpoint_trace, saved_base, write_order


@dataclass(frozen=True)
class _Wanted:
    """What has to be in memory for an order, apart from its checkpoints."""

    info: BaseInfo
    identity: str
    run: RunFolder | None = None
    config: RunConfig | None = None
    """The run's, with the base that was asked for."""


class Studio:
    """Draws; use it from one thread."""

    def __init__(self) -> None:
        self._wanted: _Wanted | None = None
        self._base: Base | None = None
        self._checkpoint: list[int] = []
        """The step that is on the base, and what tells it from another of that step."""

    def prepare(self, order: Order) -> None:
        """Have the base of an order in memory.

        Raises:
            UserError: if it is not there, or the run was trained on another.
        """
        wanted = _wanted(order)
        size = order.look.size
        if size % wanted.info.bucket_step:
            what = f"{size} pixels do not divide by {wanted.info.bucket_step}, as this base needs"
            raise UserError(what, "size", f"Take {size // wanted.info.bucket_step * wanted.info.bucket_step} pixels.")
        if wanted != self._wanted:
            self.clear()
            self._base = _load(wanted)
            self._wanted = wanted

    @property
    def vae(self) -> AutoencoderKL:
        """That of the base in memory."""
        assert self._base is not None, "prepare comes first"
        return self._base.vae

    def clear(self) -> None:
        """Give the memory back."""
        self._wanted, self._base, self._checkpoint = None, None, []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def draw(
        self,
        order: Order,
        files: Mapping[Cell, Path],
        drawn: Callable[[], None] = lambda: None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Draw what is missing of an order's pictures, one by one: a picture does not depend on what is drawn beside
        it, and is there as soon as it is done. What `drawn` or `after_step` raises ends the drawing.

        Raises:
            UserError: if a checkpoint or a LoRA is damaged, or does not fit.
        """
        self.prepare(order)
        base = self._base
        assert base is not None
        look, size = order.look, order.look.size or base.info.resolution
        missing = [cell for cell, file in files.items() if not file.is_file()]
        for (step, at), cells in groupby(missing, lambda cell: (cell.step, cell.strength)):
            with self._acting(base, order, step, at) as lora:
                for cell in cells:
                    drawing = Drawing(look.negative_prompt, cell.seed, look.steps, look.guidance, size, look.sampler)
                    [picture] = draw(base, [cell.prompt], drawing, after_step)
                    _write_settings(order, cell, files[cell])
                    save_picture(files[cell], picture, cell.prompt, drawing, base.info.short_name, lora)
                    drawn()

    @contextmanager
    def acting(self, run: RunFolder, step: int, strengths: Strengths) -> Iterator[Base]:
        """Within the block one of the run's checkpoints acts, at strengths by block, on the base that is in memory."""
        assert self._base is not None, "prepare comes first"
        self._put_on(self._base, run, step)
        with strength(self._base, strengths):
            yield self._base

    @contextmanager
    def _acting(self, base: Base, order: Order, step: int, at: float) -> Iterator[str]:
        """Within the block a checkpoint and the LoRAs act; gives what they are called in a picture's text."""
        with ExitStack() as stack:
            names = []
            if order.run:
                run = RunFolder(Path(order.run))
                if at:
                    self._put_on(base, run, step)
                    names.append(f"{run.name} step {step} at {at:g}")
                stack.enter_context(strength(base, at))
            for path, own in order.loras:
                if own:
                    stack.enter_context(merged(base.components, _read(Path(path), base.info), own))
                    names.append(f"{Path(path).stem} at {own:g}")
            yield ", ".join(names)

    def _put_on(self, base: Base, run: RunFolder, step: int) -> None:
        wanted = [step, *checkpoint_trace(run, step)]
        if wanted != self._checkpoint:
            self._checkpoint = []  # if it fails, the base holds neither
            file = open_adapter(run.checkpoint(step))
            load_adapter_state(base, {name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
            self._checkpoint = wanted


def _wanted(order: Order) -> _Wanted:
    if not order.run:
        info = inspect_base(order.base)
        return _Wanted(info, info.identity)
    run = open_run(Path(order.run))
    config = run.read_config()
    if order.base:
        config.base = BaseSection(model=order.base, merge=config.base.merge)
    info = as_trained(base_of(config), config)
    identity = info.identity
    if not order.base and identity != saved_base(run, run.saved_steps()[-1]):
        what = "the base model has changed since the run was saved, so the pictures would be another's"
        raise RunError(what, str(run.path), "Put the base back as it was.")
    return _Wanted(info, identity, run, config)


def _load(wanted: _Wanted) -> Base:
    if not wanted.run or not wanted.config:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_base(wanted.info, DTYPES[mixed_precision("auto")], device)
    saved = saved_base(wanted.run, wanted.run.saved_steps()[-1])
    try:
        return base_to_load(wanted.run, wanted.config, saved)
    except RunError as error:
        what = f"what {wanted.run.name} trained means something on its own base only, not on {wanted.info.short_name}"
        raise RunError(what, "base", "Leave the base as the run's.") from error


def _read(file: Path, info: BaseInfo) -> Changes:
    """The changes of a LoRA file; adapters that are on the base must not stand in the way of their names."""
    return read_lora(file, skeleton(info).components, info.family)


def _write_settings(order: Order, cell: Cell, file: Path) -> None:
    """Of a single picture all settings, beside it, so that they can be taken up again."""
    if isinstance(order, PictureOrder):
        own = replace(order, prompts=(cell.prompt,), seeds=(cell.seed,))
        write_text(file.with_suffix(".json"), write_order(own) + "\n")
