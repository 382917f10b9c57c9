"""What is read of a run for its report. Nothing of it needs torch, the base or the network."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...datasets.dataset import Example, load_examples
from ...datasets.unpack import HUB, local_folder
from ..config import RunConfig
from ..errors import DataError
from ..jobs import VERIFIED, RunFolder
from ..jsonfile import read_json
from ..plan import bucket_rules, source_of
from ..status import Status
from ..story import Story
from .words import Words


@dataclass(frozen=True)
class RunFacts:
    """A run as it stands."""

    run: RunFolder
    config: RunConfig
    story: Story
    status: Status
    say: Words

    @classmethod
    def of(cls, run: RunFolder, shows_paths: bool) -> RunFacts:
        """
        Raises:
            ConfigError: if the run's configuration cannot be read.
        """
        config, story = run.read_config(), Story(run.events)
        return cls(run, config, story, run.status(story), Words.of(run, config, shows_paths))

    @property
    def plan(self) -> dict[str, Any]:
        """What was told of the plan when the run started last; empty before."""
        return self.story.plan.plan if self.story.plan else {}

    @cached_property
    def images(self) -> Images:
        return read_images(self.config)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What the newest checkpoint says of itself; empty without one."""
        saved = self.run.saved_steps()
        found = _read(self.run.checkpoint(saved[-1]) / "state.json") if saved else None
        return found if isinstance(found, dict) else {}

    @cached_property
    def processes(self) -> int:
        """That trained together."""
        saved = self.run.saved_steps()
        origin = _read(self.run.checkpoint(saved[-1]) / "origin.json") if saved else None
        with suppress(TypeError, KeyError, ValueError):
            return int(origin["settings"]["processes"])  # pyright: ignore[reportOptionalSubscript]
        return 1

    @cached_property
    def verified(self) -> list[dict[str, Any]]:
        """What was found of each exported file when it was written: its hashes, and what each client makes of it."""
        reports = [_read(file) for file in sorted(self.run.exports.glob(f"*{VERIFIED}"))]
        files = [report.get("files") for report in reports if isinstance(report, dict)]
        return [one for each in files if isinstance(each, list) for one in each if isinstance(one, dict)]


@dataclass(frozen=True)
class Images:
    """The training images, where they can still be read."""

    examples: tuple[Example, ...] = ()
    lost: str = ""
    """Why there are none."""


def read_images(config: RunConfig) -> Images:
    """The images as they are now; those of the Hub are not fetched for this."""
    if any(data.path.startswith(HUB) and local_folder(data.path) is None for data in config.data):
        return Images(lost="they are on the Hub, from where a report fetches nothing")
    try:
        sources = [source_of(data, config, None) for data in config.data]
        return Images(tuple(load_examples(sources, bucket_rules(config, None), config.seed)))
    except DataError as error:
        return Images(lost="; ".join(f"{problem.where}: {problem.what}" for problem in error.problems[:3]))


def _read(file: Path) -> Any:
    """None for a file that is not there, or damaged."""
    with suppress(OSError, ValueError):
        return read_json(file)
    return None
