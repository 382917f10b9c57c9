"""What a run is made from, as far as it decides the result: settings, images and base. A checkpoint remembers it, so
that a run goes on from the same, or a person hears what has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..datasets.dataset import Example
from ..datasets.fingerprints import Fingerprint, changes, fingerprint
from .bases import BaseInfo
from .config import RunConfig
from .errors import UserError

Change = Literal["config", "data", "base"]
"""What a person may allow to have changed."""

_DECIDING = {"seed", "adapter", "block", "budget", "optimizer", "objective"}


def changes_named(names: Collection[str]) -> set[Change]:
    """What `--allow` names.

    Raises:
        UserError: if that is no such thing.
    """
    known = {change: change for change in get_args(Change)}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{', '.join(unknown)} is nothing that can be allowed", "--allow", f"Give {', '.join(known)}.")
    return {known[name] for name in names}


@dataclass(frozen=True)
class Origin:
    """What a run is made from. Its hashes decide whether it is the same; the rest tells what has changed."""

    settings: dict[str, Any] = field(default_factory=dict)
    """By section, those that decide the result. Where images, captions and crops come from is not among them, nor where
    the base lies: what came of them is compared, so that both may be moved."""
    base: dict[str, Any] = field(default_factory=dict)
    """As `[base]` names it."""
    base_hash: str = ""
    """The identity of its weights."""
    images: tuple[Fingerprint, ...] = ()

    @classmethod
    def of(
        cls,
        config: RunConfig,
        base: BaseInfo,
        examples: Iterable[Example],
        processes: int,
        preference: Mapping[str, Any] | None = None,
    ) -> Origin:
        """`base` is as it is trained: with the prediction type and the end of the noise that were asked for;
        `preference` is what decides a run that refines another, and others have none."""
        settings: dict[str, Any] = config.model_dump(include=_DECIDING) | {"processes": processes}
        del settings["budget"]["images"]  # a run may be extended
        settings |= {"preference": dict(preference)} if preference else {}
        settings["objective"] |= {"prediction": base.prediction, "zero_terminal_snr": base.zero_terminal_snr}
        return cls(settings, config.base.model_dump(), base.identity, tuple(map(Fingerprint.of, examples)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Origin:
        images = tuple(Fingerprint(**image) for image in values["images"])
        return cls(values["settings"], values["base"], values["base_hash"], images)

    @property
    def config_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def dataset_hash(self) -> str:
        return fingerprint(self.images)

    def changes(self, what: Change, now: Origin) -> list[str]:
        """What of it is another now, in words."""
        if what == "config":
            return [_told(*one) for one in differences(self.settings, now.settings)]
        if what == "data":
            return changes(self.images, now.images)
        named = [_told(f"base.{name}", was, is_now) for name, was, is_now in differences(self.base, now.base)]
        return named or [f"other weights lie where {now.base['model']} was"]


def _told(name: str, was: Any, now: Any) -> str:
    return f"{name} is {_shown(now)}, and was {_shown(was)}"


def _shown(value: Any) -> str:
    """As a configuration file has it, about."""
    return json.dumps(value) if value is not None else "not set"


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Settings that differ: the dotted name, what it was, what it is; None of a value that is only there in one."""
    for key in dict.fromkeys([*before, *after]):
        was, now = before.get(key), after.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from differences(was, now, f"{prefix}{key}.")
        elif key in ("data", "block") and isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
            yield from differences(_numbered(was), _numbered(now), f"{key}.")
        elif was != now:
            yield f"{prefix}{key}", was, now


def _numbered(tables: list[Any]) -> dict[str, Any]:
    return {str(number): table for number, table in enumerate(tables)}
