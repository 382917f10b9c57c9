"""What captions weigh in tokens of CLIP, whose vocabulary all Stable Diffusion bases share; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ..trainer.bases import POCKET
from .chunks import COMMA, chunks_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHUNK = 75
"""Tokens that a text encoder reads at once, without those that mark the start and the end."""

_RARE = 40_000
"""CLIP's 49,408 tokens are numbered about as often as they occur. Words from here on, such as `sks`, are so rare that
they are chosen as triggers; below are the words that people use."""


@dataclass(frozen=True)
class Weight:
    """A text in tokens."""

    tokens: int
    chunks: int
    """Pieces in which training reads it."""
    start: str
    """All that a program reads which cuts it off after the first 75 tokens."""


def weigh(text: str) -> Weight:
    """How many tokens a text has, and what becomes of it."""
    tokenizer = _tokenizer()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    end = len(text) if len(encoding.ids) <= CHUNK else encoding.offsets[CHUNK - 1][1]
    comma = tokenizer.token_to_id(COMMA)
    assert comma is not None
    return Weight(len(encoding.ids), len(chunks_of(encoding.ids, CHUNK, comma)), text[:end])


def is_common_word(word: str) -> bool:
    """Whether a word is one token, and not a rare one: then it means something to every base already."""
    encoding = _tokenizer().encode(word, add_special_tokens=False)
    return len(encoding.ids) == 1 and encoding.ids[0] < _RARE and word.isalpha()


@lru_cache
def _tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(POCKET / "tokenizer" / "tokenizer.json"))
