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


def _readable(value: str) -> Any:
    """Structured values as they are meant; a long one, such as a thumbnail, by its length."""
    if value.startswith(("{", "[")):
        try:
            found = json.loads(value, parse_constant=str)
            json.dumps(found, allow_nan=False)  # 1e999 becomes an infinity
            return found
        except (ValueError, RecursionError):
            return value
    return value if len(value) <= 1000 else f"{value[:40]}... ({len(value)} characters)"
