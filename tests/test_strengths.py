"""How strongly a change acts: numbers for blocks, of which the last that holds a layer counts."""

from __future__ import annotations

import pytest

from lorasmith.trainer.errors import ConfigError, UserError
from lorasmith.trainer.strengths import Strengths

LAYERS = [
    ("unet", "down_blocks.0.attentions.0.attn1.to_q"),
    ("unet", "up_blocks.1.attentions.0.attn2.to_q"),
    ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
]


def test_the_last_block_that_holds_a_layer_counts():
    strengths = Strengths.parse(0.8, ["unet=0.5", "unet.*.attn2=-1", "text_encoder.encoder.layers.0 = 2"])
    assert [strengths.of(*layer) for layer in LAYERS] == [0.5, -1, 2]
    assert strengths.of("text_encoder", "encoder.layers.0.mlp.fc1") == 2  # as older libraries name it
    assert strengths.of("text_encoder", "encoder.layers.1.mlp.fc1") == 0.8
    assert str(strengths) == "0.8, 0.5 in unet, -1 in unet.*.attn2, 2 in text_encoder.encoder.layers.0"


@pytest.mark.parametrize("text", ["", "unet", "=0.5", "unet=", "unet=much", "unet=nan", "unet=inf"])
def test_what_is_no_strength_of_a_block_is_refused(text: str):
    with pytest.raises(UserError, match=r"--block: .* is no strength of a block\. Write a block and a number"):
        Strengths.parse(1.0, [text])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(number: float):
    with pytest.raises(UserError, match=r"--strength: .* is no strength"):
        Strengths.parse(number)


def test_a_block_without_a_layer_is_refused_with_those_that_are_there():
    with pytest.raises(ConfigError, match=r"--block: unet\.mid_block is no block.*unet\.down_blocks\.0") as caught:
        Strengths.parse(1.0, ["unet.mid_block=0", "unet=0.5", "vae=0"]).refuse_idle(LAYERS)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("blocks", [[], ["unet=0"]])
def test_something_has_to_be_left(blocks: list[str]):
    with pytest.raises(UserError, match="--strength: at strength 0 nothing is left"):
        Strengths.parse(0.0, blocks).refuse_nothing(LAYERS)
    Strengths.parse(0.0, [*blocks, "unet.up_blocks=0.1"]).refuse_nothing(LAYERS)
