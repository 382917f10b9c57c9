"""Adapters of every kind on a live base: no effect before training, then what they say, and the base at strength 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.trainer.adapter import (
    ADAPTER,
    adapter_state,
    base_weight,
    deltas,
    let_drop,
    load_adapter_state,
    scale_of,
    strength,
    tuner_layers,
)
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.config import AdapterSection, BlockSection
from lorasmith.trainer.delta import Delta, lora
from lorasmith.trainer.errors import ConfigError, UserError
from lorasmith.trainer.fitting import parameter_groups, parts, put_on
from lorasmith.trainer.full import trained_weights
from lorasmith.trainer.initial import look_at_data
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.strengths import Strengths

from . import tiny

ROUNDING = 2e-5  # of fp32, as a share of the answer
SMALL = {"rank": 4, "alpha": 8.0}
KINDS: dict[str, dict[str, Any]] = {
    "lora": SMALL,
    "lora on all layers": SMALL | {"targets": "all", "conv_rank": 2, "conv_alpha": 1.0},
    "rslora": SMALL | {"rslora": True},
    "dora": SMALL | {"kind": "dora", "targets": "all"},
    "loha": SMALL | {"kind": "loha", "targets": "all"},
    "lokr": SMALL | {"kind": "lokr", "targets": "all"},
    "lokr of two whole factors": {"kind": "lokr", "rank": 512, "alpha": 256.0},
    "oft": {"kind": "oft", "block_size": 4, "targets": "all-linear"},
    "boft": {"kind": "boft", "block_size": 4, "targets": "all"},
    "pissa": SMALL | {"init": "pissa", "targets": "all"},
    "olora": SMALL | {"init": "olora"},
    "gaussian": SMALL | {"init": "gaussian"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(params=["sd1", "sdxl"])
def base(request: pytest.FixtureRequest, folder: Path) -> Base:
    path = folder / request.param
    if not path.exists():
        tiny.MAKERS[request.param](path)
    return load_base(inspect_base(str(path)))


@torch.no_grad()
def answer(base: Base) -> Tensor:
    """What the UNet says to fixed noise and a caption with the trigger in it."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])
    return base.family.predict(base.unet, noise, torch.tensor([500]), base.encode(["a trg house"]), sizes)


@torch.no_grad()
def train_a_little(base: Base) -> None:
    """Any change of the weights will do."""
    torch.manual_seed(3)
    for parameter in trained_weights(base).values():
        parameter.add_(0.05 * torch.randn_like(parameter))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_begins_at_the_base_acts_as_it_says_and_is_gone_at_strength_0(kind: str, base: Base):
    plain = answer(base)
    weights = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    put_on(base, AdapterSection(**KINDS[kind]), seed=1)
    assert distance(answer(base), plain) < ROUNDING

    train_a_little(base)
    live = answer(base)
    assert distance(live, plain) > 10 * ROUNDING
    with strength(base, 0):
        assert distance(answer(base), plain) < ROUNDING
    assert torch.equal(answer(base), live)

    fresh = load_base(base.info)
    for component, module in base.components.items():
        for delta in deltas(module):
            weight = fresh.components[component].get_submodule(delta.name).weight
            if component == "unet":
                torch.testing.assert_close(weights[f"{delta.name}.weight"], base_weight(module, delta.name))
            weight.add_(delta.of(weight))
    assert distance(answer(fresh), live) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_is_a_share_of_the_change_of_every_weight_of_its_block(kind: str, base: Base):
    put_on(base, AdapterSection(**KINDS[kind]), seed=1)
    train_a_little(base)
    live, fresh = answer(base), load_base(base.info)
    strengths = Strengths(0.5, (("unet.up_blocks", 0.0), ("text_encoder", 1.0), ("*.attn2", -0.7)))
    for component, module in base.components.items():
        for delta in deltas(module):
            weight = fresh.components[component].get_submodule(delta.name).weight
            weight.add_(strengths.of(component, delta.name) * delta.of(weight))
    with strength(base, strengths):
        assert distance(answer(base), answer(fresh)) < ROUNDING
    assert torch.equal(answer(base), live)


