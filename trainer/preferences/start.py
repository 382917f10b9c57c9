"""The checkpoint that a run begins with which refines another: what it holds, and whether it fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, Problem
from ..jsonfile import read_json
from ..origin import differences
from .rated import Rated

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import RunConfig

_WHERE = "preference.start"
_OF_A_STEP_ONLY = {"start_from", "dropout", "rank_dropout", "module_dropout", "token_init", "init"}
"""Settings of an adapter that say where it began, or how it is trained, and may differ from those of the checkpoint."""
_KEPT_INITS = ("pissa", "olora")
"""With these the base's weights lack what the adapter began with, so that it stays a part of the adapter."""


def check_start(config: RunConfig) -> None:
    """Whether the checkpoint is there, and is of an adapter like that which is to be trained.

    Raises:
        ConfigError: naming each setting that is another.
    """
    folder = Path(config.preference.start).expanduser()
    try:
        settings = read_json(folder / "origin.json")["settings"]
        before = _deciding(settings["adapter"], settings["block"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "Name a folder such as runs/ink/checkpoints/step-000450."
        raise ConfigError(f"is no checkpoint that can be read ({error})", f"{_WHERE} {folder}", fix) from error
    now = _deciding(config.adapter.model_dump(), [block.model_dump() for block in config.block])
    if problems := list(_other_than(before, now)):
        raise ConfigError.of(problems)


def _deciding(adapter: dict[str, Any], blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """What decides which weights an adapter has, and what they mean."""
    kept = {key: value for key, value in adapter.items() if key not in _OF_A_STEP_ONLY}
    init = adapter.get("init", "default")
    ranks = [{key: block[key] for key in ("path", "rank", "alpha")} for block in blocks]
    ranks = [block for block in ranks if block["rank"] or block["alpha"]]
    return {"adapter": kept | {"init": init if init in _KEPT_INITS else "default"}, "block": ranks}


def _other_than(before: dict[str, Any], now: dict[str, Any]) -> Iterator[Problem]:
    for dotted, was, is_now in differences(before, now):
        shown = json.dumps(was) if was is not None else "not set"
        what = f"is {json.dumps(is_now)}, and the checkpoint that is refined was trained with {shown}"
        yield Problem(dotted, what, f"Set it to {shown}, for its weights are trained further.")


def start_facts(config: RunConfig, rated: Rated) -> dict[str, Any]:
    """What decides the result of such a run, beside its images: the reference's weights, and what was said."""
    said = json.dumps([rated.shown, sorted(rated.worse.items()), sorted(rated.down)])
    return {
        "beta": config.preference.beta,
        "start": _sum_of_weights(Path(config.preference.start)),
        "rated": hashlib.sha256(said.encode()).hexdigest(),
    }


def _sum_of_weights(folder: Path) -> str:
    """As the checkpoint tells it; whoever reads the weights compares them with it."""
    return str(read_json(folder / "state.json")["sha256"]["adapter.safetensors"])


def read_start_of(config: RunConfig) -> dict[str, Tensor]:
    """The weights that are trained further, as they are to be used.

    Raises:
        RunError: if they are not as they were written.
    """
    from ..checkpoint import open_adapter  # brings torch, which a plan of the browser app must not wait for

    file = open_adapter(Path(config.preference.start))
    return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
