"""What all pages share: where things are on disk, the processes that work for the page, and the header's components."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from ..trainer.config import RunConfig
from ..trainer.errors import LorasmithError, UserError
from ..trainer.jobs import RunFolder
from ..trainer.painting.easel import Easel
from ..trainer.queue import Queue
from ..trainer.story import Story
from .html import esc
from .planner import Planner

P = ParamSpec("P")
R = TypeVar("R")

QUIETLY: dict[str, Any] = {
    "api_visibility": "private",
    "concurrency_limit": None,
    "show_progress": "hidden",
    "show_progress_on": [],  # for each place of a spinner the browser walks over the page at every event
}
"""How the pages listen: `api.py` alone names endpoints, and what takes long says so in words."""


FOLLOWING: dict[str, Any] = QUIETLY | {"trigger_mode": "always_last"}
"""Likewise; of what comes while an earlier event is still worked on, the last is not lost, and is answered after it."""

NEVER_WAITING: dict[str, Any] = QUIETLY | {"trigger_mode": "multiple", "concurrency_limit": 1}
"""For the one clock that always ticks. Gradio closes the line for answers when none is due; an event that the browser
sends in that moment has its answer wait for the next event of the page, which with all others waiting for theirs would
never come. This one does not wait, and so brings them."""

IN_TURN: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "render"}
"""For `gr.render`: all that are made anew share tables in Gradio, of a page and of all, which only one may change at a
time."""


class Stories:
    """What happened in each run, read once and kept in step; several requests may ask at once."""

    def __init__(self) -> None:
        self._stories: dict[Path, Story] = {}
        self._lock = threading.Lock()

    def of(self, run: RunFolder) -> Story:
        with self._lock:
            story = self._stories.setdefault(run.events, Story(run.events))
        story.refresh()  # a long log takes seconds when it is read first, and only who asks for it waits
        return story


@dataclass
class Context:
    """What a page is given."""

    runs: Path
    """The folder of run folders, absolute."""
    roots: tuple[Path, ...]
    """Paths that are typed must lie in one of these; empty: they may lie anywhere, for nobody else can type them."""
    planner: Planner
    queue: Queue
    easel: Easel
    stories: Stories = field(default_factory=Stories)
    picked: gr.Dropdown = field(init=False)
    """The name of the run that is shown, or None."""
    tabs: gr.Tabs = field(init=False)

    @classmethod
    def of(cls, runs: Path, roots: tuple[Path, ...] = ()) -> Context:
        runs = runs.absolute()
        return cls(runs, roots and (*roots, runs), Planner(), Queue(runs), Easel(runs))

    def run(self, name: str | None) -> RunFolder | None:
        """A run of this folder by its name; None if there is none of that name."""
        if not name or name != Path(name).name or name.startswith("."):
            return None
        run = RunFolder(self.runs / name)
        return run if is_file(run.config) else None

    def path(self, text: str) -> Path:
        """A path that was typed.

        Raises:
            UserError: if nothing was typed, or it lies outside of the roots.
        """
        typed = text.strip().strip('"')  # as Windows copies paths
        if not typed:
            raise UserError("nothing was given", "path", "Type the path of a file or folder on this computer.")
        try:
            path = Path(typed).expanduser().absolute()
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # who reads it will say so
                path.stat()
        except (RuntimeError, OSError, ValueError) as error:  # ~nobody, a name too long, a zero byte
            raise UserError("is no path on this computer", typed[:100], "Type the path of a file or folder.") from error
        if self.roots and not any(path.resolve().is_relative_to(root.resolve()) for root in self.roots):
            allowed = ", ".join(map(str, self.roots))
            fix = f"Name one below {allowed}, or start the app with --root for another."
            raise UserError("lies outside of the folders that this page may read", str(path), fix)
        return path


def config_of(run: RunFolder) -> RunConfig:
    """A run's configuration, which is read again only when it was written anew."""
    return _config(run, run.config.stat().st_mtime_ns)


def readable_config(run: RunFolder) -> RunConfig | LorasmithError:
    """A run's configuration, or why it cannot be read."""
    try:
        return config_of(run)
    except LorasmithError as error:
        return error


@functools.lru_cache(maxsize=100)
def _config(run: RunFolder, written: int) -> RunConfig:  # noqa: ARG001
    return run.read_config()


def as_news(look: Callable[P, Any]) -> Callable[P, Any]:
    """A look that comes each second, and answers with what changes when there is something new to see. What fails in it
    is something new too, so that whoever follows tells of it once, and not each second."""

    @functools.wraps(look)
    def safe(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return look(*args, **kwargs)
        except (LorasmithError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    return safe


def changed_at(path: Path) -> int:
    """When a file, or which files are in a folder, was changed last; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def is_file(path: Path) -> bool:
    """Whether a file is there; of a name that no disk holds, it is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def told(handler: Callable[P, R]) -> Callable[P, R]:
    """An error a person can act on is shown in the page, with its place and its fix, as text; of a file that cannot be
    read or written, its name and the reason."""

    @functools.wraps(handler)
    def safe(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(*args, **kwargs)
        except LorasmithError as error:
            raise _shown(error) from error
        except OSError as error:
            what = f"cannot be read or written ({error.strerror or error})"
            fix = "Look at the room and the permissions there."
            raise _shown(UserError(what, str(error.filename or "disk"), fix)) from error

    return safe


def _shown(error: LorasmithError) -> gr.Error:
    return gr.Error(esc(error).replace("\n", "<br>"), duration=None, print_exception=False)