def test_a_strength_of_a_block_that_is_not_trained_is_refused(base: Base):
    put_on(base, AdapterSection(train_only=["unet.up_blocks", "text_encoder"], **SMALL), seed=1)
    nowhere = Strengths(1.0, (("unet.down_blocks", 0.5),))
    with (
        pytest.raises(ConfigError, match=r"--block: unet\.down_blocks is no block of what is trained"),
        strength(base, nowhere),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_the_same_on_a_base_loaded_anew(kind: str, base: Base):
    put_on(base, AdapterSection(**KINDS[kind]), seed=1)
    train_a_little(base)
    other = load_base(base.info)
    put_on(other, AdapterSection(**KINDS[kind]), seed=2)
    load_adapter_state(other, adapter_state(base))
    assert distance(answer(other), answer(base)) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_fp32_on_a_bf16_base(kind: str, folder: Path):
    base = load_base(inspect_base(str(folder / "sd1")), torch.bfloat16)
    put_on(base, AdapterSection(**KINDS[kind]), seed=1)
    assert {parameter.dtype for parameter in trained_weights(base).values()} == {torch.float32}


def test_dropout_acts_in_training_alone(base: Base):
    put_on(base, AdapterSection(dropout=0.5, **SMALL), seed=1)
    train_a_little(base)
    live = answer(base)
    let_drop(base, True)
    assert not torch.equal(answer(base), live)
    let_drop(base, False)
    assert torch.equal(answer(base), live)


# ---------------------------------------------------------------------------------------------------------------------
# blocks and rates


def test_blocks_have_their_own_rank_alpha_and_rate(base: Base, short_run):
    config = short_run(
        base={"model": base.info.source},
        adapter={"rank": 4, "alpha": 8.0, "targets": "all", "conv_rank": 2},
        block=[{"path": "unet.mid_block", "rank": 2}, {"path": "unet.*.attn2", "alpha": 1.0, "lr": 5e-3}],
    )
    put_on(base, config.adapter, 1, config.block)
    of = {delta.name: delta for delta in deltas(base.unet)}
    assert scale_of(dict(tuner_layers(base.unet))["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]) == 2
    assert of["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].rank == 2  # alpha keeps its ratio
    assert of["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"].scale == 0.5
    assert of["mid_block.resnets.0.conv1"].rank == 2
    assert {delta.scale for name, delta in of.items() if ".attn2." in name and "mid" not in name} == {0.25}

    rates = {group["name"]: group["lr"] for group in parameter_groups(base, config)}
    encoders = dict.fromkeys(base.text_encoders, config.optimizer.text_encoder_lr)
    assert rates == {"unet": config.optimizer.lr, "unet.*.attn2": 5e-3, **encoders}
    unet = next(part for part in parts(base, config) if part.name == "unet")
    assert sum(unet.blocks.values()) == unet.parameters
    assert unet.effective_lr == pytest.approx([5e-3 * 0.25, 5e-3 * 0.5])


def test_lora_plus_lets_up_learn_faster(base: Base, short_run):
    config = short_run(base={"model": base.info.source}, optimizer={"loraplus_ratio": 16.0})
    put_on(base, config.adapter, 1)
    groups = {group["name"]: group for group in parameter_groups(base, config)}
    assert groups["unet up"]["lr"] == 16 * groups["unet"]["lr"] == 16 * config.optimizer.lr
    assert len(groups["unet up"]["params"]) == len(groups["unet"]["params"]) == len(list(deltas(base.unet)))


def test_only_layers_in_named_blocks_get_an_adapter(base: Base):
    put_on(base, AdapterSection(train_only=["unet.up_blocks", "text_encoder.encoder.layers.1"], **SMALL), seed=1)
    assert {delta.name.partition(".")[0] for delta in deltas(base.unet)} == {"up_blocks"}
    names = [delta.name for delta in deltas(base.text_encoders["text_encoder"])]
    assert names
    assert all("layers.1." in name for name in names)


def test_style_blocks_are_those_of_sdxl(base: Base):
    settings = AdapterSection(targets="style-blocks", text_encoder=False, **SMALL)
    if base.info.family != "sdxl":
        with pytest.raises(ConfigError, match="SDXL only"):
            put_on(base, settings, seed=1)
        return
    put_on(base, settings, seed=1)
    names = [delta.name for delta in deltas(base.unet)]
    assert names
    assert all(name.startswith("up_blocks.0.attentions.1.") and ".attn" in name for name in names)


def test_a_block_that_is_not_there_is_named(base: Base, short_run):
    with pytest.raises(ConfigError, match=r"unet\.nowhere is no block.*unet\.mid_block"):
        put_on(base, AdapterSection(train_only=["unet.nowhere"]), seed=1)
    config = short_run(base={"model": base.info.source}, block=[{"path": "unet.side_block", "rank": 2}])
    put_on(base, config.adapter, 1, config.block)
    with pytest.raises(ConfigError, match=r"block\.0\.path: unet\.side_block"):
        parts(base, config)


def test_rotations_that_do_not_fit_are_refused_with_the_size_that_does(base: Base):
    with pytest.raises(ConfigError, match=r"32 does not divide the (8|16) inputs.*block_size = \1\b"):
        put_on(base, AdapterSection(kind="oft"), seed=1)


# ---------------------------------------------------------------------------------------------------------------------
# where they begin


def a_change_of(base: Base, rank: int) -> Delta:
    name = next(delta.name for delta in deltas(base.unet))
    width = base.unet.get_submodule(name).in_features
    random = torch.Generator().manual_seed(5)
    down, up = torch.randn(rank, width, generator=random), torch.randn(width, rank, generator=random)
    return lora(name, down, up, alpha=3.0)


@pytest.fixture
def change(base: Base) -> Delta:
    other = load_base(base.info)
    put_on(other, AdapterSection(**SMALL), seed=1)
    return a_change_of(other, rank=2)


def test_an_adapter_starts_with_the_change_of_another_lora(base: Base, change: Delta):
    settings = AdapterSection(start_from="old.safetensors", **SMALL)
    put_on(base, settings, seed=1, start={"unet": [change]})
    found = {delta.name: delta for delta in deltas(base.unet)}
    weight = base_weight(base.unet, change.name)
    torch.testing.assert_close(found[change.name].of(weight), change.of(weight))
    others = [delta for name, delta in found.items() if name != change.name]
    assert not any(delta.up.any() for delta in others)


def test_a_lora_that_does_not_fit_is_no_start(base: Base, change: Delta):
    settings: dict[str, Any] = {"start_from": "old.safetensors"}
    with pytest.raises(ConfigError, match=r"larger than 1.*rank = 2"):
        put_on(base, AdapterSection(rank=1, alpha=1.0, **settings), seed=1, start={"unet": [change]})
    with pytest.raises(ConfigError, match=r"unet, which is not trained.*adapter\.unet = true"):
        put_on(load_base(base.info), AdapterSection(unet=False, **settings), seed=1, start={"unet": [change]})
    others = AdapterSection(train_only=["unet.up_blocks", "text_encoder"], **settings)
    with pytest.raises(ConfigError, match="not among what is trained"):
        put_on(load_base(base.info), others, seed=1, start={"unet": [change]})


def test_a_start_may_hold_layers_that_no_one_reads(base: Base, change: Delta):
    """Other trainers write the last layer of SDXL's first text encoder, which never learns."""
    unread = lora("encoder.layers.2.self_attn.q_proj", torch.ones(2, 32), torch.ones(32, 2), 2.0)
    idle = lora("somewhere", change.down, torch.zeros_like(change.up), 2.0)
    start = {"unet": [change, idle]} | ({"text_encoder": [unread]} if base.info.family == "sdxl" else {})
    put_on(base, AdapterSection(start_from="old.safetensors", **SMALL), seed=1, start=start)
    assert next(deltas(base.unet)).up.any()


@pytest.mark.parametrize("settings", [{"kind": "dora"}, {"init": "pissa"}, {"init": "olora"}])
def test_half_precision_leaves_the_base_as_it_is(settings: dict[str, Any], folder: Path, base: Base):
    half = load_base(base.info, torch.bfloat16)
    weights = {name: tensor.clone() for name, tensor in half.unet.state_dict().items()}
    put_on(half, AdapterSection(**(SMALL | settings)), seed=1)
    with strength(half, 0):
        for name, layer in tuner_layers(half.unet):
            weight: Any = layer.get_base_layer().weight
            assert torch.equal(weight, weights[f"{name}.weight"]), name
    if settings == {"kind": "dora"}:
        size = max(float(delta.of(base_weight(half.unet, delta.name)).abs().max()) for delta in deltas(half.unet))
        assert size < 1e-6


def test_eva_reads_along_the_main_directions_of_the_data(base: Base):
    """Layers that read the same take the same ones; convolutions, and ranks that are too large, stay."""
    blocks = [BlockSection(path="unet.mid_block", rank=2, alpha=2.0)]
    put_on(base, AdapterSection(targets="all", **SMALL), 1, blocks)
    layers = dict(tuner_layers(base.unet))
    told: list[tuple[int, int]] = []
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * 2)
    noises = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]

    @torch.no_grad()
    def forward(noise: Tensor) -> Tensor:
        text = base.encode(["a house", "two trees"])
        return base.family.predict(base.unet, noise, torch.tensor([500, 100]), text, sizes)

    plain = forward(noises[0])
    others = look_at_data(layers, noises, forward, ADAPTER, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(forward(noises[0]), plain)  # up is zero still
    assert {name for name in others if "time_emb_proj" in name or "conv" in name}
    assert not any(".attn" in name for name in others)
    adapted: dict[str, Any] = dict(layers)
    directions: dict[str, Tensor] = {name: layer.lora_A[ADAPTER].weight for name, layer in adapted.items()}
    attention = next(name.removesuffix("to_q") for name in layers if name.endswith("attn1.to_q") and "mid" not in name)
    query, key = (directions[attention + one] for one in ("to_q", "to_k"))
    assert torch.equal(query, key)
    torch.testing.assert_close(query @ query.T, torch.eye(4), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# new tokens


def test_the_trigger_becomes_tokens_of_its_own(base: Base):
    plain = answer(base)
    words = base.tokenize(["a TRG house, trgs"]).ids[0]
    put_on(base, AdapterSection(new_tokens=2, **SMALL), seed=1, trigger="trg")
    ids = base.tokenize(["a TRG house, trgs"]).ids[0]
    first = base.text_encoders["text_encoder"].config.vocab_size
    assert [i for i in ids[0].tolist() if i >= first] == [first, first + 1]
    assert torch.equal(base.tokenize(["a house"]).ids[0], load_base(base.info).tokenize(["a house"]).ids[0])

    train_a_little(base)
    live = answer(base)
    with strength(base, 0):
        assert distance(answer(base), plain) < ROUNDING
        assert torch.equal(base.tokenize(["a TRG house, trgs"]).ids[0], words)
    assert torch.equal(answer(base), live)

    encoders = Strengths(0.5, tuple((name, 0.0) for name in base.text_encoders))
    for strengths, read in ((Strengths(0.5), True), (Strengths(0.5, (("unet", 0.0),)), True), (encoders, False)):
        with strength(base, strengths):
            assert torch.equal(base.tokenize(["a TRG house, trgs"]).ids[0], words) is not read
    if base.info.family == "sdxl":
        with (
            pytest.raises(UserError, match="read by both text encoders or by none"),
            strength(base, Strengths(1.0, (("text_encoder_2", 0.0),))),
        ):
            pass


def test_captions_end_where_they_end_and_not_at_a_new_token(base: Base):
    """Old configurations let the largest id end a caption, and a new token's is larger."""
    for encoder in base.text_encoders.values():
        for part in (encoder, getattr(encoder, "text_model", encoder)):
            if hasattr(part, "eos_token_id"):
                part.eos_token_id = 2
    put_on(base, AdapterSection(new_tokens=1, token_init="red", **SMALL), seed=1, trigger="trg")
    new, red = base.encode(["a trg house"]), base.encode(["a red house"])
    torch.testing.assert_close(new.hidden, red.hidden)
    if new.pooled is not None:
        torch.testing.assert_close(new.pooled, red.pooled)


@pytest.mark.parametrize("words", [" ", "red and green"])
def test_new_tokens_start_from_as_many_words_at_most(words: str, base: Base):
    with pytest.raises(ConfigError, match=r"adapter\.token_init"):
        put_on(base, AdapterSection(new_tokens=2, token_init=words, **SMALL), seed=1, trigger="trg")
