"""Memory foreseen on shapes, against what real steps on the CPU keep and take; settings that fit; a measured try."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lorasmith.trainer import activations
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.device import GIB, Device, binary, card, device_here
from lorasmith.trainer.dryrun import Live, Taken
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.fit import Fit, cheapest_fit
from lorasmith.trainer.footprint import Footprint, ForeseenRun, Item, Largest, Stage, footprint, state_bytes
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import Plan, make_plan
from lorasmith.trainer.probe import probe
from lorasmith.trainer.prospect import prospect
from lorasmith.trainer.techniques import techniques

from .command import lorasmith
from .tiny import make_sdxl

CPU = Device("cpu", "cpu", 2**40)
POCKET = {"model": "pocket"}
UNET_ALONE: dict[str, Any] = {"adapter": {"text_encoder": False}, "optimizer": {"text_encoder_lr": 0.0}}


def trainer_of(plan: Plan) -> Trainer:
    return Trainer(plan, create_run(plan.config), lambda event: None)


def weights_of(trainer: Trainer) -> list[Tensor]:
    """What is there before a step: weights, the VAE's as well, and gradients that are views of a whole."""
    modules = [*trainer.base.components.values(), trainer.base.vae]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return [*tensors, *(tensor.grad for tensor in tensors if tensor.grad is not None)]


