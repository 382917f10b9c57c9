"""Captions longer than a text encoder reads are cut into chunks, as A1111 does with prompts, so that no word is lost.

CLIP reads 77 tokens: a start, 75 of the caption, an end. A longer caption becomes several such pieces, each encoded on
its own; cross-attention reads their embeddings one after the other. A piece ends at its last comma if that stands
within `BACKTRACK` tokens of the end, so that no tag is torn. A1111, Forge and ComfyUI chunk prompts in this way;
ComfyUI looks for the end of a word in place of a comma, so that words before a border may stand in the other piece.
"""

from __future__ import annotations

from collections.abc import Sequence

BACKTRACK = 20
"""A1111's default of "Prompt word wrap length limit" (`comma_padding_backtrack`)."""
COMMA = ",</w>"
"""The token, as CLIP's vocabulary writes it."""


def chunks_of(ids: Sequence[int], length: int, comma: int, backtrack: int = BACKTRACK) -> list[list[int]]:
    """Token ids without start and end to pieces of at most `length`; at least one, which may be empty.

    A1111's rule (`modules/sd_hijack_clip.py`, `tokenize_line`): when a piece is full and its last comma stands among
    its last `backtrack` tokens, what follows that comma moves on to the next piece. A comma that finds the piece full
    begins the next one.
    """
    chunks: list[list[int]] = [[]]
    last_comma = -1
    for token in ids:
        chunk = chunks[-1]
        if token == comma:
            last_comma = len(chunk)
        elif len(chunk) == length and last_comma != -1 and len(chunk) - last_comma <= backtrack:
            chunks[-1], moved = chunk[: last_comma + 1], chunk[last_comma + 1 :]
            chunks.append(moved)
            last_comma = -1
        if len(chunks[-1]) == length:
            chunks.append([])
            last_comma = -1
        chunks[-1].append(token)
    return chunks


def framed(chunk: Sequence[int], length: int, start: int, end: int, pad: int) -> list[int]:
    """A piece with its start and end, filled up to `length + 2` tokens."""
    return [start, *chunk, end, *[pad] * (length - len(chunk))]
