"""Gradio without what it does for editors: at each import it makes type stubs, which takes half of the time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_stubs() -> Iterator[None]:
    """Within the block, `import gradio` makes none, as where the sources of its components cannot be found."""
    getfile = inspect.getfile

    def found(what: Any) -> str:
        if str(getattr(what, "__module__", "")).startswith("gradio."):
            raise OSError("its source is not looked for")
        return getfile(what)

    inspect.getfile = found
    try:
        yield
    finally:
        inspect.getfile = getfile
