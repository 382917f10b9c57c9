"""Caption rules as pure functions."""

from __future__ import annotations

import re


def with_trigger(caption: str, trigger: str) -> str:
    """Put the trigger word first, unless the caption holds it as a whole word already."""
    caption, trigger = caption.strip(), trigger.strip()
    if not trigger or has_word(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def has_word(caption: str, word: str) -> bool:
    """Whether `word` stands in the caption, not as a part of a longer word; case does not matter."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) is not None


def tidy(text: str) -> str:
    """One line, single spaces, no byte-order mark."""
    return " ".join(text.removeprefix("\ufeff").split())


def tags(caption: str) -> list[str]:
    """The comma-separated parts of a caption, stripped and in lower case, as kohya's tag frequency counts them."""
    return [tag for part in caption.split(",") if (tag := part.strip().lower())]
