"""Errors a person can act on: each names its place and its fix.

UserError            the input or the configuration must change (exit code 2)
  ConfigError        a setting is wrong, unknown or without effect
  DataError          images or captions cannot be used as they are
  BaseModelError     the base model cannot be found, read or recognised
  RunError           a run folder is in the wrong state for what was asked
TrainingError        the run failed after it had begun (exit code 1)
  TakenOverError     another process trains the run now
  ExportError        a file was written but is not the same as the trained model
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

INTERRUPTED = 130
"""Exit code of a command that was ended by Ctrl-C."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, what it is, and what to do about it."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.fix}" if self.where else f"{self.what}. {self.fix}"


@dataclass(frozen=True)
class Mending:
    """What would mend a run that cannot go on, for a program that offers it."""

    overrides: tuple[str, ...] = ()
    """Settings with which the same run can go on, as `--set` takes them."""
    anew: tuple[str, ...] = ()
    """Settings for a new run."""
    resume_from: int | None = None
    """The step of a checkpoint to go on from."""


def first_line(error: BaseException) -> str:
    """What another library's error says first; its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class LorasmithError(Exception):
    """Root of all errors that are shown to a person without a traceback."""

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "", mending: Mending | None = None) -> None:
        self.problems = [Problem(where, what, fix)]
        self.mending = mending or Mending()
        super().__init__(what)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> LorasmithError:
        """One error for many problems, so that they can all be mended at once."""
        problems = list(problems)
        error = cls(problems[0].what, problems[0].where, problems[0].fix)
        error.problems = problems
        return error

    def __str__(self) -> str:
        return "\n".join(str(problem).rstrip() for problem in self.problems)


class UserError(LorasmithError):
    """The input or the configuration must change before anything can run."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is wrong, unknown, or without effect."""


class DataError(UserError):
    """Images or captions cannot be used as they are."""


class BaseModelError(UserError):
    """The base model cannot be found, read, or recognised."""


class RunError(UserError):
    """A run folder is in the wrong state for what was asked."""


class TrainingError(LorasmithError):
    """The run failed after it had begun; the last checkpoint stands."""


class TakenOverError(TrainingError):
    """Another process trains the run now; this one must write nothing into its folder any more."""


class ExportError(TrainingError):
    """A file was written, but it is not the same as the trained model."""
