"""What will be trained is told before anything is loaded, and is what is then trained; what cannot be, fails early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasmith.trainer.anatomy import foreseen_parts
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.fitting import parts, put_on
from lorasmith.trainer.models import load_base
from lorasmith.trainer.plan import make_plan

from . import tiny

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 2.0, "targets": "all", "conv_rank": 2},
    "dora": {"kind": "dora", "rank": 4, "alpha": 4.0},
    "loha": {"kind": "loha", "rank": 4, "alpha": 4.0, "targets": "all"},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 4.0, "targets": "all"},
    "oft": {"kind": "oft", "block_size": 4, "rank": 16, "alpha": 16.0},
    "boft": {"kind": "boft", "block_size": 4, "rank": 16, "alpha": 16.0, "targets": "all"},
    "pissa": {"init": "pissa", "rank": 4, "alpha": 4.0},
    "new tokens": {"new_tokens": 2, "rank": 4, "alpha": 4.0},
    "full": {"kind": "full", "rank": 16, "alpha": 16.0},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_is_foreseen_is_what_is_trained(family: str, adapter: str, tmp_path: Path, short_run):
    model = str(tiny.MAKERS[family](tmp_path / "base"))
    block = [] if adapter in ("full", "oft", "boft") else [{"path": "unet.mid_block", "lr": 1e-2}]
    config = short_run(base={"model": model}, adapter=ADAPTERS[adapter], block=block)
    foreseen = foreseen_parts(inspect_base(model), config)

    base = load_base(inspect_base(model))
    put_on(base, config.adapter, config.seed, config.block, config.trigger)
    assert foreseen == parts(base, config)
    assert all(sum(part.blocks.values()) == part.parameters for part in foreseen if part.blocks)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"adapter": {"train_only": ["unet.nowhere"]}}, "adapter.train_only"),
        (
            {"adapter": {"kind": "full", "rank": 16, "alpha": 16.0, "train_only": ["unet.nowhere"]}},
            "adapter.train_only",
        ),
        ({"block": [{"path": "unet.side_block", "rank": 2}]}, "block.0.path"),
        (
            {"adapter": {"targets": "style-blocks", "text_encoder": False}, "optimizer": {"text_encoder_lr": 0.0}},
            "targets",
        ),
        ({"adapter": {"kind": "oft", "rank": 16, "alpha": 16.0, "block_size": 7}}, "adapter.block_size"),
        ({"adapter": {"train_only": ["text_encoder"]}}, "adapter.train_only"),
        ({"adapter": {"new_tokens": 1, "token_init": "red and green"}}, "adapter.token_init"),
        ({"adapter": {"start_from": "nowhere.safetensors"}}, "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_trained_fails_in_the_plan(settings: dict[str, Any], place: str, short_run):
    with pytest.raises(UserError) as caught:
        make_plan(short_run(**settings))
    assert place in str(caught.value)
    assert all(problem.fix for problem in caught.value.problems)


def test_the_plan_tells_the_rate_that_remains_after_alpha_and_rank(short_run):
    over = {"adapter": {"rank": 8, "alpha": 2.0}, "optimizer": {"lr": 4e-4, "text_encoder_lr": 1e-4}}
    plan = make_plan(short_run(base={"model": "pocket"}, **over))
    unet, text = plan.facts()["trained"]
    assert unet["effective_lr"] == pytest.approx([1e-4, 1e-4])
    assert text["effective_lr"] == pytest.approx([2.5e-5, 2.5e-5])
    assert unet["blocks"].keys() == {
        f"unet.{b}" for b in ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1")
    }
