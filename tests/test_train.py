"""Training: what is asked for is what is trained, for every family, and stopping loses nothing."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.trainer import run
from lorasmith.trainer.adapter import adapter_state, strength
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import to_toml
from lorasmith.trainer.diagnosis.inspection import inspect
from lorasmith.trainer.errors import BaseModelError, RunError, TrainingError, UserError
from lorasmith.trainer.events import Event, EventLog, PlanMade, Step, read_events
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.models import load_base
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.sample import drawn_like

from . import tiny
from .conftest import trained_run


def train_weights(config: RunConfig) -> tuple[dict[str, Tensor], list[Event]]:
    """Train without an export; the adapter's weights and what happened."""
    plan, events = make_plan(config), []
    trainer = Trainer(plan, create_run(plan.config), events.append)
    assert trainer.train(lambda: False) == "finished"
    return adapter_state(trainer.base), events


def steps_of(events: list[Event]) -> list[Step]:
    return [event for event in events if isinstance(event, Step)]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_adapted_layer_of_every_family_learns(family, tmp_path, short_run):
    getattr(tiny, f"make_{family}")(tmp_path / "base")
    config = short_run(base={"model": str(tmp_path / "base")}, adapter={"targets": "all"})
    weights, events = train_weights(config)

    idle = [name for name, tensor in weights.items() if ".lora_B." in name and not tensor.any()]
    assert idle == []
    components = {name.split(".")[0] for name in weights}
    assert components == {"unet", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert all(math.isfinite(step.loss) for step in steps_of(events))


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"unet": True, "text_encoder": True}, {"unet", "text_encoder"}),
        ({"unet": True, "text_encoder": False}, {"unet"}),
        ({"unet": False, "text_encoder": True}, {"text_encoder"}),
    ],
    ids=["both", "unet alone", "text encoder alone"],
)
def test_only_the_chosen_parts_are_trained_and_said_to_be(adapter, expected, short_run):
    rates = {"lr": 1e-3 if adapter["unet"] else 0.0, "text_encoder_lr": 2e-3 if adapter["text_encoder"] else 0.0}
    weights, events = train_weights(short_run(adapter=adapter, optimizer=rates | {"schedule": "constant", "warmup": 0}))

    assert {name.split(".")[0] for name in weights} == expected
    plan = next(event for event in events if isinstance(event, PlanMade))
    assert {part["name"]: part["lr"] for part in plan.parts} == {
        name: rates["lr" if name == "unet" else "text_encoder_lr"] for name in expected
    }
    for part in plan.parts:
        mine = {name: tensor for name, tensor in weights.items() if name.startswith(part["name"] + ".")}
        assert part["parameters"] == sum(tensor.numel() for tensor in mine.values())
        assert part["modules"] == len(mine) / 2
    assert all(set(step.lr) == expected for step in steps_of(events))


def test_the_base_is_not_changed(short_run):
    plan = make_plan(short_run())
    trainer = Trainer(plan, create_run(plan.config), lambda event: None)
    trainer.train(lambda: False)
    with strength(trainer.base, 0):
        fresh = load_base(plan.base)
        for name, tensor in fresh.unet.state_dict().items():
            live = trainer.base.unet.state_dict()
            assert torch.equal(live[name if name in live else _wrapped(name)], tensor), name


def _wrapped(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}"


def test_adapters_are_fp32_on_a_bf16_base(short_run, tmp_path):
    base = {"model": str(tiny.make_sd1(tmp_path / "base", layers_per_block=1))}
    plan = make_plan(short_run(base=base, runtime={"precision": "bf16"}))
    trainer = Trainer(plan, create_run(plan.config), lambda event: None)
    assert trainer.base.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainer.trained} == {torch.float32}
    assert trainer.train(lambda: False) == "finished"


def test_cached_and_live_captions_train_alike(short_run):
    """With frozen text encoders the embeddings come from the cache; the first loss is that of encoding them anew."""
    frozen = {"adapter": {"text_encoder": False}, "optimizer": {"text_encoder_lr": 0.0}}
    _, cached = train_weights(short_run(**frozen))
    _, live = train_weights(short_run(name="live"))
    assert steps_of(cached)[0].loss == pytest.approx(steps_of(live)[0].loss, rel=1e-5)


def test_accumulating_is_the_same_as_a_larger_batch_of_the_same_images(short_run, pictures):
    """Each image counts the same, however it is batched; ragged batches included."""
    _, events = train_weights(short_run(budget={"images": 7, "batch": 4, "accumulate": 5}))
    step = steps_of(events)[0]
    plan = make_plan(short_run(name="again", budget={"images": 7, "batch": 4, "accumulate": 5}))
    trainer = Trainer(plan, create_run(plan.config), lambda event: None)
    batches = next(plan.order.steps(5))
    assert sorted({len(batch) for batch in batches}) != [4]  # there are ragged ones

    firsts = [sum(map(len, batches[:number])) for number in range(len(batches))]
    losses = [trainer.loss(batch, 0, first) for batch, first in zip(batches, firsts, strict=True)]
    assert step.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert step.images == sum(len(batch) for batch in batches)


