"""Small JSON files, which anybody may have written or changed: read within bounds, and of one kind of error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

LARGEST = 16 * 2**20
"""Bytes. The largest of ours, an index of a model's weights, has half of one; read, each byte may take twenty."""


def read_json(path: Path) -> Any:
    """What a file holds.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is larger than any of ours, or is not JSON.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST >> 20} MiB")
    return parse_json(content.decode("utf-8"))


def parse_json(text: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a text holds; the hook makes an object of its names and values, as that of `json.loads`.

    Raises:
        ValueError: if it is not JSON, which NaN and Infinity are no part of, or is nested deeper than can be read.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number in JSON")
