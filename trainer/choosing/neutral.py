"""Prompts that have nothing to do with a run's images, and the words of captions that tell."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence

from ..bases import POCKET

SUBJECTS = (
    "a bicycle leaning against a brick wall",
    "an old man reading a newspaper",
    "a bowl of soup on a kitchen table",
    "a sailing boat on a lake",
    "a brown horse in a meadow",
    "a narrow street after rain",
    "a pair of leather shoes",
    "a woman playing the violin",
    "a snowy mountain under a clear sky",
    "a red telephone box",
    "a parrot on a branch",
    "a desk with a computer and a lamp",
    "a steam train crossing a bridge",
    "a loaf of bread and a knife",
    "children playing football in a park",
    "a wooden chair by a window",
    "a lighthouse on a cliff",
    "a cup of coffee",
    "a market stall with vegetables",
    "an astronaut on the moon",
    "a sleeping cat",
    "a castle on a hill",
    "a potted cactus",
    "a man with a black umbrella",
)
"""Of many kinds, told plainly: with no medium, no artist and no mood."""
_STOP_WORDS = frozenset(
    (
        *("a", "an", "the", "this", "that", "these", "those", "some", "no", "not", "very", "one", "two", "pair"),
        *("of", "on", "in", "at", "to", "by", "with", "without", "from", "for", "as", "into", "under", "over", "near"),
        *("before", "after", "behind", "next", "front", "and", "or", "is", "are", "was", "be", "being", "there"),
        *("it", "its", "he", "his", "she", "her", "they", "their"),
    )
)
"""English ones that say nothing of what is to be seen."""
_WORD = re.compile(r"[^\W\d_]{2,}")


def words_of(caption: str, triggers: Iterable[str] = ()) -> frozenset[str]:
    """The words of a caption that say what is to be seen, in lower case, without those of the triggers."""
    called = {word for trigger in triggers for word in _WORD.findall(trigger.lower())}
    return frozenset(_WORD.findall(caption.lower())) - _STOP_WORDS - called


def neutral_prompts(base: str, captions: Sequence[str], triggers: Collection[str], count: int) -> list[str]:
    """At most `count` prompts that share no word with any caption, but for those that all captions have: of the pocket
    base, whose prompts are its concepts, some of these, and of any other some of `SUBJECTS`."""
    known = [words_of(caption, triggers) for caption in captions]
    everywhere = frozenset.intersection(*known) if known else frozenset[str]()
    taught = frozenset[str]().union(*known) - everywhere
    free = [text for text in _subjects(base) if not words_of(text, triggers) & taught]
    return [free[place * len(free) // count] for place in range(count)] if len(free) > count else free


def _subjects(base: str) -> Sequence[str]:
    if base != "pocket":
        return SUBJECTS
    return [prompt for prompt, _ in json.loads((POCKET / "concepts.json").read_text(encoding="utf-8"))]