def kept_by(trainer: Trainer, largest: Largest) -> int:
    """Bytes of all tensors that autograd saves in a real forward pass, each memory once, without the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in weights_of(trainer)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), trainer.accelerator.autocast():
        losses = trainer.loss(largest.shots, 0, 0)
    assert losses.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def taken_by(trainer: Trainer, largest: Largest) -> int:
    """The most bytes at any time of a real forward and backward pass, beyond the weights; of the second, for the first
    writes weights in other orders."""
    trainer._accumulated([list(largest.shots)], largest.images)
    trainer._zero_grad()
    with Live(weights_of(trainer)) as live:
        trainer._accumulated([list(largest.shots)], largest.images)
    return live.peak


def foreseen(plan: Plan) -> Taken:
    return ForeseenRun(plan, CPU).step()


# ---------------------------------------------------------------------------------------------------------------------
# activations


@pytest.mark.parametrize(
    "over",
    [
        UNET_ALONE | {"budget": {"batch": 1}},
        UNET_ALONE | {"budget": {"batch": 3}},
        UNET_ALONE | {"runtime": {"precision": "bf16"}},
        UNET_ALONE | {"runtime": {"precision": "bf16", "autocast": True}},
        UNET_ALONE | {"runtime": {"fast_lora": False, "cpu_kernels": False}},
        UNET_ALONE | {"runtime": {"base_weights": "int8"}},
        {"runtime": {"base_weights": "nf4", "precision": "bf16"}},
        {"budget": {"batch": 3}},
        {"adapter": {"targets": "all"}},
    ],
    ids=["one", "three", "bf16", "autocast", "plain", "int8", "nf4", "text", "convolutions"],
)
def test_what_a_step_keeps_is_foreseen(short_run: Callable[..., RunConfig], over: dict[str, Any]):
    plan = make_plan(short_run(**over))
    measured = kept_by(trainer_of(plan), Largest.of(plan))
    assert foreseen(plan).kept == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "over",
    [
        UNET_ALONE,
        UNET_ALONE | {"runtime": {"gradient_checkpointing": True}},
        UNET_ALONE | {"runtime": {"gradient_checkpointing": True, "checkpointed_blocks": 2}},
        {"runtime": {"gradient_checkpointing": True, "precision": "bf16"}},
        {"adapter": {"kind": "full", "rank": 16, "alpha": 16.0}, "optimizer": {"lr": 1e-5, "text_encoder_lr": 5e-6}},
        UNET_ALONE | {"runtime": {"flat_optimizer": False}},
        UNET_ALONE | {"runtime": {"base_weights": "int8", "precision": "bf16"}},
        {"runtime": {"base_weights": "nf4", "gradient_checkpointing": True}},
    ],
    ids=["lora", "checkpointing", "largest blocks", "both", "full", "single", "int8", "nf4"],
)
def test_the_peak_of_a_step_is_foreseen(short_run: Callable[..., RunConfig], over: dict[str, Any]):
    plan = make_plan(short_run(**over))
    assert foreseen(plan).peak == pytest.approx(taken_by(trainer_of(plan), Largest.of(plan)), rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lean_activations_are_foreseen(
    short_run: Callable[..., RunConfig], precision: str, monkeypatch: pytest.MonkeyPatch
):
    """All of them: none is large."""
    monkeypatch.setattr(activations, "FEW", 0)
    kept = []
    for is_lean in (True, False):
        runtime = {"precision": precision, "lean_activations": is_lean}
        plan = make_plan(short_run(name=f"run-{is_lean}", base=POCKET, **UNET_ALONE, runtime=runtime))
        kept.append(foreseen(plan).kept)
        assert kept[-1] == pytest.approx(kept_by(trainer_of(plan), Largest.of(plan)), rel=0.1)
    assert kept[0] < 0.8 * kept[1]


def test_an_sdxl_is_foreseen(short_run: Callable[..., RunConfig], tmp_path: Path):
    base = {"model": str(make_sdxl(tmp_path / "sdxl"))}
    plan = make_plan(short_run(base=base))
    trainer = trainer_of(plan)
    assert foreseen(plan).kept == pytest.approx(kept_by(trainer, Largest.of(plan)), rel=0.1)


def test_checkpointing_and_smaller_batches_take_less(short_run: Callable[..., RunConfig]):
    def size(**over: Any) -> int:
        runtime = {"precision": "bf16"} | over.pop("runtime", {})
        return footprint(make_plan(short_run(**UNET_ALONE, **over, runtime=runtime)), CPU).training.size

    usual, all_blocks = size(), size(runtime={"gradient_checkpointing": True})
    assert all_blocks < size(runtime={"gradient_checkpointing": True, "checkpointed_blocks": 2}) < usual
    assert size(budget={"batch": 1, "accumulate": 4}) < usual


# ---------------------------------------------------------------------------------------------------------------------
# weights


def test_weights_are_those_of_the_real_base(short_run: Callable[..., RunConfig]):
    plan = make_plan(short_run(runtime={"precision": "bf16", "vae_precision": "bf16"}))
    base = trainer_of(plan).base
    items = {item.name: item.size for item in footprint(plan, CPU).encoding.items}
    for name, module in {
        "UNet": base.unet,
        "text encoder": base.text_encoders["text_encoder"],
        "VAE": base.vae,
    }.items():
        frozen = [t for t in (*module.parameters(), *module.buffers()) if not t.requires_grad]
        assert items[name] == pytest.approx(sum(t.numel() * t.element_size() for t in frozen), rel=0.01)


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor", "adamw8bit"])
def test_the_state_of_an_optimizer_is_foreseen(short_run: Callable[..., RunConfig], kind: str):
    pytest.importorskip({"adamw8bit": "bitsandbytes"}.get(kind, "pytorch_optimizer"))
    plan = make_plan(short_run(optimizer={"kind": kind}, budget={"images": 2}))
    trainer = trainer_of(plan)
    trainer.train_step(next(plan.order.steps(plan.batches_per_step)))
    state = tree_leaves(trainer.optimizer.state_dict()["state"])
    kept = sum(one.numel() * one.element_size() for one in state if isinstance(one, Tensor))
    assert state_bytes(plan.config, [tuple(p.shape) for p in trainer.trained]) == pytest.approx(kept, rel=0.1)


def test_encoders_rest_while_a_gpu_trains(short_run: Callable[..., RunConfig]):
    found = footprint(make_plan(short_run(**UNET_ALONE)), card(8))
    names = {stage.name: [item.name for item in stage.items] for stage in found.stages}
    assert "VAE" not in names["training"]
    assert "text encoder" not in names["training"]
    assert "VAE" in names["encoding images"]
    assert "CUDA" in names["training"]
    assert "drawing previews" not in names


# ---------------------------------------------------------------------------------------------------------------------
# what fits


def fitted(plan: Plan, room: Callable[[Footprint], float]) -> dict[str, Any]:
    """The settings with which a run fits into a room that is told from what it takes as it is."""
    now = footprint(plan, card(8))
    device = Device("cuda", "a card", int(room(now)), is_here=False)
    fit = cheapest_fit(plan, device, now)
    assert fit.footprint.peak <= device.room
    assert all(change.why for change in fit.changes)
    return {change.setting: change.value for change in fit.changes}


@pytest.fixture
def roomy(short_run: Callable[..., RunConfig], pictures: Path) -> Plan:
    """A run on pictures that are large for its base, so that training takes more than encoding."""
    data = [{"path": str(pictures), "trigger": "trg", "resolution": 128}]
    over = {"budget": {"batch": 4, "accumulate": 1}, "buckets": {"max_ratio": 1.0}, "data": data}
    return make_plan(short_run(**UNET_ALONE, **over))


def test_what_fits_is_left_as_it_is(roomy: Plan):
    assert fitted(roomy, lambda now: now.peak) == {}


def test_fewer_pictures_at_once_come_first_and_a_step_stays_as_large(roomy: Plan):
    found = fitted(roomy, lambda now: max(now.encoding.size, now.training.size - 2**20))
    assert found["budget.batch"] * found["budget.accumulate"] == 4
    assert "runtime.gradient_checkpointing" not in found


@pytest.mark.parametrize(("room", "kind"), [(9, "int8"), (5, "nf4")])
def test_a_base_in_few_bits_comes_after_all_that_is_more_exact(roomy: Plan, room: int, kind: str):
    """Where nothing else makes room, for its weights are all that there is."""
    pytest.importorskip("bitsandbytes")

    def taken(plan: Plan, device: Device) -> Footprint:
        weights = {"full": 16, "int8": 8, "nf4": 4}[plan.config.runtime.base_weights]
        sizes = {"encoding": 1, "training": weights}
        encoding, training = (Stage(name, (Item("UNet", size * GIB, ""),)) for name, size in sizes.items())
        return Footprint(encoding, training, None)

    def fit_in(room: int) -> Fit:
        device = Device("cuda", "a card", room * GIB, is_here=False)
        return cheapest_fit(roomy, device, taken(roomy, device), taken)

    found = {change.setting: change.value for change in fit_in(room).changes}
    assert found["runtime.base_weights"] == kind
    others = {"runtime.gradient_checkpointing": True, "optimizer.kind": "adamw8bit"}
    assert {setting: found[setting] for setting in others} == others
    with pytest.raises(UserError, match=r"there are 3\.00 GiB"):
        fit_in(3)


@pytest.mark.parametrize(
    ("room", "meant"),
    [(9, {}), (5, {"runtime.vae_precision": "bf16"}), (3, {"sample.every": 0})],
    ids=["room", "half of the VAE", "no previews"],
)
def test_previews_are_decoded_in_half_precision_before_they_are_left_out(
    short_run: Callable[..., RunConfig], room: int, meant: dict[str, Any]
):
    plan = make_plan(short_run(**UNET_ALONE, sample={"every": 2, "prompts": ["an owl"]}))

    def taken(plan: Plan, device: Device) -> Footprint:
        runtime, sample = plan.config.runtime, plan.config.sample
        sizes = {"encoding": 1, "training": 2, "drawing": 8 if runtime.vae_precision == "fp32" else 4}
        encoding, training, drawing = (Stage(name, (Item("all", size * GIB, ""),)) for name, size in sizes.items())
        return Footprint(encoding, training, drawing if sample.every else None)

    device = Device("cuda", "a card", room * GIB, is_here=False)
    fit = cheapest_fit(plan, device, taken(plan, device), taken)
    assert {change.setting: change.value for change in fit.changes} == meant


def test_without_a_gpu_a_base_in_few_bits_is_whole_while_images_are_encoded(short_run: Callable[..., RunConfig]):
    plan = make_plan(short_run(base=POCKET, **UNET_ALONE, runtime={"base_weights": "int8"}))
    here = footprint(plan, CPU)
    whole, few = (next(item for item in stage.items if item.name == "UNet") for stage in (here.encoding, here.training))
    assert few.size < 0.8 * whole.size
    assert "in int8" in few.why


def test_a_gpu_has_but_one_of_encoders_and_unet_at_a_time(short_run: Callable[..., RunConfig]):
    """But for the UNet, which stays while previews are drawn; of the embedded base the text encoder takes more than the
    VAE with what it decodes."""
    plan = make_plan(short_run(**UNET_ALONE, sample={"every": 2, "prompts": ["an owl"]}))
    stages = {stage.name: {item.name for item in stage.items} for stage in footprint(plan, card(8)).stages}
    models = {"UNet", "VAE", "text encoder"}
    assert {name: items & models for name, items in stages.items()} == {
        "encoding images": {"VAE"},
        "training": {"UNet"},
        "drawing previews": {"UNet", "text encoder"},
    }


def test_what_fits_in_no_way_is_one_error_with_numbers(roomy: Plan):
    now = footprint(roomy, card(8))
    with pytest.raises(UserError) as caught:
        cheapest_fit(roomy, Device("cuda", "a card", GIB // 4, is_here=False), now)
    [problem] = caught.value.problems
    assert "even with the smallest settings (--set" in problem.what
    assert problem.what.endswith("there are 256 MiB")
    assert problem.where == "a card's memory"


# ---------------------------------------------------------------------------------------------------------------------
# techniques, and what is measured


@pytest.mark.parametrize(
    ("over", "off"),
    [
        (
            UNET_ALONE,
            {"channels_last", "compile", "gradient_checkpointing", "cuda_graphs", "base_weights", "attention by shape"},
        ),
        (
            {"runtime": {"cpu_kernels": False, "lean_activations": False}},
            {"cpu_kernels", "lean_activations", "cached captions", "steps ahead"},
        ),
        ({"adapter": {"dropout": 0.1}, "runtime": {"precision": "bf16"}}, {"fast_lora", "no autocast"}),
        ({"optimizer": {"kind": "lion"}, "adapter": {"kind": "loha"}}, {"fast_lora", "flat_optimizer"}),
    ],
    ids=["usual", "kernels", "dropout", "another"],
)
def test_techniques_are_told_with_their_reasons(
    short_run: Callable[..., RunConfig], over: dict[str, Any], off: set[str]
):
    found = {one["name"]: one for one in make_plan(short_run(**over)).facts()["techniques"]}
    assert {name for name, one in found.items() if not one["on"]} >= off
    assert all(one["why"] for one in found.values())
    assert len(found) == 15


@pytest.mark.parametrize(
    ("kind", "compiles", "told"),
    [
        ("lora", False, "frozen convolutions keep no input, norms keep theirs alone, gated units keep theirs alone"),
        ("lora", True, "frozen convolutions keep no input, norms keep theirs alone: "),
        ("full", False, "gated units keep theirs alone: "),
        ("full", True, ""),
    ],
)
def test_what_keeps_less_is_told(short_run: Callable[..., RunConfig], kind: str, compiles: bool, told: str):
    adapter = {"kind": kind, "rank": 16, "alpha": 16.0}  # their defaults: of a whole model there are none
    config = short_run(adapter=adapter, runtime={"compile": compiles})
    [found] = [one for one in techniques(config, False, "no", 1.0) if one.name == "lean_activations"]
    assert found.is_on == bool(told)
    assert found.why.startswith(told)


def test_a_probe_measures_the_largest_batch(short_run: Callable[..., RunConfig]):
    plan = make_plan(short_run(**UNET_ALONE))
    found = probe(plan, lambda event: None)
    assert found.largest.images == 2
    assert found.batch_seconds > 0
    assert found.peak > 2**27
    assert found.seconds(plan) == pytest.approx(plan.steps * 2 * found.batch_seconds)
    assert not (Path(plan.config.runs) / "probe").exists()


def test_a_plan_for_another_card_is_not_probed(short_run: Callable[..., RunConfig]):
    with pytest.raises(UserError, match="--vram plans for another card"):
        prospect(make_plan(short_run()), 8, True, lambda event: None)


def test_plan_tells_memory_fit_and_techniques(short_run: Callable[..., RunConfig], tmp_path: Path):
    from lorasmith.trainer.configfile import to_toml

    file = tmp_path / "mine.toml"
    file.write_text(to_toml(short_run()), encoding="utf-8")
    said = lorasmith(tmp_path, "plan", file, "--vram", 8).stdout
    assert "8.00 GiB of a card with 8 GB's memory in all" in said
    assert "fit: as it is" in said
    assert "on  fast_lora: each LoRA layer is one function" in said
    facts = json.loads(lorasmith(tmp_path, "plan", file, "--probe", "--json").stdout)
    assert facts["fits"]
    assert facts["probe"]["batch"] == 2
    assert facts["seconds"] >= 0
    assert {stage["stage"] for stage in facts["memory"]["stages"]} == {"encoding images", "training"}


def test_sizes_are_told_as_memory_is_counted():
    assert [binary(size) for size in (2**19, 340 * 2**20, 3 * GIB, 30 * GIB)] == [
        "0.5 MiB",
        "340 MiB",
        "3.00 GiB",
        "30.0 GiB",
    ]
    assert device_here().room > 0
