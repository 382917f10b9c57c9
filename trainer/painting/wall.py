"""Which checkpoints and strengths a wall shows if nobody chose any, and its prompts without the trigger."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...datasets.captions import tidy
from ..errors import RunError, UserError
from ..jobs import RunFolder
from .orders import Look, WallOrder

STRENGTHS = (0.0, 0.5, 0.8, 1.0, 1.1)
"""The base alone as control, two weaker than trained, as trained, and a little beyond."""
_ROWS = 5


def wall_order(
    run: RunFolder,
    steps: Sequence[int] = (),
    strengths: Sequence[float] = (),
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> WallOrder:
    """A wall drawn as the run's previews are; what is not given is chosen: the prompt is that of the first preview.

    Raises:
        RunError: if there is no checkpoint yet.
        UserError: if there is no prompt that could be taken.
    """
    settings = run.read_config().sample
    rows = steps or default_steps(run)
    if not rows:
        raise RunError("has no checkpoint yet", str(run.path), "A wall can be drawn after the first is saved.")
    texts = prompts or settings.prompts[:1]
    if not texts:
        raise UserError("has no previews whose prompt could be taken", str(run.path), "Give a prompt.")
    return WallOrder(
        run=str(run.path),
        steps=tuple(dict.fromkeys(rows)),
        strengths=tuple(dict.fromkeys(map(float, strengths or STRENGTHS))),
        prompts=tuple(dict.fromkeys(texts)),
        seeds=tuple(dict.fromkeys(seeds or [settings.seed])),
        look=Look.of(settings),
    )


def default_steps(run: RunFolder, rows: int = _ROWS) -> tuple[int, ...]:
    """At most `rows` of the checkpoints, spread evenly over all of them, the final one among them."""
    saved = run.saved_steps()
    if len(saved) <= rows:
        return tuple(saved)
    return tuple(saved[round((row + 1) * len(saved) / rows) - 1] for row in range(rows))


def without_trigger(prompt: str, trigger: str) -> str:
    """The prompt without the trigger as a whole word, in whichever case, and without the commas it stood between.

    What a wall then still shows of the style has leaked into prompts that do not ask for it.
    """
    trigger = trigger.strip()
    if not trigger:
        return prompt
    left = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", " ", prompt, flags=re.IGNORECASE)
    if left == prompt:
        return prompt
    parts = [tidy(part) for part in left.split(",")]
    return ", ".join(part for part in parts if part)
