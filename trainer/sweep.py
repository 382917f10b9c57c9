"""Sweeps: one configuration, with some of its settings at several values, and a run of each combination.

A grid is a TOML file:

    [sweep]
    config = "ink.toml"             # what all of its runs share
    name = "{base}-r{adapter.rank}-{optimizer.lr}"    # need not be given

    [grid]                          # every value with every other one
    "adapter.rank" = [8, 16]
    "optimizer.lr" = [1e-4, 2e-4]

    [[variant]]                     # values that belong together, each table with the whole grid
    "adapter.kind" = "lora"

    [[variant]]
    "adapter.kind" = "dora"
    "optimizer.text_encoder_lr" = 2e-5

What runs when, and where, is left to this computer's queue (`queue.py`) or to Ray.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import tomlkit
from pydantic import Field, ValidationError

from ..datasets.workers import Progress
from .config import RunConfig, Section
from .configfile import overridden, read_config, read_toml
from .errors import ConfigError, LorasmithError, Problem, UserError, first_line
from .estimate import amount, disk_of, free_bytes, pace_of
from .jobs import RunFolder, check_name_is_free, create_run, find_runs
from .owner import ProcessId, read_process
from .plan import Plan, make_plan
from .queue import Queue, begin, go_on
from .status import Status
from .story import Story

Told = TypeVar("Told", Problem, str)

LARGEST = 500
"""Runs of one sweep. Each is planned before the first begins, and nobody looks at more."""
_OWN = ("name", "runs")
"""Settings that cannot vary: a name is made of what does, and one folder holds all runs."""


class SweepSection(Section):
    """What is swept over."""

    config: str = Field(min_length=1)
    """The configuration that all runs share. A relative path counts from the folder of the grid."""
    name: str = ""
    """What the runs are called, as in "{base}-r{adapter.rank}": {base} is the name in the configuration, the others are
    settings that vary. Empty: the name with each of them."""


class GridFile(Section):
    """The file."""

    sweep: SweepSection
    grid: dict[str, Any] = Field(default_factory=dict)
    """Settings by dotted path, each with a list of values."""
    variant: list[dict[str, Any]] = Field(default_factory=list)
    """Settings by dotted path, each with a value."""


@dataclass(frozen=True)
class Variant:
    """One combination."""

    name: str
    values: Mapping[str, Any]
    """What varies, by dotted path; a setting that is not among them is as in the configuration."""

    @property
    def overrides(self) -> list[str]:
        """As `--set` takes them."""
        return [f"{setting}={tomlkit.item(value).as_string()}" for setting, value in self.values.items()]


@dataclass(frozen=True)
class Sweep:
    """All combinations of a grid."""

    file: Path
    config: Path
    overrides: tuple[str, ...]
    """Those of `--set`, for all runs."""
    runs: Path
    """The folder that holds the runs."""
    varies: tuple[str, ...]
    variants: tuple[Variant, ...]

    def config_of(self, variant: Variant) -> RunConfig:
        """
        Raises:
            ConfigError: with every problem of this combination, each at the place that gave the value.
        """
        try:
            return read_config(self.config, [*self.overrides, f"name={variant.name}", *variant.overrides])
        except ConfigError as error:
            raise ConfigError.of(map(self._placed, error.problems)) from error

    def run_of(self, variant: Variant) -> RunFolder:
        """Its folder, which need not be there."""
        return RunFolder(self.runs / variant.name)

    def is_there(self, variant: Variant) -> bool:
        return self.run_of(variant).config.is_file()

    def _placed(self, problem: Problem) -> Problem:
        """What is said of `--set` is the grid's, where the grid gave the value."""
        given = problem.where.removeprefix("--set ").partition("=")[0]
        if given == problem.where:
            return problem
        if given == "name":
            return replace(problem, where=f"{self.file.name}: sweep.name")
        setting = f"{_without_numbers(given)}."
        varies = any(setting.startswith(f"{_without_numbers(varied)}.") for varied in self.varies)
        return replace(problem, where=f"{self.file.name}: {given}") if varies else problem


# ---------------------------------------------------------------------------------------------------------------------
# the grid


