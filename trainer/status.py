"""Where a run stands, in a word, in numbers and in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

State = Literal[
    "new",
    "queued",
    "preparing",
    "training",
    "sampling",
    "saving",
    "exporting",
    "done",
    "stopped",
    "failed",
    "interrupted",
]
ACTIVE: tuple[State, ...] = ("preparing", "training", "sampling", "saving", "exporting")


@dataclass(frozen=True)
class Status:
    """Where a run stands."""

    state: State
    step: int
    """The last step that was taken."""
    steps: int
    """The number of steps that were planned; 0 if that is not known yet."""
    saved_step: int
    """The last step with a checkpoint."""
    message: str = ""
    """Of a run that prepares, what it does; of one that failed, or is done before its budget was spent, why."""
    fix: str = ""
    """Of a run that failed, what a person can do about it."""
    overrides: tuple[str, ...] = ()
    """Settings with which it can be resumed in spite of that."""
    anew: tuple[str, ...] = ()
    """Settings for a new run in which that would not happen."""
    resume_from: int | None = None
    """The step to resume from, where the newest checkpoint is damaged."""
    left: float | None = None
    """Seconds to the last step; None if no process works on it, or it cannot be told yet."""
    loss: float | None = None
    """The moving average."""
    rate: float | None = None
    """Steps per second."""
    memory: str = ""
    """What it uses, as `7.4 GB`."""

    @property
    def is_active(self) -> bool:
        """Whether a process works on it."""
        return self.state in ACTIVE

    @property
    def can_resume(self) -> bool:
        """Whether it can go on as it is; one that is done needs a larger budget."""
        return self.state in ("new", "stopped", "failed", "interrupted")

    @property
    def sentence(self) -> str:
        match self.state:
            case "new":
                return "Not started."
            case "queued":
                return f"Waiting in the queue, at step {self.step}." if self.step else "Waiting in the queue."
            case "preparing":
                return f"{self.message or 'Starting'}."
            case "training":
                return " ".join([f"Step {self._place}.", *self._pace()])
            case "sampling":
                return f"Drawing previews at step {self._place}."
            case "saving":
                return f"Saving step {self._place}."
            case "exporting":
                return f"Exporting and verifying what was trained in {self.step} steps."
            case "done" if self.message:
                return f"Done early, after {self._place} steps: {self.message}."
            case "done":
                return f"Done, {self.step} steps."
            case "stopped":
                return f"Stopped and saved at step {self.saved_step} of {self.steps}."
            case "failed":
                when = f"at step {self.step}" if self.step else "before the first step"
                return f"Failed {when}: {self.message.rstrip('.')}."
            case "interrupted" if not self.step:
                return "Interrupted before the first step."
            case "interrupted":
                saved = f"saved up to step {self.saved_step}" if self.saved_step else "nothing was saved"
                return f"Interrupted at step {self._place}, {saved}."

    @property
    def _place(self) -> str:
        return f"{self.step} of {self.steps}"

    def _pace(self) -> list[str]:
        """How long it takes, how fast it is, and what it needs, each in a sentence."""
        told = (
            ["Estimating the time left."]
            if self.left is None
            else [f"{duration(self.left)} left, ends {_at(self.left)}."]
        )
        if self.rate:
            told.append(f"{self.rate:.3g} steps/s." if self.rate >= 1 else f"{1 / self.rate:.3g} s/step.")
        if self.memory:
            told.append(f"{self.memory} used.")
        if self.loss is not None:
            told.append(f"Loss {self.loss:.3g}.")
        return told


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _at(seconds: float) -> str:
    """The local time so many seconds from now; with its day, if that is another one."""
    now = datetime.now()
    then = now + timedelta(seconds=seconds)
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%Y-%m-%d %H:%M}"
