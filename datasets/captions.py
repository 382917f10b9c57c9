"""Caption rules as pure functions, with the names of the field. `caption_variants` applies them in their order."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

TRIGGER_PLACE = "[trigger]"
"""In a caption it is replaced by the trigger word, as in ai-toolkit."""


@dataclass(frozen=True)
class CaptionRules:
    """What is done to the captions of one folder; the defaults do nothing."""

    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    separator: str = ","
    """Between tags."""
    shuffle: bool = False
    keep_tokens: int = 0
    """So many tags at the front are neither moved nor dropped."""
    keep_tokens_separator: str = ""
    """What stands before this mark is neither moved nor dropped, in place of a number."""
    tag_dropout: float = 0.0
    wildcards: bool = False
    variants: int = 8
    """How many variants are drawn where something is random."""

    @property
    def moves_tags(self) -> bool:
        return self.shuffle or self.tag_dropout > 0


def caption_variants(captions: Sequence[str], rules: CaptionRules, seed: str) -> tuple[str, ...]:
    """The final captions of one image, of which each showing takes one; the same seed draws the same ones.

    Each given caption comes equally often: wildcards are drawn, tags dropped and shuffled, prefix and suffix put on,
    then the trigger.
    """
    random_for = [rules.moves_tags or (rules.wildcards and has_wildcard(caption)) for caption in captions]
    count = max(rules.variants, len(captions)) if any(random_for) else len(captions)
    draw = random.Random(seed)
    return tuple(_variant(captions[number % len(captions)], rules, draw) for number in range(count))


def _variant(caption: str, rules: CaptionRules, draw: random.Random) -> str:
    if rules.wildcards:
        caption = expand_wildcards(caption, draw)
    if rules.moves_tags:
        caption = rearrange_tags(caption, rules, draw)
    caption = "".join([rules.prefix, caption, rules.suffix])
    return with_trigger(tidy(caption), rules.trigger)


def with_trigger(caption: str, trigger: str) -> str:
    """Put the trigger word where `[trigger]` stands, or else first, unless the caption holds it as a whole word."""
    caption, trigger = caption.strip(), trigger.strip()
    if not trigger:
        return caption
    caption = caption.replace(TRIGGER_PLACE, trigger)
    if has_word(caption, trigger):
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


# ---------------------------------------------------------------------------------------------------------------------
# tags


def rearrange_tags(caption: str, rules: CaptionRules, draw: random.Random) -> str:
    """Drop tags and shuffle the rest. Kept are the first `keep_tokens`, or those before `keep_tokens_separator`."""
    kept, moving = split_kept(caption, rules.separator, rules.keep_tokens, rules.keep_tokens_separator)
    moving = drop_tags(moving, rules.tag_dropout, draw, rules.trigger)
    if rules.shuffle:
        draw.shuffle(moving)
    glue = rules.separator if rules.separator.endswith(" ") else f"{rules.separator} "
    return glue.join([*kept, *moving])


def split_kept(
    caption: str, separator: str, keep_tokens: int, keep_tokens_separator: str
) -> tuple[list[str], list[str]]:
    """The tags that stay where they are, and the others (kohya's keep_tokens and keep_tokens_separator)."""
    if keep_tokens_separator and keep_tokens_separator in caption:
        kept, _, moving = caption.partition(keep_tokens_separator)
        return split_tags(kept, separator), split_tags(moving, separator)
    all_tags = split_tags(caption, separator)
    return all_tags[:keep_tokens], all_tags[keep_tokens:]


def split_tags(caption: str, separator: str) -> list[str]:
    """The parts between separators, stripped, without empty ones."""
    return [tag for part in caption.split(separator.strip() or separator) if (tag := part.strip())]


def drop_tags(tags: Sequence[str], rate: float, draw: random.Random, trigger: str = "") -> list[str]:
    """Each tag is left out with this probability, one that holds the trigger never."""
    return [tag for tag in tags if draw.random() >= rate or (trigger and has_word(tag, trigger))]


# ---------------------------------------------------------------------------------------------------------------------
# wildcards


_INNERMOST = re.compile(r"\{([^{}|]*\|[^{}]*)\}")


def has_wildcard(caption: str) -> bool:
    return _INNERMOST.search(caption) is not None


def expand_wildcards(caption: str, draw: random.Random) -> str:
    """`{red|blue|}` becomes one of its parts, inner ones first (kohya's enable_wildcard; a part may be empty).

    Braces without a `|` are left as they are.
    """
    while found := _INNERMOST.search(caption):
        choice = draw.choice(found.group(1).split("|"))
        caption = caption[: found.start()] + choice + caption[found.end() :]
    return caption