def read_sweep(file: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a grid, and call each of its combinations by a name; `overrides` are for all of them.

    Raises:
        ConfigError: with every problem of the grid at once.
    """
    given = _read_grid(file)
    config = file.parent / Path(given.sweep.config).expanduser()
    base = overridden(read_toml(config), overrides)
    grid, rows = dict(_flat(given.grid)), [dict(_flat(row)) for row in given.variant]
    varies = tuple(dict.fromkeys([*(setting for row in rows for setting in row), *grid]))

    problems = [*_problems_of_grid(grid), *_problems_of_rows(rows, grid), *_problems_of_settings(varies, overrides)]
    problems += _problems_of_template(given.sweep.name, varies)
    if not isinstance(base.get("name"), str):
        problems.append(Problem("name", f"is missing in {config.name}", 'Add a line such as: name = "my-style"'))
    if not problems and (size := max(1, len(rows)) * math.prod(map(len, grid.values()))) > LARGEST:
        problems.append(Problem("", f"makes {size:,} runs, and {LARGEST} are the most", "Vary less at once."))
    if problems:
        raise ConfigError.of(_in_file(problem, file) for problem in problems)

    points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    combined = [row | point for row in rows or [{}] for point in points]
    named = _Names(given.sweep.name, base["name"], varies)
    variants = tuple(Variant(named(values), values) for values in combined)
    _refuse_twins(variants, file)
    runs = Path(str(base.get("runs", "runs"))).expanduser().absolute()
    return Sweep(file, config, tuple(overrides), runs, varies, variants)


def _read_grid(file: Path) -> GridFile:
    if not file.exists():
        fix = 'Write one: config = "FILE" under [sweep], and lists of values under [grid].'
        raise ConfigError("no such file", str(file), fix)
    try:
        return GridFile.model_validate(read_toml(file))
    except ValidationError as error:
        raise ConfigError.of(_in_file(_explained(detail), file) for detail in error.errors()) from None


def _explained(detail: Any) -> Problem:
    """One pydantic error in words."""
    path = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        known = SweepSection if detail["loc"][0] == "sweep" else GridFile
        return Problem(path, "unknown key", f"Known here: {', '.join(known.model_fields)}.")
    if detail["type"] == "missing":
        return Problem(path, "is missing", 'The grid begins with [sweep] and config = "FILE".')
    return Problem(path, detail["msg"].replace("Input should be", "should be"), "")


def _in_file(problem: Problem, file: Path) -> Problem:
    if problem.where.startswith("--set "):
        return problem
    return replace(problem, where=f"{file.name}: {problem.where}" if problem.where else str(file))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted path, also where they were not put in quotes, so that TOML made tables of them."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _problems_of_grid(grid: Mapping[str, Any]) -> Iterator[Problem]:
    for setting, values in grid.items():
        if not isinstance(values, list):
            yield Problem(setting, f"is no list of values (it is {values!r})", 'As in: "adapter.rank" = [8, 16]')
        elif len(values) < 2:
            what = "has one value, so it does not vary" if values else "has no value"
            yield Problem(setting, what, "Give it another one, or set it in the configuration.")
        else:
            yield from (Problem(setting, *told) for value in values if (told := _no_value(value)))
            twice = [value for place, value in enumerate(values) if value in values[:place]]
            if twice:
                yield Problem(setting, f"has the value {twice[0]!r} twice", "Two runs would be the same.")


def _problems_of_rows(rows: Sequence[Mapping[str, Any]], grid: Mapping[str, Any]) -> Iterator[Problem]:
    if not rows and not grid:
        yield Problem("", "lets nothing vary", 'Under [grid], give values, as in: "adapter.rank" = [8, 16]')
    for number, row in enumerate(rows):
        place = f"variant.{number}"
        if row in rows[:number]:
            yield Problem(place, "is there twice", "Two runs would be the same.")
        for setting, value in row.items():
            if told := _no_value(value):
                yield Problem(f"{place}.{setting}", *told)
            if setting in grid:
                yield Problem(f"{place}.{setting}", "is in [grid] as well", "Take it out of one of them.")
    for setting in dict.fromkeys(setting for row in rows for setting in row):
        values = [row[setting] for row in rows if setting in row]
        if len(values) == len(rows) and all(value == values[0] for value in values):
            what = "has one value in all variants, so it does not vary"
            yield Problem(f"variant.{setting}", what, "Set it in the configuration, or give it another one.")


def _problems_of_settings(varies: Sequence[str], overrides: Sequence[str]) -> Iterator[Problem]:
    for setting in varies:
        if setting in _OWN:
            fix = "Set sweep.name." if setting == "name" else "Set it in the configuration, or with --set runs=..."
            yield Problem(setting, "cannot vary", fix)
    for setting in (override.partition("=")[0].strip() for override in overrides):
        if setting in varies:
            yield Problem(f"--set {setting}", "has no effect, because the grid lets it vary", "Remove one of the two.")


def _no_value(value: Any) -> tuple[str, str] | None:
    """Why something cannot be the value of a setting, and what to do."""
    if all(type(one) in (bool, int, float, str) for one in (value if isinstance(value, list) else [value])):
        return None
    return f"holds {value!r}, which is no value of a setting", "Name each setting by its dotted path."


def _without_numbers(dotted: str) -> str:
    """`data.0.path` as `data.path`, which names the same setting."""
    return ".".join(part for part in dotted.split(".") if not part.isdecimal())


# ---------------------------------------------------------------------------------------------------------------------
# names

_FIELD = re.compile(r"\{([^{}]*)\}")


def _problems_of_template(template: str, varies: Sequence[str]) -> Iterator[Problem]:
    known = ["base", *varies]
    for field in _FIELD.findall(template):
        if field not in known:
            yield Problem("sweep.name", f"{{{field}}} does not vary", f"Known here: {', '.join(known)}.")


@dataclass(frozen=True)
class _Names:
    """What combinations are called."""

    template: str
    base: str
    varies: Sequence[str]

    def __call__(self, values: Mapping[str, Any]) -> str:
        if self.template:
            told = {setting: _in_a_name(value) for setting, value in values.items()} | {"base": self.base}
            return _FIELD.sub(lambda field: told.get(field[1], "plain"), self.template)
        return "-".join([self.base, *(self._part(*one) for one in values.items())] if values else [self.base, "plain"])

    def _part(self, setting: str, value: Any) -> str:
        """`rank8`, `schedule-cosine`; of settings that end alike, with the table."""
        short = setting.rpartition(".")[2]
        if sum(other.rpartition(".")[2] == short for other in self.varies) > 1:
            short = setting
        is_number = type(value) in (int, float)
        return f"{short}{'' if is_number else '-'}{_in_a_name(value)}"


def _in_a_name(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(_in_a_name, value)) or "none"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^\w.-]+", "-", text)


def _refuse_twins(variants: Sequence[Variant], file: Path) -> None:
    """Names are told apart as Windows does, where `Ink` is `ink`."""
    first: dict[str, Variant] = {}
    for one in variants:
        if (other := first.setdefault(one.name.casefold(), one)) is not one:
            apart = " and ".join(f"{{{setting}}}" for setting in _differing(one, other))
            what = f"calls one run {other.name}, and another one {one.name}"
            raise ConfigError(what, f"{file.name}: sweep.name", f"Set it so that {apart} tells them apart.")


def _differing(one: Variant, other: Variant) -> list[str]:
    settings = dict.fromkeys([*one.values, *other.values])
    return [setting for setting in settings if one.values.get(setting) != other.values.get(setting)]


# ---------------------------------------------------------------------------------------------------------------------
# the plan


@dataclass(frozen=True)
class Foreseen:
    """What one combination will do."""

    variant: Variant
    plan: Plan
    seconds: float | None
    """None: no run of this kind was trained here yet."""

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.variant.name,
            "overrides": self.variant.overrides,
            "values": dict(self.variant.values),
            "steps": self.plan.steps,
            "images_seen": self.plan.images,
            "seconds": self.seconds and round(self.seconds),
            "warnings": list(self.plan.warnings()),
        }


def plan_sweep(sweep: Sweep, variants: Sequence[Variant], progress: Progress) -> list[Foreseen]:
    """Look at everything that these combinations need; nothing is begun.

    Raises:
        UserError: with every problem of every combination at once, and those that have it where not all do.
    """
    problems: dict[str, list[Problem]] = {variant.name: [] for variant in variants}
    configs: dict[str, RunConfig] = {}
    plans: dict[str, Plan] = {}
    for number, variant in enumerate(variants):
        progress(number, len(variants))
        with _kept(problems[variant.name]):
            configs[variant.name] = config = sweep.config_of(variant)
            with _kept(problems[variant.name]):
                check_name_is_free(config)
            plans[variant.name] = make_plan(config)
    progress(len(variants), len(variants))
    told = [replace(problem, what=f"{problem.what}{whose}") for problem, whose in shared(problems)]
    told += [*_equal_ones([one for one in variants if one.name in configs], configs, sweep.file)]
    told += [*_lack_of_disk(sweep.runs, list(plans.values()))]
    if told:
        raise UserError.of(told)
    stories = _stories(sweep.runs)
    return [Foreseen(one, plans[one.name], _seconds(plans[one.name], stories)) for one in variants]


def shared(by_run: Mapping[str, Sequence[Told]]) -> list[tuple[Told, str]]:
    """What was said of runs, each thing once, with how many it was said of; with nothing if of all of them."""
    named: dict[Told, list[str]] = {}
    for name, said in by_run.items():
        for one in dict.fromkeys(said):
            named.setdefault(one, []).append(name)
    return [(one, _of(names, len(by_run))) for one, names in named.items()]


def _of(names: Sequence[str], runs: int) -> str:
    return "" if len(names) == runs else f" (in {len(names)} of {runs} runs: {names[0]}{', ...' * (len(names) > 1)})"


@contextmanager
def _kept(problems: list[Problem]) -> Iterator[None]:
    """What a person has to correct is kept, and the block ends there."""
    try:
        yield
    except LorasmithError as error:
        problems += error.problems


def _equal_ones(variants: Sequence[Variant], configs: Mapping[str, RunConfig], file: Path) -> Iterator[Problem]:
    """Combinations that come to the same settings, as where one of them has no effect."""
    first: dict[str, Variant] = {}
    for one in variants:
        settings = configs[one.name].model_copy(update={"name": "", "recipe": ""}).model_dump_json()
        if (other := first.setdefault(settings, one)) is not one:
            what = f"{' and '.join(_differing(one, other))} makes no difference between {other.name} and {one.name}"
            yield Problem(file.name, what, "Take one of the two values out.")


def _lack_of_disk(runs: Path, plans: Sequence[Plan]) -> Iterator[Problem]:
    needed, free = sum(disk_of(plan.facts(), plan.config).needed for plan in plans), free_bytes(runs)
    if needed > free:
        what = f"the {len(plans)} runs write about {amount(needed)}, and {amount(free)} are free on its disk"
        yield Problem(str(runs), what, "Free some space, raise save.every or sample.every, or set save.keep = 2.")


def _stories(runs: Path) -> list[Story]:
    """What happened in the runs that are there."""
    found = [Story(run.events) for run in find_runs(runs)]
    for story in found:
        story.refresh()
    return found


def _seconds(plan: Plan, stories: Sequence[Story]) -> float | None:
    pace = pace_of(plan.facts(), plan.config, stories)
    return pace.seconds(plan.steps, plan.config) if pace else None


# ---------------------------------------------------------------------------------------------------------------------
# training


def train_in_queue(sweep: Sweep, foreseen: Sequence[Foreseen], resumed: Sequence[RunFolder] = ()) -> None:
    """Put runs in this computer's queue: those that are to be begun, and before them those that go on."""
    queue = Queue(sweep.runs)
    for run in resumed:
        go_on(run, queue)
    for one in foreseen:
        begin(one.plan.config, queue)


def train_on_ray(
    address: str, foreseen: Sequence[Foreseen], resumed: Sequence[RunFolder], tell: Callable[[str], None]
) -> None:
    """Train runs on the computers of a Ray cluster, until all have ended: one on each GPU, or CPU if there is no GPU.

    Ray decides what is trained where, and begins a run again whose computer was lost, or told to end: it then goes on
    from its newest checkpoint. Run folders, images and base must lie at the same path on each of them. `tell` hears of
    each run that has ended.

    Raises:
        UserError: if Ray is not installed, or there is no such cluster.
    """
    ray = _connected(address)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        tell(f"Ray's GPUs: {gpus}, for a run each" if gpus else "Ray has no GPU: the runs are trained on CPUs")
        runs = [*resumed, *(create_run(one.plan.config) for one in foreseen)]
        # a process for each run, because accelerate keeps device and precision for a whole one
        trainer = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_calls=1, retry_exceptions=[InterruptedError])(
            _resume_here
        )
        waited_for = {trainer.options(name=run.name).remote(str(run.path)): run for run in runs}
        while waited_for:
            [ended], _ = ray.wait(list(waited_for))
            run = waited_for.pop(ended)
            tell(f"{run.name}: {_how_it_ended(ray, ended, run)}")
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    """Ray's module, with its cluster at an address: `local` starts one here, `auto` is the one of this computer."""
    try:
        ray = import_module("ray")
    except ImportError as error:
        fix = 'On each computer: pip install "lorasmith[ray]"'
        raise UserError(f"Ray is not installed ({first_line(error)})", "--ray", fix) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of each start
        options["include_dashboard"] = False
    try:
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        fix = 'Give "local", "auto" on a computer of the cluster, or "ray://HOST:10001".'
        raise UserError(f"no Ray cluster is found there: {first_line(error)}", f"--ray {address}", fix) from error
    return ray


