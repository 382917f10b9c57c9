"""The named endpoints, for other programs: plan, train, status, stop, resume, sample, export (docs/browser.md)."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import gradio as gr
from pydantic import ValidationError, validate_call

from ..trainer.changes import changed_for_resume
from ..trainer.errors import LorasmithError, RunError, TrainingError
from ..trainer.jobs import RunFolder
from ..trainer.painting.easel import Drawn, Ticket
from ..trainer.painting.orders import Look, PictureOrder
from ..trainer.queue import go_on
from .context import Context
from .paths import require_allowed
from .share.exporting import export_of
from .train.starting import Answers, plan_of, start
from .urls import drawn_url, export_url

Endpoint = Callable[..., dict[str, Any]]
NAMES = ("plan", "train", "status", "stop", "resume", "sample", "export")
"""Of the endpoints."""


def add_endpoints(context: Context) -> None:
    """What the page does, by name; answers are plain values, and addresses are those of this server."""

    def plan(
        images: str, base: str = "pocket", name: str = "", trigger: str = "", settings: list[str] | None = None
    ) -> dict[str, Any]:
        """What would happen, in numbers; settings are written section.key=value."""
        return plan_of(context, Answers(images, base, name, trigger, settings=settings or ())).facts()

    def train(
        images: str, base: str = "pocket", name: str = "", trigger: str = "", settings: list[str] | None = None
    ) -> dict[str, Any]:
        """Put a new run in the queue, and say under which name; it starts at once if nothing else trains."""
        return _standing(context, start(context, Answers(images, base, name, trigger, settings=settings or ())))

    def status(run: str) -> dict[str, Any]:
        """Where a run stands, in a word, in numbers and in a sentence."""
        return _standing(context, _run(context, run))

    def stop(run: str) -> dict[str, Any]:
        """Save and stop a run after its current step; take one that waits out of the queue."""
        found = _run(context, run)
        found.ask_to_stop()
        return _standing(context, found)

    def resume(run: str, settings: list[str] | None = None) -> dict[str, Any]:
        """Go on with a run where it was saved, with settings that may change; a larger budget.images prolongs it."""
        found = _run(context, run)
        config = changed_for_resume(found, settings or ())
        require_allowed(context, config.model_dump(), found.read_config().model_dump())
        go_on(found, context.queue, settings or ())
        return _standing(context, found)

    def sample(
        run: str, prompts: list[str], step: int | None = None, strength: float = 1.0, seed: int | None = None
    ) -> dict[str, list[str]]:
        """Draw with a checkpoint, the newest if none is named, and wait for the pictures' addresses."""
        found = _run(context, run)
        settings = found.read_config().sample
        checkpoint = max(found.saved_steps(), default=0) if step is None else step
        seeds = (settings.seed if seed is None else seed,)
        order = PictureOrder(tuple(prompts), seeds, str(found.path), checkpoint, strength, look=Look.of(settings))
        ticket = context.easel.place(order)
        drawn = _ended(ticket)
        if drawn.state != "done":
            raise TrainingError(drawn.message or f"the pictures were {drawn.state}", found.name, drawn.fix)
        return {"pictures": [drawn_url(file) for file in ticket.files()]}

    def export(
        run: str,
        step: int | None = None,
        formats: list[str] | None = None,
        precision: str = "fp16",
        strength: float = 1.0,
    ) -> dict[str, Any]:
        """Write the files to share of a checkpoint, the newest if none is named, verify them, and say where they are.
        The strength is the one that others are told to use."""
        found = _run(context, run)
        answer = export_of(context, run, step or 0, tuple(formats or ()), precision, strength)
        files = [found.path / written for written in answer["written"]]
        told = [{"name": file.name, "url": export_url(found, file)} for file in files if file.is_file()]
        return {"files": told, "verified": answer["files"]}

    quick: tuple[Endpoint, ...] = (plan, train, status, stop, resume)
    slow: tuple[Endpoint, ...] = (sample, export)  # they wait for a process, and must not keep the pages waiting
    for endpoint in (*quick, *slow):
        limit: dict[str, Any] = {"concurrency_limit": None}
        if endpoint in slow:
            limit = {"concurrency_id": "slow", "concurrency_limit": 4}
        gr.api(_told(endpoint), api_name=endpoint.__name__, **limit)


def _told(endpoint: Endpoint) -> Endpoint:
    """An error a person can act on reaches the other program, as text; of arguments, before anything is done."""

    checked, names = validate_call(endpoint), [*inspect.signature(endpoint).parameters]

    @functools.wraps(endpoint)
    def safe(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return checked(*args, **kwargs)
        except ValidationError as error:
            told = "\n".join(_wrong(detail, names) for detail in error.errors())
            raise gr.Error(told, print_exception=False) from error
        except LorasmithError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except OSError as error:
            what = f"{error.filename or 'disk'}: cannot be read or written ({error.strerror or error})"
            raise gr.Error(what, print_exception=False) from error

    return safe


def _wrong(detail: Any, names: Sequence[str]) -> str:
    """What is wrong with an argument, by its name."""
    first, *inner = detail["loc"]
    name = names[first] if isinstance(first, int) and first < len(names) else first
    what = detail["msg"].replace("Input should", "should")
    return f"{'.'.join(map(str, [name, *inner]))}: {what}. See the API of the page for what is taken."


def _run(context: Context, name: str) -> RunFolder:
    if run := context.run(name):
        return run
    raise RunError("there is no run of this name", name or "run", f"See what is in {context.runs}.")


def _standing(context: Context, run: RunFolder) -> dict[str, Any]:
    status = run.status(context.stories.of(run))
    return {"run": run.name, **asdict(status), "sentence": status.sentence}


_LOOK_AGAIN = 0.2


def _ended(ticket: Ticket) -> Drawn:
    """What became of an order, as soon as it has ended."""
    while not (drawn := ticket.state()).has_ended:
        time.sleep(_LOOK_AGAIN)
    return drawn