def test_a_finished_run_is_extended_by_raising_its_budget(short_run):
    finished = run.train(make_plan(short_run(optimizer={"schedule": "constant"})), lambda event: None)
    steps = finished.run.status().steps
    with pytest.raises(RunError, match=r"budget\.images"):
        run.resume(finished.run, [], lambda event: None)
    run.resume(finished.run, ["budget.images=32"], lambda event: None)
    assert finished.run.status().step > steps
    assert finished.run.read_config().budget.images == 32


@pytest.mark.parametrize("change", ["adapter.rank=8", "seed=1", "optimizer.lr=1e-5"])
def test_resume_refuses_to_change_what_would_make_it_another_run(change, short_run):
    plan = make_plan(short_run())
    folder = create_run(plan.config)
    with pytest.raises(RunError, match=change.split("=")[0]):
        run.resume(folder, [change], lambda event: None)


def test_a_loss_that_is_not_finite_stops_at_once_and_names_the_files(tmp_path, short_run):
    tiny.make_sd1(tmp_path / "base")
    weights = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"].fill_(math.nan)
    save_file(tensors, weights, {"format": "pt"})

    plan = make_plan(short_run(base={"model": str(tmp_path / "base")}))
    with pytest.raises(TrainingError, match=r"picture \d\.png"):
        run.train(plan, lambda event: None)
    status = RunFolder(tmp_path / "runs/short").status()
    assert status.state == "failed"
    assert status.step == 0
    assert status.anew == ("optimizer.lr=0.0003", "optimizer.text_encoder_lr=0.0003")


def test_keep_leaves_the_newest_checkpoints(short_run):
    plan = make_plan(short_run(save={"every": 1, "keep": 2}))
    folder = create_run(plan.config)
    Trainer(plan, folder, lambda event: None).train(lambda: False)
    assert folder.saved_steps() == [plan.steps - 1, plan.steps]


