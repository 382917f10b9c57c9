"""A run trained twice, once unbroken and once killed and resumed, to see that both come to the same.

Both are trained by processes of their own, which are really killed, in a temporary folder. Nothing is drawn or
exported, and latents are encoded into a cache in that folder, so that nothing is left behind.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from . import run
from .checkpoint import load_checkpoint
from .config import RunConfig, SampleSection, SaveSection
from .configfile import read_config
from .errors import LorasmithError, TrainingError
from .events import Checkpointed, Event, Step, read_events
from .jobs import RunFolder
from .loop import Emit
from .plan import Plan, make_plan

GPU_TOLERANCE = 1e-2
"""On a GPU, how far apart the two may be: |a - b| / |a| over all numbers of a kind. Some kernels add up in another
order each time: the backward passes of attention, of convolutions as cuDNN may choose them, of nearest-neighbour
enlargement and of embeddings; and an optimizer like Adam makes a whole step of the sign of a gradient near zero. What a
resume forgets shows far above it: an optimizer's lost state makes a difference of more than a tenth."""


@dataclass(frozen=True)
class Compared:
    """One kind of thing that both runs have."""

    what: str
    numbers: int
    """How many were compared."""
    largest: float
    """The largest |a - b|; infinite if one has what the other has not."""
    relative: float
    """|a - b| / |a| over all of them."""


@dataclass(frozen=True)
class Verdict:
    """Whether N + N steps came to the same as 2 N."""

    steps: int
    """N."""
    tolerance: float
    """Of relative differences; 0 is bit for bit."""
    compared: list[Compared]

    def holds(self, one: Compared) -> bool:
        return one.relative <= self.tolerance

    @property
    def is_equal(self) -> bool:
        return all(map(self.holds, self.compared))

    def facts(self) -> dict[str, Any]:
        """As plain values for machines; what is infinite is null."""
        rows = [
            {name: None if value == math.inf else value for name, value in asdict(one).items()}
            | {"equal": self.holds(one)}
            for one in self.compared
        ]
        return {"steps": self.steps, "tolerance": self.tolerance, "equal": self.is_equal, "compared": rows}


def verify_resume(file: Path, overrides: Sequence[str], steps: int, tell: Callable[[str], None]) -> Verdict:
    """Train `2 * steps` steps unbroken, and again with a kill after the first half; `tell` hears what is being done.

    Raises:
        UserError: if the configuration cannot be trained.
        TrainingError: if one of the two runs fails.
    """
    with tempfile.TemporaryDirectory(prefix="lorasmith-", ignore_cleanup_errors=True) as folder:
        config = _planned(read_config(file, overrides), Path(folder), steps).config
        whole, broken = (config.model_copy(update={"name": name}) for name in ("whole", "broken"))
        tell(f"training {2 * steps} steps")
        _in_a_process(_train, whole, Checkpointed, 2 * steps)
        tell(f"training {steps} steps, and killing the process in the next")
        _in_a_process(_train, broken, Step, steps + 1)
        tell(f"resuming, and training {steps} more")
        _in_a_process(_resume, broken, Checkpointed, 2 * steps)
        tolerance = GPU_TOLERANCE if torch.accelerator.is_available() else 0.0
        return Verdict(steps, tolerance, compared(*(kinds_of(_folder(one), 2 * steps) for one in (whole, broken))))


def _planned(config: RunConfig, folder: Path, steps: int) -> Plan:
    """The configuration as it is, but for its length, and for what is written and where."""
    config = config.model_copy(deep=True)
    config.runs, config.runtime.cache = str(folder / "runs"), str(folder / "cache")
    config.save, config.sample = SaveSection(every=steps), SampleSection(every=0)
    if config.runtime.attention == "auto":  # two probes may find two kernels, which round otherwise
        config.runtime.attention = "sdpa"
    config.validation.patience, config.export.checkpoint = 0, "last"
    plan = make_plan(config)
    batches = islice(plan.order.steps(plan.batches_per_step), 2 * steps)
    plan.config.budget.images = sum(len(batch) for step in batches for batch in step)
    return plan


