"""A folder of rated pictures, as a run that refines another is shown them.

`better/` and `worse/` hold pairs, two pictures of one prompt under the same name; `up/` and `down/` single pictures.
Each has its prompt as its caption. `refining.py` writes such folders, and anybody else may.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...datasets.buckets import Shot
from ...datasets.dataset import Example
from ..errors import DataError, Problem

BETTER, WORSE, UP, DOWN = "better", "worse", "up", "down"
_FOLDERS = (BETTER, WORSE, UP, DOWN)


@dataclass(frozen=True)
class Rated:
    """What was said of examples that stand `in_order`. Each of the first `shown` is one unit of a batch: a thumb, or
    the better one of a pair, which takes the worse one along, so that no batch parts them."""

    shown: int
    worse: dict[int, int]
    """The place of the worse one by that of the better one."""
    down: frozenset[int]
    """The places of pictures with a thumb down."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Rated:
        """
        Raises:
            DataError: naming each picture that is in none of the folders, has no other one, or another prompt or shape
                than that.
        """
        if problems := list(_problems(examples)):
            raise DataError.of(problems)
        by_key = {_key(example): place for place, example in enumerate(examples)}
        worse = {
            place: by_key[_key(example, WORSE)] for place, example in enumerate(examples) if _folder(example) == BETTER
        }
        down = frozenset(place for place, example in enumerate(examples) if _folder(example) == DOWN)
        return cls(len(examples) - sum(_folder(example) == WORSE for example in examples), worse, down)

    def with_the_worse(self, shots: Sequence[Shot]) -> tuple[list[Shot], list[int]]:
        """The shots of a batch and, behind them, the worse pictures of its pairs; and of each the place of the unit it
        belongs to, from which all that is random of it is drawn."""
        paired = [place for place, shot in enumerate(shots) if shot.image in self.worse]
        others = [Shot(self.worse[shots[place].image], shots[place].number) for place in paired]
        return [*shots, *others], [*range(len(shots)), *paired]

    def signs(self, shots: Sequence[Shot]) -> list[int]:
        """Of each unit of a batch: 1 where its picture is to become likelier, -1 of a thumb down."""
        return [-1 if shot.image in self.down else 1 for shot in shots]

    def facts(self) -> dict[str, int]:
        """How much was said."""
        return {
            "pairs": len(self.worse),
            "thumbs_up": self.shown - len(self.worse) - len(self.down),
            "thumbs_down": len(self.down),
        }


def in_order(examples: Sequence[Example]) -> list[Example]:
    """Those that are shown first, and the worse ones of pairs behind them."""
    return sorted(examples, key=lambda example: _folder(example) == WORSE)


def _folder(example: Example) -> str:
    return example.name.partition("/")[0]


def _key(example: Example, folder: str = "") -> tuple[str, str]:
    """What a picture is found by: its data folder, and its name in it, or the one it would have in another folder."""
    name = example.name if not folder else f"{folder}/{example.name.partition('/')[2]}"
    return str(example.source.path), name


def _problems(examples: Sequence[Example]) -> Iterator[Problem]:
    by_key = {_key(example): example for example in examples}
    for example in examples:
        folder, path = _folder(example), str(example.item.path)
        if folder not in _FOLDERS:
            yield Problem(path, "lies in none of better/, worse/, up/ and down/", "Put it into one, or take it away.")
        elif folder in (BETTER, WORSE):
            other = by_key.get(_key(example, WORSE if folder == BETTER else BETTER))
            if other is None:
                missing = _key(example, WORSE if folder == BETTER else BETTER)[1]
                yield Problem(path, f"has no {missing} to be compared with", "Put it there, or take this one away.")
            elif folder == BETTER:
                yield from _unlike(path, example, other)


def _unlike(path: str, better: Example, worse: Example) -> Iterator[Problem]:
    if better.captions != worse.captions:
        what = f"has another prompt than {worse.name}, so that the two cannot be compared"
        yield Problem(path, what, "Give both the same caption.")
    if better.entry.buckets != worse.entry.buckets:
        what = f"has another shape than {worse.name}, so that the two cannot have the same noise"
        yield Problem(path, what, "Draw both in the same size.")
