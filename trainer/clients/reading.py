"""What each client makes of one LoRA file: whether it does there what the file means.

Each client's own way to find layers, scales and kinds is written down in a module of its own, from its grammar and its
source, and without the names that this project writes: a slip there shows here. What a client would apply is then
compared with what the file means, layer by layer. Only the header and the alphas are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..lorafile import LoraFile
from ..models import Base
from . import a1111, comfyui, huggingface, invokeai, sdcpp, sdnext, sdscripts
from .contents import Contents, Meant
from .table import Client
from .taking import Change, Taken
from .trees import Tree

_READERS: dict[Client | Literal["PEFT"], Callable[[Contents, Tree], Taken]] = {
    "A1111": a1111.read,
    "ComfyUI": comfyui.read,
    "Forge": comfyui.read_forge,
    "InvokeAI": invokeai.read,
    "diffusers": huggingface.read,
    "sd-scripts": sdscripts.read,
    "SD.Next": sdnext.read,
    "stable-diffusion.cpp": sdcpp.read,
    "PEFT": huggingface.read_peft,
}
_SAME_SCALE = 1e-3
_LONGEST = 400  # characters of a sentence


@dataclass(frozen=True)
class ClientReading:
    """What one client makes of a file."""

    client: str
    reading: Literal["same", "part", "other", "none"]
    """same: it does what the file means. part: it leaves layers or keys out. other: it applies something else, such as
    another scale, or a DoRA without its lengths. none: it refuses or skips the file."""
    layers: int
    """How many layers it changes, rightly or not."""
    of: int
    """How many the file changes."""
    unused: tuple[str, ...]
    """The keys that it leaves out, sorted; all of them if it takes nothing."""
    why: str
    """One sentence; empty for `same`."""


def read_by_clients(file: LoraFile, base: Base) -> list[ClientReading]:
    """What every client makes of a file on this base, of which shapes are enough. PEFT's own loader comes last; it is
    not asked of kohya's names, which it never reads.

    The base's family is the one that a person would use the file with; no tensor but alphas is read.
    """
    contents, tree = Contents.of(file), Tree.of(base)
    asked = [(client, read) for client, read in _READERS.items() if client != "PEFT" or not file.is_kohya]
    return [_reading(client, read(contents, tree), contents) for client, read in asked]


def _reading(client: str, taken: Taken, contents: Contents) -> ClientReading:
    meant = contents.meant
    if not contents.shapes:
        return ClientReading(client, "none", 0, 0, (), "The file holds nothing.")
    changes = [] if taken.refusal else _by_layer(taken, meant)
    every = tuple(sorted(contents.shapes))
    if not any(change for _, change in changes):
        why = taken.refusal or (_left_out(taken, every, contents) if meant else "the file holds no change of any layer")
        return ClientReading(client, "none", 0, len(meant), every, _sentence(why))
    unused = tuple(sorted(contents.shapes.keys() - taken.used))
    layers = sum(change is not None for _, change in changes)
    wrong = _wrong(changes, taken, contents)
    if wrong:
        return ClientReading(client, "other", layers, len(meant), unused, _sentence(wrong))
    if unused:
        return ClientReading(client, "part", layers, len(meant), unused, _sentence(_left_out(taken, unused, contents)))
    return ClientReading(client, "same", layers, len(meant), (), "")


Applied = list[tuple[str, Change | None]]
"""Names of the file's layers, each with what the client changes there."""


def _by_layer(taken: Taken, meant: dict[str, Meant]) -> Applied:
    by_key = {key: change for change in taken.changes for key in change.keys}
    return [(name, next((by_key[k] for k in layer.keys if k in by_key), None)) for name, layer in meant.items()]


def _wrong(changes: Applied, taken: Taken, contents: Contents) -> str:
    """How what is applied differs from what the file means, by the first layer in which it does."""
    others: dict[str, list[str]] = {}
    for name, change in changes:
        if change and (how := _difference(contents.meant[name], change, taken)):
            others.setdefault(how, []).append(name)
    if not others:
        return ""
    how, names = next(iter(others.items()))
    return f"{how} ({len(names)} of {len(changes)} layers, such as {names[0]})"


def _difference(meant: Meant, change: Change, taken: Taken) -> str:
    """What a client does to a layer in place of what is meant; empty if it does that."""
    if missing := sorted(meant.keys - change.keys):
        leaf = missing[0].rpartition(".")[2]
        return taken.dropped.get(missing[0], f"it leaves the {leaf} of layers out and applies the rest")
    if change.wrong:
        return change.wrong
    if meant.scale is None:
        return ""
    if not math.isfinite(meant.scale):
        return "alpha is not a finite number, so that pictures turn black"
    if not math.isclose(meant.scale, change.scale, rel_tol=_SAME_SCALE):
        scaled = f"it applies the change at scale {change.scale:.3g} instead of {meant.scale:.3g}"
        return f"{scaled}: {taken.scaling or 'it does not read the header'}"
    return ""


def _left_out(taken: Taken, unused: tuple[str, ...], contents: Contents) -> str:
    """How much a client leaves out, and why, by the reason that most keys have."""
    reasons: dict[str, list[str]] = {}
    for key in unused:
        reasons.setdefault(taken.dropped.get(key, "it knows no layer of that name"), []).append(key)
    why, keys = max(reasons.items(), key=lambda reason: len(reason[1]))
    return f"it leaves {len(unused)} of the {len(contents.shapes)} keys out, such as {keys[0]}: {why}"


def _sentence(text: str) -> str:
    """One line, also of keys that hold line breaks or are as long as a page."""
    line = " ".join(text.split())
    return f"{line[0].upper()}{line[1:_LONGEST]}{'.' if len(line) <= _LONGEST else ' ...'}"
