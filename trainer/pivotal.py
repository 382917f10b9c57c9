"""Pivotal tuning: the trigger becomes new tokens, whose embeddings are trained together with the adapter.

Textual inversion (Gal et al. 2022) and the weights' own change in one run. One trigger may have several tokens, side by
side; clients know such a file of vectors as an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .models import Base, NewTokens

NEW_TOKENS = ".token_embedding.new"
"""How the names of their parameters end."""
_START = "style"


class TokenEmbedding(nn.Module):
    """The embeddings of a frozen vocabulary, and those of new tokens, whose ids follow."""

    def __init__(self, own: nn.Embedding, new: Tensor) -> None:
        super().__init__()
        self.own = own
        self.new = nn.Parameter(new)
        """(tokens, width), fp32."""

    @property
    def weight(self) -> Tensor:
        return self.own.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, length) to (batch, length, width)."""
        count = self.own.num_embeddings
        known = self.own(ids.clamp(max=count - 1))
        fresh = self.new[(ids - count).clamp(min=0)].to(known.dtype)
        return torch.where((ids >= count)[..., None], fresh, known)


def add_tokens(base: Base, trigger: str, count: int, start: str) -> None:
    """Make a trigger `count` new tokens in all text encoders; they start from the embeddings of the words of `start`.

    Raises:
        ConfigError: if there are no words to start from, or they are more tokens than that.
    """
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders.values(), strict=True):
        words: list[int] = tokenizer(start or _START, add_special_tokens=False).input_ids  # pyright: ignore
        if not 0 < len(words) <= count:
            what = f"{start!r} is {len(words)} tokens long, for {count} new ones"
            fix = f"Give words of one to {count} tokens, or raise adapter.new_tokens."
            raise ConfigError(what, "adapter.token_init", fix)
        embeddings = _embeddings(encoder)
        own = embeddings.token_embedding
        new = own.weight.detach()[[words[number % len(words)] for number in range(count)]].float().clone()
        embeddings.token_embedding = TokenEmbedding(own, new)
        base.new_tokens = NewTokens(trigger, list(range(own.num_embeddings, own.num_embeddings + count)))
        _find_the_end_by_its_token(encoder, tokenizer.eos_token_id)


def _find_the_end_by_its_token(encoder: Any, eos_token_id: Any) -> None:
    """With the id 2, which old configurations have, the largest id counts as the end of a caption: a new token's."""
    for part in (encoder, getattr(encoder, "text_model", encoder)):
        if getattr(part, "eos_token_id", None) == 2:
            part.eos_token_id = eos_token_id


@contextmanager
def unread(base: Base) -> Iterator[None]:
    """Within the block the trigger is read as the untouched base reads it."""
    kept, base.new_tokens = base.new_tokens, None
    try:
        yield
    finally:
        base.new_tokens = kept


def token_embeddings(base: Base) -> dict[str, Tensor]:
    """The trained embeddings of the new tokens, (tokens, width), by component; empty if there are none."""
    found = {}
    for name, encoder in base.text_encoders.items():
        embedding = _embeddings(encoder).token_embedding
        if isinstance(embedding, TokenEmbedding):
            found[name] = embedding.new.detach()
    return found


def _embeddings(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder).embeddings
