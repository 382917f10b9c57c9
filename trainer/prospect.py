"""What a plan needs and how it is carried out: memory, time, what is switched on; in words and as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .device import Device, binary, card, device_here
from .errors import ConfigError, UserError
from .estimate import Pace, pace_of
from .events import Event
from .fit import Fit, cheapest_fit
from .footprint import Footprint, Stage, footprint, precision_on
from .jobs import find_runs
from .plan import Plan
from .probe import STEPS, Probed, probe
from .status import duration
from .story import Story
from .techniques import Technique, techniques

_SMALL = 0.005
"""Items below this share of a stage are told together."""


@dataclass(frozen=True)
class Prospect:
    """A plan with what it needs of a device."""

    plan: Plan
    device: Device
    memory: Footprint
    fit: Fit | None
    """None: no settings fit."""
    refusal: UserError | None
    """Why none does."""
    pace: Pace | None
    """None: nothing like it was trained here yet, or it is planned for another device."""
    probed: Probed | None

    @property
    def fits(self) -> bool:
        return self.fit is not None and not self.fit.changes

    @property
    def seconds(self) -> float | None:
        """Of the whole run, as earlier runs or the probe tell it."""
        if self.pace:
            return self.pace.seconds(self.plan.steps, self.plan.config)
        return self.probed.seconds(self.plan) if self.probed else None

    @property
    def techniques(self) -> list[Technique]:
        config = self.plan.config
        precision = precision_on(self.device, config)
        return list(techniques(config, self.device.is_gpu, precision, self.plan.fast_share))

    def facts(self) -> dict[str, Any]:
        """For machines; beside the plan's own."""
        return {
            "device": {"kind": self.device.kind, "name": self.device.name, "room_bytes": self.device.room},
            "memory": self.memory.facts(),
            "fits": self.fits,
            "fit": self.fit.facts() if self.fit else None,
            "techniques": [technique.facts() for technique in self.techniques],
            "seconds": self.seconds and round(self.seconds),
            "probe": self.probed.facts(self.plan) if self.probed else None,
        }

    # -- in words -----------------------------------------------------------------------------------------------------

    def lines(self) -> Iterator[str]:
        most = max(self.memory.stages, key=lambda stage: stage.size)
        room = f"{binary(self.device.room)} of {self.device.memory}"
        free = "" if not self.device.is_here else " are free"
        yield f"memory: about {binary(self.memory.peak)} at its peak, {most.name}; {room}{free or ' in all'}"
        for stage in self.memory.stages:
            yield f"  {stage.name}: {binary(stage.size)} = {_made_of(stage)}"
        yield from self._lines_of_fit()
        yield f"time: {self._time}"
        if self.probed:
            yield f"probe: {self._probe(self.probed)}"
        yield "techniques:"
        for technique in self.techniques:
            yield f"  {'on ' if technique.is_on else 'off'} {technique.name}: {technique.why}"

    def _lines_of_fit(self) -> Iterator[str]:
        if self.fits:
            yield "fit: as it is"
        elif self.fit:
            yield f"fit: with these settings it takes about {binary(self.fit.footprint.peak)}"
            for change in self.fit.changes:
                yield f"  {change.setting} = {change.override.partition('=')[2]}: {change.why}"
            yield f"  {' '.join(f'--set {change.override}' for change in self.fit.changes)}"
            yield from (f"  {line}" for line in self.fit.toml.splitlines())
        elif self.refusal:
            yield f"fit: {self.refusal}"

    @property
    def _time(self) -> str:
        if self.seconds is None:
            how = "" if not self.device.is_here else "; --probe tries a few steps"
            return f"not known, for nothing like it was trained here yet{how}"
        if self.pace:
            return f"about {duration(self.seconds)}, as {self.pace.source}"
        return f"at most about {duration(self.seconds)} without previews, as the probe tells"

    def _probe(self, probed: Probed) -> str:
        largest, training = probed.largest, probed.training
        batch = f"{largest.images} x {largest.width}x{largest.height}"
        took = "" if training is None else f", {binary(training)} in training"
        of = f"the median of {STEPS} steps of {batch}"
        return f"{probed.batch_seconds:.3g} s, {of}; at its peak {binary(probed.peak)}{took}"


def prospect(plan: Plan, vram: float | None, probes: bool, tell: Callable[[Event], None]) -> Prospect:
    """What a plan needs of this computer, or of a card with so many GB.

    Raises:
        UserError: if it is planned for a card, and no settings fit into it.
        ConfigError: if a card that is not here is to be probed.
    """
    if vram is not None and probes:
        raise ConfigError("measures this computer, and --vram plans for another card", "--probe", "Leave one out.")
    device = device_here() if vram is None else card(vram)
    pace = pace_of(plan.facts(), plan.config, _stories(plan)) if device.is_here else None
    memory, refusal, fit = footprint(plan, device), None, None
    try:
        fit = cheapest_fit(plan, device, memory)
    except UserError as error:
        if not device.is_here:
            raise
        refusal = error
    return Prospect(plan, device, memory, fit, refusal, pace, probe(plan, tell) if probes else None)


def _stories(plan: Plan) -> list[Story]:
    """What happened in the runs beside it."""
    found = [Story(run.events) for run in find_runs(Path(plan.config.runs))]
    for story in found:
        story.refresh()
    return found


def _made_of(stage: Stage) -> str:
    """Its items, the largest first; tiny ones together."""
    large = [item for item in stage.items if item.size >= _SMALL * stage.size]
    told = [f"{item.name} {binary(item.size)} ({item.why})" for item in sorted(large, key=lambda one: -one.size)]
    if small := sum(item.size for item in stage.items) - sum(item.size for item in large):
        told.append(f"all else {binary(small)}")
    return " + ".join(told)
