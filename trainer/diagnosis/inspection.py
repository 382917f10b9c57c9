"""What is in a LoRA file, whoever made it, told without a model, and ready for JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..keys import ALPHA, component_of
from ..lorafile import LoraFile, form_of, guess_family, rank_of
from .findings import findings


def inspect(path: Path) -> dict[str, Any]:
    """Format, family, components, hashes and metadata of a LoRA file, and what is wrong with it; of a whole model, that
    it is one.

    Raises:
        UserError: if it is not a whole safetensors file.
    """
    file = LoraFile.open(path)
    family, because = guess_family(file)
    known = {key for keys in file.layers.values() if form_of(keys) for key in keys.values()}
    whole = any(key.startswith("model.diffusion_model.") for key in file.shapes)
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "format": "ldm, a whole model" if whole else file.format or "unknown",
        "family": family or "unknown",
        "family_because": because,
        "dtypes": dict(Counter(file.dtypes.values())),
        "components": components(file),
        "other_keys": [] if whole else sorted(set(file.shapes) - known),
        "findings": [asdict(finding) for finding in findings(file)],
        "hashes": asdict(file.hashes),
        "metadata": {key: _readable(value) for key, value in sorted(file.metadata.items())},
    }


def components(file: LoraFile) -> dict[str, dict[str, Any]]:
    """By component: how many layers, their forms, ranks and alphas, each with its count."""
    single = [keys[ALPHA] for keys in file.layers.values() if ALPHA in keys and file.count(keys[ALPHA]) == 1]
    alphas = {key: float(tensor) for key, tensor in file.read(single)}
    found: dict[str, dict[str, Any]] = {}
    for name, keys in file.layers.items():
        form = form_of(keys)
        if form is None:
            continue
        entry = found.setdefault(
            component_of(name) or "unknown",
            {"modules": 0, "forms": Counter(), "ranks": Counter(), "alphas": Counter()},
        )
        entry["modules"] += 1
        entry["forms"][form] += 1
        if rank := rank_of({leaf: file.shapes[key] for leaf, key in keys.items()}):
            entry["ranks"][str(rank)] += 1
            entry["alphas"][f"{alphas.get(keys.get(ALPHA, ''), rank):g}"] += 1
    counters = ("forms", "ranks", "alphas")
    return {name: entry | {counter: dict(entry[counter]) for counter in counters} for name, entry in found.items()}


MOST_SHOWN = 1000
"""Characters of a text in the metadata; of a longer one, such as a thumbnail, the beginning is shown."""
MOST_OF_A_STRUCTURE = 1_000_000
"""Characters of a table or list; that of the tags of ten thousand images has some hundred thousand."""
_DEEPEST = 50  # tables and lists in one another; kohya's are 4 deep


def _readable(value: str) -> Any:
    """Structured values as they are meant; a long one by its beginning and its length."""
    is_structure = value.startswith(("{", "[")) and len(value) <= MOST_OF_A_STRUCTURE
    if is_structure and (found := _structure(value)) is not None:
        return found
    return value if len(value) <= MOST_SHOWN else f"{value[:40]}... ({len(value)} characters)"


def _structure(value: str) -> Any:
    """What JSON holds, if it can be written again; None if not."""
    try:
        found = json.loads(value, parse_constant=str)
        json.dumps(found, allow_nan=False)  # 1e999 becomes an infinity
    except (ValueError, RecursionError):
        return None
    return found if _is_shallow(found, _DEEPEST) else None


def _is_shallow(value: Any, deepest: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return deepest > 0 and all(_is_shallow(one, deepest - 1) for one in inner)