def _resume_here(path: str) -> None:
    """What a process does that Ray has started on one of its computers.

    A run is always resumed, which begins one that has no checkpoint: another computer may have begun it and been lost.

    Raises:
        InterruptedError: if the process was told to end, as where a computer is taken away; all is saved.
    """
    from .console import Reporter
    from .run import refusals_told, resume

    run = RunFolder(Path(path))
    if not run.config.is_file():
        raise FileNotFoundError(f"{path} is not on this computer: its folder must be one that all of them share")
    with run.log.open("a", encoding="utf-8") as said, redirect_stdout(said), redirect_stderr(said):
        try:
            with Reporter() as report, refusals_told(run):
                finished = resume(run, [], report)
        except LorasmithError as error:
            print(f"error: {error}")
            return
    if finished.stopped_by == "signal":
        raise InterruptedError(f"{path} was stopped and saved")


def _how_it_ended(ray: Any, ended: Any, run: RunFolder) -> str:
    try:
        ray.get(ended)
    except ray.exceptions.RayError as error:  # of an error in the task too, with a traceback above its last line
        return f"could not be trained to its end: {str(error).strip().splitlines()[-1]}"
    return run.status().sentence


# ---------------------------------------------------------------------------------------------------------------------
# results


@dataclass(frozen=True)
class Result:
    """How one combination came out so far."""

    variant: Variant
    state: str
    status: Status | None
    """None: its run was not made, or is gone."""
    seconds: float
    """Spent in steps, without previews and checkpoints."""

    def facts(self) -> dict[str, Any]:
        status = self.status
        return {
            "name": self.variant.name,
            "values": dict(self.variant.values),
            "state": self.state,
            "step": status.step if status else 0,
            "steps": status.steps if status else 0,
            "loss": status.loss if status else None,
            "seconds": round(self.seconds, 1),
            "message": status.message if status else "",
        }


def results_of(sweep: Sweep) -> Iterator[Result]:
    """Of each combination, in the order of the grid."""
    for variant in sweep.variants:
        if not sweep.is_there(variant):
            yield Result(variant, "not made", None, 0.0)
            continue
        run = sweep.run_of(variant)
        story = Story(run.events)
        status = run.status(story)
        yield Result(variant, _state(run, status), status, math.fsum(story.steps.seconds))


def _state(run: RunFolder, status: Status) -> str:
    """Whether a process of another computer lives cannot be seen from here."""
    owner = read_process(run.owner_file) if status.state == "interrupted" else None
    if owner and owner.boot and owner.boot != ProcessId.of(os.getpid()).boot:
        return "interrupted, or trained on another computer"
    return status.state
