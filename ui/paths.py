"""Which files and folders a configuration names, and whether those who use the page may name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..datasets.unpack import Address
from .context import Context

_PATHS = ("base.model", "base.vae", "adapter.start_from", "preference.start", "runtime.cache")
_MERGED = re.compile(r"(?P<path>.+\.safetensors)(:.*)?", re.IGNORECASE)


def require_allowed(context: Context, values: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> None:
    """Refuse a configuration whose paths lie outside of the roots; what it named `before` already may stay.

    Raises:
        UserError: naming the first such path.
    """
    known = set(paths_in(before or {}))
    for text in paths_in(values):
        if text not in known:
            require_allowed_path(context, text)


def require_allowed_path(context: Context, text: str) -> None:
    """Refuse a text that is a path outside of the roots; a name on the Hub is none.

    Raises:
        UserError: naming it.
    """
    if context.roots and text != "pocket" and not text.startswith("random:") and _is_path(text):
        context.path(text)


def paths_in(values: Mapping[str, Any]) -> Iterator[str]:
    """What may be the path of a file or folder."""
    for data in values.get("data") or []:
        if isinstance(data, Mapping) and isinstance(path := data.get("path"), str) and path:
            yield Address.of(path).place
    for dotted in _PATHS:
        section, _, key = dotted.partition(".")
        table = values.get(section)
        if isinstance(table, Mapping) and isinstance(value := table.get(key), str) and value:
            yield value
    base = values.get("base")
    for merged in base.get("merge") or [] if isinstance(base, Mapping) else []:
        found = _MERGED.fullmatch(str(merged))
        yield found["path"] if found else str(merged)


def _is_path(text: str) -> bool:
    path = Path(text)
    return path.is_absolute() or text.startswith("~") or ".." in path.parts or _exists(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no file can have such a name
        return False
