"""What the server keeps of one tab besides its document: the newest plan, and what was sent already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ...trainer.errors import LorasmithError
from .draft import Values
from .plancard import Foreseen


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of planning a document."""

    values: Values
    foreseen: Foreseen | None = None
    error: LorasmithError | None = None


@dataclass(eq=False)
class Desk:
    """What the server knows of one tab."""

    asked: int = 0
    """How many plans it has asked for: the answer to any but the last is thrown away."""
    sent: dict[str, Any] = field(default_factory=dict)
    """What its components show: nothing is sent twice, because the browser looks through the whole page for each."""

    def news(self, now: Mapping[str, Any], updates: Mapping[str, Any]) -> list[Any]:
        """The updates of what is not shown as it is now; all others are skipped."""
        fresh = [updates[key] if key in now and self.sent.get(key) != now[key] else gr.skip() for key in updates]
        self.sent |= now
        return fresh
