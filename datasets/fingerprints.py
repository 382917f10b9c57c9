"""What tells one set of images from another, image by image, so that a change can be named."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from .dataset import Example

_NAMED = 3
_LENGTH = 16  # digits; every checkpoint holds five hashes of each image
_CHANGED = {
    "picture": "another file",
    "captions": "another caption",
    "views": "another crop, flip or colour",
    "mask": "another mask",
    "weights": "another weight or caption dropout",
}


@dataclass(frozen=True)
class Fingerprint:
    """Of one image: a hash of each thing that decides how it is trained."""

    name: str
    """The path below its data folder. It decides nothing: a folder may be moved, and a file renamed in its place."""
    picture: str
    captions: str
    views: str
    mask: str
    weights: str
    """How often it is shown, how often without its caption, and how much its loss counts."""

    @classmethod
    def of(cls, example: Example) -> Fingerprint:
        item, source = example.item, example.source
        return cls(
            name=example.name,
            picture=item.sha256[:_LENGTH],
            captions=_short(example.captions),
            views=_short([astuple(view) for view in example.views]),
            mask=_short([item.mask.sha256 if item.mask else "", example.is_masked, source.unmasked_weight]),
            weights=_short([example.entry.shows, example.caption_dropout, source.loss_weight]),
        )


def fingerprint(images: Sequence[Fingerprint]) -> str:
    """A hash of everything that decides what is trained on: of all images, and of their order."""
    return _hash([astuple(image)[1:] for image in images])


def changes(before: Sequence[Fingerprint], now: Sequence[Fingerprint]) -> list[str]:
    """What differs between two sets, in words, with a few names each: `added: a.png, b.png, c.png and 4 more`."""
    old, new = _by_name(before), _by_name(now)
    told = {"added": new.keys() - old.keys(), "removed": old.keys() - new.keys()}
    for aspect, words in _CHANGED.items():
        told[words] = {key for key in new.keys() & old.keys() if getattr(old[key], aspect) != getattr(new[key], aspect)}
    return [f"{words}: {_some(keys)}" for words, keys in told.items() if keys] or ["they come in another order"]


def _by_name(images: Sequence[Fingerprint]) -> dict[tuple[str, int], Fingerprint]:
    """Each image by its name; several folders may hold one of the same, so how many came before belongs to it."""
    before: Counter[str] = Counter()
    named = {}
    for image in images:
        named[image.name, before[image.name]] = image
        before[image.name] += 1
    return named


def _some(keys: Collection[tuple[str, int]]) -> str:
    names, more = [name for name, _ in sorted(keys)[:_NAMED]], len(keys) - _NAMED
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def _short(values: Any) -> str:
    return _hash(values)[:_LENGTH]


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
