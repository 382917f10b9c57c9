"""Captions longer than a text encoder reads: the chunks of A1111, and what cross-attention gets of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from transformers import CLIPTokenizer

from lorasmith.datasets.chunks import BACKTRACK, COMMA, chunks_of
from lorasmith.trainer.bases import POCKET, inspect_base
from lorasmith.trainer.models import Base, load_base, same_length

from .tiny import MAKERS

COMMA_ID = 267
LONG = ", ".join(f"a {colour} {thing} on a {place}" for colour, thing, place in zip(
    ["red", "green", "blue", "yellow", "white", "black", "brown", "grey"] * 2,
    ["cat", "dog", "house", "tree", "boat", "car", "bird", "lamp"] * 2,
    ["hill", "table", "street", "wall"] * 4, strict=True,
))  # fmt: skip


def by_a1111(ids: list[int], length: int, comma: int, backtrack: int) -> list[list[int]]:
    """A plain account of the documented rule, one token after the other."""
    done: list[list[int]] = []
    current: list[int] = []
    comma_at = None
    for token in ids:
        is_comma, is_full = token == comma, len(current) == length
        if is_full and not is_comma and comma_at is not None and length - comma_at <= backtrack:
            done.append(current[: comma_at + 1])
            current, comma_at = current[comma_at + 1 :], None
        elif is_full:
            done.append(current)
            current, comma_at = [], None
        elif is_comma:
            comma_at = len(current)
        current.append(token)
    return [*done, current]


@given(some.lists(some.sampled_from([COMMA_ID, 1, 2, 3]), max_size=250), some.integers(2, 80), some.integers(0, 30))
def test_chunks_follow_the_documented_rule_and_lose_nothing(ids: list[int], length: int, backtrack: int):
    chunks = chunks_of(ids, length, COMMA_ID, backtrack)
    assert [token for chunk in chunks for token in chunk] == ids
    assert all(len(chunk) <= length for chunk in chunks)
    assert all(chunks) or chunks == [[]]
    assert chunks == by_a1111(ids, length, COMMA_ID, backtrack)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], [[]]),
        ([1] * 75, [[1] * 75]),
        ([1] * 76, [[1] * 75, [1]]),
        ([1] * 70 + [267] + [2] * 6, [[1] * 70 + [267], [2] * 6]),
        ([1] * 50 + [267] + [2] * 30, [[1] * 50 + [267] + [2] * 24, [2] * 6]),  # that comma is too far back
        ([1] * 75 + [267, 2], [[1] * 75, [267, 2]]),
    ],
    ids=["empty", "full", "one more", "at the last comma", "no comma nearby", "a comma too many"],
)
def test_golden_chunks(ids: list[int], expected: list[list[int]]):
    assert BACKTRACK == 20
    assert chunks_of(ids, 75, COMMA_ID) == expected


def test_the_comma_is_the_one_of_clips_vocabulary():
    assert CLIPTokenizer.from_pretrained(POCKET / "tokenizer").convert_tokens_to_ids(COMMA) == COMMA_ID


@pytest.fixture(scope="module", params=sorted(MAKERS))
def base(request, tmp_path_factory) -> Base:
    folder: Path = MAKERS[request.param](tmp_path_factory.mktemp("bases") / request.param)
    base = load_base(inspect_base(str(folder)))
    for tokenizer in base.tokenizers:
        tokenizer.model_max_length = 77  # as real ones have it
    return base


@torch.no_grad()
def test_cross_attention_reads_the_chunks_one_after_the_other(base: Base):
    """Each chunk of 75 has its own start and end and is encoded by the text encoders alone, as A1111 does it."""
    tokenizer = base.tokenizers[0]
    ids = tokenizer(LONG, add_special_tokens=False).input_ids
    chunks = by_a1111(ids, 75, COMMA_ID, 20)
    assert len(chunks) == 2
    assert [tokenizer.decode(chunk).count(",") for chunk in chunks] == [10, 5]
    rows = [
        [torch.tensor([[49406, *chunk, 49407, *[tok.pad_token_id] * (75 - len(chunk))]]) for chunk in chunks]
        for tok in base.tokenizers
    ]
    if base.info.family == "sdxl":
        outputs = [
            [encoder(row, output_hidden_states=True) for row in chunk_rows]
            for encoder, chunk_rows in zip(base.text_encoders.values(), rows, strict=True)
        ]
        expected = torch.cat([torch.cat([o.hidden_states[-2] for o in own], dim=1) for own in outputs], dim=2)
        pooled = outputs[1][0].text_embeds
    else:
        expected, pooled = torch.cat([base.text_encoders["text_encoder"](row)[0] for row in rows[0]], dim=1), None
    found = base.encode([LONG])
    assert found.hidden.shape[1] == 2 * 77
    torch.testing.assert_close(found.hidden, expected)
    if pooled is not None:
        torch.testing.assert_close(found.pooled, pooled)


@torch.no_grad()
def test_a_short_caption_is_read_as_the_tokenizer_alone_would_give_it(base: Base):
    for tokenizer, ids in zip(base.tokenizers, base.tokenize(["a red cat", ""]).ids, strict=True):
        plain = tokenizer(["a red cat", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert torch.equal(ids, plain)


@torch.no_grad()
def test_what_the_unet_predicts_for_a_caption_does_not_depend_on_its_neighbours(base: Base):
    """A short caption beside one of two chunks is repeated, which cross-attention does not notice."""
    short, both = base.encode(["a red cat"]), base.encode(["a red cat", LONG])
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, sizes = torch.tensor([300]), torch.tensor([[64, 64, 0, 0, 64, 64]])
    alone = base.family.predict(base.unet, noisy, t, short, sizes)
    together = base.family.predict(base.unet, noisy.repeat(2, 1, 1, 1), t.repeat(2), both, sizes.repeat(2, 1))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[1:], alone, atol=1e-3)


def test_captions_of_one_two_and_three_chunks_become_equally_long():
    stacked = same_length([torch.arange(n * 2.0).view(-1, 1) for n in (1, 2, 3)])
    assert stacked.shape == (3, 12, 1)
    assert stacked[0, :, 0].tolist() == [0, 1] * 6


def test_no_word_of_a_long_caption_is_lost(base: Base):
    """The last words of a caption of three chunks reach the conditions."""
    first, second = base.encode([f"{LONG}, {LONG}, a cat"]).hidden, base.encode([f"{LONG}, {LONG}, a dog"]).hidden
    assert first.shape[1] >= 3 * 77
    assert not torch.equal(first, second)
