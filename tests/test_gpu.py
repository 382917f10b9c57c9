"""What only a GPU can show: each setting for GPUs trains what a plain run trains, and a run fits as it was foreseen.

`python -m pytest tests/test_gpu.py -rA` on a computer with an NVIDIA card; elsewhere all of it is skipped. Numbers are
alike and no more than that, for a GPU adds up in any order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from lorasmith.trainer.bench.case import Case, base_and_side, make_pictures
from lorasmith.trainer.bench.peaks import reserved
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import merge, validate, write_config
from lorasmith.trainer.device import device_here
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.events import Event, Step
from lorasmith.trainer.footprint import footprint
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.models import Base
from lorasmith.trainer.plan import check_devices, make_plan
from lorasmith.trainer.rerun import verify_resume
from lorasmith.trainer.run import train

from .test_shelf import watched

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

STEPS = 12
TEXT = {"adapter": {"text_encoder": True}, "optimizer": {"text_encoder_lr": 1e-4}}
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({"runtime": {"precision": "fp32"}}, 0.02),
    "fp16": ({"runtime": {"precision": "fp16"}}, 0.03),
    "autocast": ({"runtime": {"autocast": True}}, 0.02),
    "cuda graphs": ({"runtime": {"cuda_graphs": True}}, 0.01),
    "cuda graphs, text encoder": (TEXT | {"runtime": {"cuda_graphs": True}}, 0.02),
    "compiled": ({"runtime": {"compile": True}}, 0.02),
    "compiled, 8 bits": ({"runtime": {"compile": True, "base_weights": "int8"}}, 0.03),
    "8 bits": ({"runtime": {"base_weights": "int8"}}, 0.03),
    "4 bits": ({"runtime": {"base_weights": "nf4"}}, 0.15),
    "channels last": ({"runtime": {"channels_last": True}}, 0.01),
    "recomputed": ({"runtime": {"gradient_checkpointing": True}}, 0.01),
    "peft's layers": ({"runtime": {"fast_lora": False}}, 0.02),
    "all activations": ({"runtime": {"lean_activations": False}}, 0.01),
    "matrices one by one": ({"runtime": {"flat_optimizer": False}}, 0.01),
    "dora": ({"adapter": {"kind": "dora"}}, 0.05),
    "adamw in 8 bits": ({"optimizer": {"kind": "adamw8bit"}}, 0.05),
    **{f"attention by {name}": ({"runtime": {"attention": name}}, 0.01) for name in ("flash", "cudnn", "efficient")},
    "attention by xformers": ({"runtime": {"attention": "xformers"}}, 0.01),
    "attention as PyTorch chooses": ({"runtime": {"attention": "sdpa"}}, 0.01),
}
"""With the largest relative difference of the losses of a plain run in bf16."""


def a_run(folder: Path, name: str, over: dict[str, Any], case: Case | None = None) -> RunConfig:
    """A run of a bench, on random pictures, with settings laid over."""
    config = (case or Case(precision="bf16", batch=2)).config(folder, name, STEPS)
    if not (folder / "pictures").exists():
        make_pictures(config, base_and_side(config)[1])
    return validate(merge(config.model_dump(exclude_unset=True), over))


def losses_of(config: RunConfig) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision may be another
    told: list[Event] = []
    plan = make_plan(config)
    Trainer(plan, create_run(plan.config), told.append).train(lambda: False)
    return [event.loss for event in told if isinstance(event, Step)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_trains_what_a_plain_run_trains(setting: str, tmp_path: Path):
    over, most = SETTINGS[setting]
    config = a_run(tmp_path, "other", over)
    try:
        check_devices(config)
    except UserError as error:
        pytest.skip(str(error))
    usual = losses_of(a_run(tmp_path, "usual", TEXT if "text encoder" in setting else {}))
    found = losses_of(config)
    assert len(found) == len(usual) == STEPS
    assert found == pytest.approx(usual, rel=most)


def test_half_precision_stays_with_fp32_for_long(tmp_path: Path):
    """Over 200 steps: the mean of the last fifty is the same within two hundredths."""
    means = []
    for precision in ("bf16", "fp32"):
        config = a_run(tmp_path, precision, {"runtime": {"precision": precision}})
        config.budget.images = 400
        means.append(sum(losses_of(config)[-50:]) / 50)
    assert means[0] == pytest.approx(means[1], rel=0.02)


@pytest.mark.parametrize("over", [{}, {"runtime": {"cuda_graphs": True}}], ids=["one by one", "recorded"])
def test_n_and_n_steps_equal_2_n(over: dict[str, Any], tmp_path: Path):
    file = tmp_path / "run.toml"
    write_config(a_run(tmp_path, "run", over), file)
    verdict = verify_resume(file, [], 10, lambda what: None)
    assert verdict.is_equal, verdict.facts()


def test_an_export_is_verified(tmp_path: Path):
    """Which `train` does, and else fails."""
    sample = {"every": STEPS, "prompts": ["a red house"], "steps": 4}
    exports = train(make_plan(a_run(tmp_path, "run", {"sample": sample})), lambda event: None).exports
    assert any(path.suffix == ".safetensors" for path in exports)


def test_encoders_are_there_while_they_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And the UNet once they have read what is cached."""
    seen = watched(monkeypatch, devices)
    losses_of(a_run(tmp_path, "run", {"sample": {"every": STEPS, "prompts": ["a red house"], "steps": 2}}))
    assert seen == {
        "posterior": {("cuda", "cpu", "cpu")},
        "encode": {("cpu", "cuda", "cpu"), ("cpu", "cuda", "cuda")},  # captions, then prompts
        "denoising": {("cpu", "cpu", "cuda")},
        "decode": {("cuda", "cpu", "cuda")},
        "loss": {("cpu", "cpu", "cuda")},
    }


def devices(base: Base) -> tuple[str, ...]:
    """Of VAE, text encoder and UNet."""
    return tuple(module.device.type for module in (base.vae, base.text_encoders["text_encoder"], base.unet))


@pytest.mark.parametrize("over", [{}, {"runtime": {"gradient_checkpointing": True}}], ids=["usual", "recomputed"])
def test_memory_is_foreseen_within_a_tenth(over: dict[str, Any], tmp_path: Path):
    """Of tensors and what PyTorch keeps at hand; what CUDA itself takes beside them is not seen by PyTorch."""
    config = a_run(tmp_path, "run", over, Case("random:sd15", resolution=512, precision="bf16", batch=2))
    plan = make_plan(config)
    foreseen = footprint(plan, device_here()).training
    beside = next(item.size for item in foreseen.items if item.name == "CUDA")
    torch.cuda.empty_cache()
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(plan, create_run(plan.config), lambda event: None)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train(lambda: trainer.state.step == 3)
    taken = reserved(trainer.accelerator.device)
    assert taken is not None
    assert foreseen.size - beside == pytest.approx(taken, rel=0.1)