def _folder(config: RunConfig) -> RunFolder:
    return RunFolder(Path(config.runs, config.name))


# ---------------------------------------------------------------------------------------------------------------------
# processes that end by force


def _train(config: RunConfig, last: type[Event], step: int) -> None:
    run.train(make_plan(config), _killed_at(last, step))


def _resume(config: RunConfig, last: type[Event], step: int) -> None:
    run.resume(_folder(config), [], _killed_at(last, step))


def _killed_at(last: type[Event], step: int) -> Emit:
    """A listener that ends its process when this has happened."""

    def listen(event: Event) -> None:
        if isinstance(event, last) and getattr(event, "step", None) == step:
            psutil.Process().kill()

    return listen


def _in_a_process(work: Callable[..., None], *arguments: Any) -> None:
    """Carry out in a new process, until that is killed.

    Raises:
        TrainingError: if it fails before.
    """
    context = new_processes()
    hears, says = context.Pipe(duplex=False)
    process = context.Process(target=_told, args=(says, work, *arguments))
    process.start()
    says.close()
    try:
        raise TrainingError.of(hears.recv())
    except EOFError:  # it had nothing to say
        process.join()
    finally:
        process.kill()
    if process.exitcode == 1:
        raise TrainingError("a process failed that trained for this", "", "What it said stands above.")


def new_processes() -> Any:
    """How processes are started that have nothing in memory but code; forked, where the system can, from one that has
    imported it once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload([run.__name__])
    return multiprocessing.get_context("forkserver")


def _told(says: Connection, work: Callable[..., None], *arguments: Any) -> None:
    try:
        work(*arguments)
    except LorasmithError as error:
        says.send(error.problems)


# ---------------------------------------------------------------------------------------------------------------------
# comparing


def kinds_of(run: RunFolder, step: int) -> dict[str, Any]:
    """All that is compared of a run at a step, by what it is called."""
    checkpoint = load_checkpoint(run.checkpoint(step))
    state, saved = checkpoint.state, checkpoint.optimizer
    taken = {record.event.step: record.event for record in read_events(run.events) if isinstance(record.event, Step)}
    kinds = {
        "what was trained": checkpoint.adapter,
        "weights behind the average": checkpoint.trained,
        "optimizer": saved["optimizer"],
        "running average": saved.get("averages", {}),
        "gradient scaler": saved.get("scaler", {}),
        "step and images": {"step": state.step, "images": state.images},
        "losses": {number: event.loss for number, event in taken.items()},
        "gradient norms": {number: event.grad_norm for number, event in taken.items()},
        "learning rates": {number: event.lr for number, event in taken.items()},
    }
    return {what: values for what, values in kinds.items() if values}


def compared(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Compared]:
    """Kind by kind."""
    return [_difference(what, mine.get(what, {}), theirs.get(what, {})) for what in dict.fromkeys([*mine, *theirs])]


def _difference(what: str, mine: Any, theirs: Any) -> Compared:
    a, b = dict(_leaves(mine)), dict(_leaves(theirs))
    if {name: value.shape for name, value in a.items()} != {name: value.shape for name, value in b.items()}:
        return Compared(what, len(a), math.inf, math.inf)
    both = [(a[name].double(), b[name].double()) for name in a]
    apart = [(x - y).nan_to_num(math.inf) for x, y in both]
    size, distance = (
        math.sqrt(sum(float(one.square().sum()) for one in them)) for them in ([x for x, _ in both], apart)
    )
    largest = max((float(one.abs().max()) for one in apart if one.numel()), default=0.0)
    relative = 0.0 if largest == 0 else distance / size if size else math.inf
    return Compared(what, sum(x.numel() for x, _ in both), largest, relative)


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The numbers in nested tables and lists, by where they stand; a text is a part of its place."""
    if isinstance(values, Tensor):
        yield name, values.detach().cpu()
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{name}.{key}")
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for number, value in enumerate(values):
            yield from _leaves(value, f"{name}.{number}")
    elif isinstance(values, bool | int | float):
        yield name, torch.tensor(values, dtype=torch.float64)
    else:
        yield f"{name}={values}", torch.zeros(())