def test_two_processes_take_the_same_steps_as_one(tmp_path, short_run):
    """Data parallel on CPUs: the same images and noise in each step, so the same losses."""
    losses = {}
    for processes in (1, 2):
        config = short_run(
            name=f"with {processes}",
            adapter={"text_encoder": False},
            budget={"images": 16, "batch": 2, "accumulate": 4 // processes},
            optimizer={"text_encoder_lr": 0.0},
            sample={"every": 2, "steps": 1, "prompts": ["emoji of owl"]},
        )
        file = tmp_path / f"{processes}.toml"
        file.write_text(to_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
        command += ["-m", "lorasmith.trainer.cli", "train", str(file)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        events = read_events(Path(config.runs) / config.name / "events.jsonl")
        losses[processes] = [record.event.loss for record in events if isinstance(record.event, Step)]
    assert len(losses[1]) > 1
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


def test_previews_start_with_the_untouched_base_and_say_how_they_were_made(short_run):
    from PIL import Image

    sample = {"every": 2, "steps": 2, "prompts": ["emoji of pizza"], "seed": 7}
    exact = {"cpu_kernels": False}  # they round otherwise than the base's
    plan = make_plan(short_run(base={"model": "pocket"}, sample=sample, runtime=exact))
    folder = create_run(plan.config)
    Trainer(plan, folder, lambda event: None).train(lambda: False)
    base = load_base(inspect_base("pocket"))
    from lorasmith.trainer.sample import Drawing, draw

    drawing = Drawing("", 7, 2, 7.0, 64)
    untouched = draw(base, ["emoji of pizza"], drawing)[0]
    with Image.open(folder.samples(0) / "00.png") as first, Image.open(folder.samples(plan.steps) / "00.png") as last:
        assert first.tobytes() == untouched.tobytes()
        assert last.tobytes() != first.tobytes()
        assert first.text["positive_prompt"] == "emoji of pizza"  # pyright: ignore[reportAttributeAccessIssue]
        assert first.text["seed"] == "7"  # pyright: ignore[reportAttributeAccessIssue]
        assert "Steps: 2, Sampler: DDIM, CFG scale: 7.0, Seed: 7" in first.text["parameters"]  # pyright: ignore[reportAttributeAccessIssue]


def test_strength_scales_the_effect(short_run):
    base = load_base(inspect_base("pocket"))
    put_on(base, short_run().adapter, seed=0)
    with torch.no_grad():
        for name, parameter in base.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
        layer = base.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
        x = torch.randn(1, 4, 160, generator=torch.Generator().manual_seed(0))
        full = layer(x)
        with strength(base, 0):
            none = layer(x)
        with strength(base, 0.5):
            half = layer(x)
        assert torch.allclose(none, layer.base_layer(x), atol=1e-6)
        assert torch.allclose(half - none, (full - none) / 2, atol=1e-6)
        assert torch.equal(layer(x), full)


def test_gradient_checkpointing_changes_no_result(short_run):
    plain, _ = train_weights(short_run())
    saving, _ = train_weights(short_run(name="saving", runtime={"gradient_checkpointing": True}))
    runtime = {"gradient_checkpointing": True, "checkpointed_blocks": 2}
    trainer = trained_run(short_run(name="partly", runtime=runtime))
    partly = adapter_state(trainer.base)
    assert all(torch.allclose(plain[name], saving[name], atol=1e-5) for name in plain)
    assert all(torch.allclose(plain[name], partly[name], atol=1e-5) for name in plain)
    unet = trainer.base.unet
    recomputing = [name for name, module in unet.named_modules() if getattr(module, "gradient_checkpointing", False)]
    assert {name.split(".")[0] for name in recomputing} == {"up_blocks", "down_blocks"}
    last = f"up_blocks.{len(unet.up_blocks) - 1}"
    assert {".".join(name.split(".")[:2]) for name in recomputing} == {last, "down_blocks.0"}


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_base_that_lacks_a_weight_is_refused_and_leaves_no_run(component, tmp_path, short_run):
    """The libraries would put random numbers in its place, and the run would train to its end."""
    tiny.make_sd1(tmp_path / "base")
    file = next((tmp_path / "base" / component).glob("*.safetensors"))
    tensors = load_file(file)
    lost = sorted(name for name in tensors if name.endswith("bias"))[0]
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BaseModelError, match="1 weights are missing"):
        run.train(make_plan(short_run(base={"model": str(tmp_path / "base")})), lambda event: None)
    assert not list((tmp_path / "runs").glob("*"))


def test_the_vae_is_loaded_in_full_precision(tmp_path):
    tiny.make_sd1(tmp_path / "base")
    full, half = (load_base(inspect_base(str(tmp_path / "base")), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.unet.dtype == torch.bfloat16
    theirs = half.vae.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in full.vae.state_dict().items())


def test_precision_may_change_at_resume(short_run, tmp_path):
    plan = make_plan(short_run(base={"model": str(tiny.make_sd1(tmp_path / "base", layers_per_block=1))}))
    folder = create_run(plan.config)
    trainer = Trainer(plan, folder, lambda event: None)
    trainer.train(lambda: trainer.state.step == 2)
    AcceleratorState._reset_state(reset_partial_state=True)
    run.resume(folder, ["runtime.precision=bf16"], lambda event: None)
    assert folder.status().state == "done"


def test_a_refused_resume_leaves_the_configuration_as_it_was(short_run, pictures):
    plan = make_plan(short_run())
    folder = create_run(plan.config)
    trainer = Trainer(plan, folder, lambda event: None)
    trainer.train(lambda: trainer.state.step == 2)
    before = folder.config.read_bytes()
    with pytest.raises(RunError, match=r"budget\.images is 1"):
        run.resume(folder, ["budget.images=1"], lambda event: None)
    (pictures / "picture 0.txt").write_text("another caption", encoding="utf-8")
    with pytest.raises(RunError, match="have changed"):
        run.resume(folder, ["save.every=1"], lambda event: None)
    assert folder.config.read_bytes() == before


def test_a_run_whose_images_have_moved_is_exported_and_resumed(tmp_path, short_run, pictures):
    plan = make_plan(short_run(save={"every": 1}))
    folder = create_run(plan.config)
    log = EventLog(folder.events)
    trainer = Trainer(plan, folder, log.append)
    trainer.train(lambda: trainer.state.step == 2)
    pictures.rename(tmp_path / "elsewhere")

    file, *_ = run.export_run(folder.path, 1, ["kohya"], tmp_path / "out", "fp16")
    said = inspect(file)["metadata"]
    assert file.name == "short-step000001.safetensors"
    assert said["ss_dataset_dirs"]["pictures"]["img_count"] == 7
    assert (tmp_path / "out/short-step000001.md").is_file()

    with pytest.raises(UserError, match="no such folder"):
        run.resume(folder, [], lambda event: None)
    run.resume(folder, [f"data.path={tmp_path / 'elsewhere'}"], lambda event: None)
    assert folder.status().state == "done"


def test_previews_of_other_prompts_are_never_paired(short_run):
    settings = {"every": 2, "steps": 1, "prompts": ["emoji of owl"]}
    finished = run.train(make_plan(short_run(sample=settings)), lambda event: None)
    run.resume(finished.run, ["budget.images=24", 'sample.prompts=["emoji of snake"]'], lambda event: None)
    base, last = (drawn_like(finished.run.samples(step)) for step in (0, finished.run.status().step))
    assert base == last
    assert base[0].startswith("emoji of snake\n")


def test_asking_to_stop_before_the_first_step_stops_before_it(short_run):
    plan = make_plan(short_run())
    folder = create_run(plan.config)
    trainer = Trainer(plan, folder, lambda event: None)
    assert trainer.train(lambda: True) == "stopped"
    assert folder.saved_steps() == [0]
    run.resume(folder, [], lambda event: None)
    assert folder.status().state == "done"
