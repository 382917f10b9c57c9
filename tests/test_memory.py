"""When the memory is full, and when numbers are no numbers: the run goes on with the same result, or ends with what it
has saved as good as before.

The memory is made full from within the models themselves, by hooks on their layers and tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from lorasmith.datasets.buckets import BucketRules, Shot
from lorasmith.datasets.cache import LatentCache, TextCache, _pixels_of, encode, encode_what_fits
from lorasmith.datasets.dataset import Source, load_examples
from lorasmith.trainer import run
from lorasmith.trainer.adapter import adapter_state
from lorasmith.trainer.averages import Averages
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.checkpoint import load_checkpoint
from lorasmith.trainer.config import OptimizerSection, RunConfig
from lorasmith.trainer.configfile import to_toml
from lorasmith.trainer.console import print_plan
from lorasmith.trainer.errors import DataError, TrainingError
from lorasmith.trainer.events import Checkpointed, Event, Sampled, Step, Warned
from lorasmith.trainer.fitting import parameter_groups
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.memory import in_halves, is_full, parts_of, until_it_fits, where_it_fits
from lorasmith.trainer.models import Base, _in_fp32, load_base
from lorasmith.trainer.optim import make_optimizer
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.sample import Drawing, draw
from lorasmith.ui.html import esc
from lorasmith.ui.planner import Planned
from lorasmith.ui.train.plancard import Foreseen

from .test_accumulation import SQUARE, WIDE, assert_close


def gpu_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def take_it_all() -> None:
    """No computer has so much: what the CPU's own allocator raises."""
    torch.empty(2**60)


@pytest.fixture
def a_run(tiny_base: Path, short_run):
    """A function that gives a short run on a tiny base, in whose steps AdamW hides no difference of the gradients: with
    a large eps they are as long as these."""

    def make(name: str = "short", **over: Any) -> RunConfig:
        optimizer = {"lr": 1.0, "text_encoder_lr": 1.0, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
        optimizer |= {"options": {"eps": 1.0}} | over.pop("optimizer", {})
        return short_run(name=name, base={"model": str(tiny_base)}, optimizer=optimizer, **over)

    return make


def trainer_of(config: RunConfig, emit: Callable[[Event], None] = lambda event: None) -> Trainer:
    plan = make_plan(config)
    return Trainer(plan, create_run(plan.config), emit)


def in_forward(unet: nn.Module, most: int, fail: Callable[[], None]) -> None:
    """No memory for more than `most` images in the UNet's last layer."""
    layer = unet.get_submodule("conv_out")
    layer.register_forward_pre_hook(lambda _, given: fail() if len(given[0]) > most else None)


def in_backward(unet: nn.Module, most: int, fail: Callable[[], None]) -> None:
    """No memory for more than `most` images' gradients in the middle of the UNet, where some are made already."""

    def watch(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        del given
        if torch.is_grad_enabled():
            output.register_hook(lambda gradient: fail() if len(gradient) > most else None)

    unet.get_submodule("mid_block").register_forward_hook(watch)


def sizes_seen(base: Base) -> list[int]:
    """Filled with how many images are in each batch that the UNet is given."""
    seen: list[int] = []
    base.unet.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    return seen


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All that a step changes: weights, their average, and what the optimizer keeps."""
    with trainer.as_it_is_used():
        used = {f"used {name}": tensor.clone() for name, tensor in adapter_state(trainer.base).items()}
    moments = trainer.optimizer.state_dict()["state"]
    kept = {f"{key} of {number}": own[key] for number, own in moments.items() for key in own}
    return adapter_state(trainer.base) | used | kept


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def changes(trainer: Trainer, steps: list[list[list[Shot]]]) -> dict[str, Tensor]:
    before = adapter_state(trainer.base)
    for batches in steps:
        trainer.train_step(batches)
    return {name: tensor - before[name] for name, tensor in adapter_state(trainer.base).items()}


def warnings_in(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Warned)]


# ---------------------------------------------------------------------------------------------------------------------
# what is done with a full memory, without a model


def fits(most: int, tried: list[int]) -> Callable[[int], str]:
    def work(at_once: int) -> str:
        tried.append(at_once)
        if at_once > most:
            gpu_is_full()
        return f"made of {at_once}"

    return work


@pytest.mark.parametrize(
    ("start", "most", "tried"), [(8, 8, [8]), (8, 3, [8, 4, 2]), (7, 1, [7, 4, 2, 1]), (5, 3, [5, 3])]
)
def test_what_does_not_fit_is_halved_until_it_does(start: int, most: int, tried: list[int]):
    seen, undone = [], []
    made, at_once = until_it_fits(fits(most, seen), start, lambda: undone.append(seen[-1]))
    assert (made, at_once, seen) == (f"made of {tried[-1]}", tried[-1], tried)
    assert undone == tried[:-1]


def test_what_does_not_fit_alone_fails_and_is_not_undone():
    seen, undone = [], []
    with pytest.raises(torch.OutOfMemoryError):
        until_it_fits(fits(0, seen), 2, lambda: undone.append(1))
    assert (seen, len(undone)) == ([2, 1], 1)


def test_the_failed_try_is_out_of_memory_before_the_next():
    """The error that it ended with holds on to all that it had; the next one must not begin before that is gone."""
    left: list[weakref.ref[Tensor]] = []

    def work(at_once: int) -> int:
        assert all(tensor() is None for tensor in left)
        large = torch.zeros(at_once)
        left.append(weakref.ref(large))
        if at_once > 1:
            gpu_is_full()
        return at_once

    assert until_it_fits(work, 4, lambda: None) == (1, 1)
    assert in_halves(lambda some: [work(len(some))], range(4)) == [1, 1, 1, 1]
    assert len(left) == 3 + 7


def test_halves_come_back_in_order():
    tried: list[list[str]] = []

    def work(letters) -> list[str]:
        tried.append(list(letters))
        if len(letters) > 2:
            take_it_all()
        return [letter.upper() for letter in letters]

    assert in_halves(work, list("abcdef")) == list("ABCDEF")
    assert ["".join(some) for some in tried] == ["abcdef", "abc", "ab", "c", "def", "de", "f"]


def test_another_error_is_raised_at_once():
    def work(_: object) -> Any:
        tried.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    tried: list[int] = []
    with pytest.raises(RuntimeError, match="mat1"):
        until_it_fits(work, 8, lambda: None)
    with pytest.raises(RuntimeError, match="mat1"):
        in_halves(work, range(8))
    assert len(tried) == 2


def test_a_full_memory_is_recognised_by_the_words_that_libraries_have_for_it():
    with pytest.raises(RuntimeError) as of_torch:
        take_it_all()
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**50)
    full = [of_torch.value, of_numpy.value, torch.OutOfMemoryError("CUDA out of memory")]
    full += map(RuntimeError, ["MPS backend out of memory (MPS allocated: 9.0 GB)", "CUDA error: out of memory"])
    assert all(map(is_full, full))
    assert not is_full(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_full(OSError(28, "No space left on device"))


def test_parts_are_of_one_batch_and_know_their_place():
    batches = ["abcde", "fg", "h"]
    assert parts_of(batches, 5) == [(0, "abcde"), (5, "fg"), (7, "h")]
    assert parts_of(batches, 2) == [(0, "ab"), (2, "cd"), (4, "e"), (5, "fg"), (7, "h")]
    assert parts_of(batches, 1) == list(enumerate("abcdefgh"))


# ---------------------------------------------------------------------------------------------------------------------
# in a step

STEPS = [[SQUARE, WIDE], [SQUARE[:3], SQUARE[3:]], [WIDE, SQUARE]]
"""Batches of 4, 2, 3 and 1."""


def test_a_step_that_does_not_fit_is_taken_in_halves_with_the_same_result(a_run):
    """Bit for bit as if the batches had been given in halves, and to rounding as if there had been room."""
    averaged = {"optimizer": {"ema_decay": 0.5}, "budget": {"batch": 4}}
    whole, halves = trainer_of(a_run("whole", **averaged)), trainer_of(a_run("halves", **averaged))
    unbroken = changes(whole, STEPS)
    changes(halves, [[[*part] for _, part in parts_of(step, 2)] for step in STEPS])

    for limit, fail in ((in_forward, take_it_all), (in_backward, gpu_is_full)):
        events: list[Event] = []
        full = trainer_of(a_run(limit.__name__, **averaged), events.append)
        limit(full.base.unet, 2, fail)
        seen = sizes_seen(full.base)
        made = changes(full, STEPS)
        assert_same(state_of(full), state_of(halves))
        assert_close(made, unbroken)
        assert full.state.images == whole.state.images == sum(len(batch) for step in STEPS for batch in step)
        assert seen == [4, 2, 2, 2, 2, 1, 1, 2, 2, 2]  # the one that failed, and never again
        assert full.state.at_once == 2
        assert warnings_in(events) == [
            "the computer's memory was full at step 1; from now on batches of 4 are taken 2 images at a time, "
            "with the same result"
        ]


def test_a_batch_in_the_middle_of_a_step_that_does_not_fit_leaves_no_gradient_behind(a_run):
    """The gradients of the batches before it were there already, where accelerate keeps them to the end of a step. What
    the adapter drops is drawn for each part, and that is told."""
    drops: dict[str, Any] = {"adapter": {"dropout": 0.5}, "budget": {"batch": 4}}
    events: list[Event] = []
    full, halves = trainer_of(a_run("full", **drops), events.append), trainer_of(a_run("halves", **drops))
    in_backward(full.base.unet, 3, gpu_is_full)
    changes(full, [[WIDE, SQUARE, WIDE]])
    changes(halves, [[WIDE, SQUARE[:2], SQUARE[2:], WIDE]])
    assert_same(state_of(full), state_of(halves))
    [told] = warnings_in(events)
    assert told.endswith("with the same result but for the adapter's dropout, which is drawn for each part")


@pytest.mark.exhaustive
def test_a_batch_is_split_down_to_single_images_in_one_step_and_told_once(a_run):
    events: list[Event] = []
    full, single = trainer_of(a_run("full", budget={"batch": 4}), events.append), trainer_of(a_run("single"))
    in_backward(full.base.unet, 1, gpu_is_full)
    changes(full, [[SQUARE, WIDE]])
    changes(single, [[[shot] for shot in (*SQUARE, *WIDE)]])
    assert_same(state_of(full), state_of(single))
    [told] = warnings_in(events)
    assert "batches of 4 are taken 1 image at a time, with the same result" in told


def test_what_does_not_fit_alone_leaves_everything_as_it_was(a_run):
    trainer = trainer_of(a_run(optimizer={"ema_decay": 0.5}))
    trainer.train_step([SQUARE[:2], WIDE])
    before, images = {name: tensor.clone() for name, tensor in state_of(trainer).items()}, trainer.state.images
    for limit in (in_backward, in_forward):
        limit(trainer.base.unet, 0, gpu_is_full)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train_step([SQUARE, WIDE])
        assert_same(state_of(trainer), before)
        assert (trainer.state.step, trainer.state.images, trainer.state.at_once) == (1, images, 0)


def give_scaler(trainer: Trainer) -> None:
    """As on a GPU in fp16: accelerate gives none on a CPU."""
    accelerator, config = trainer.accelerator, trainer.config
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    optimizer = make_optimizer(config.optimizer, parameter_groups(trainer.base, config), fused=False)
    trainer.optimizer = AcceleratedOptimizer(optimizer, scaler=accelerator.scaler)
    accelerator._optimizers = [trainer.optimizer]


def test_a_gradient_scaler_counts_a_step_once(a_run):
    """fp16's scaler refuses to be unscaled twice in a step, and counts those without overflow."""
    exact = {"cpu_kernels": False}  # which of them are taken depends on the batch that was planned
    full, halves = (
        trainer_of(a_run("full", budget={"batch": 4}, runtime=exact)),
        trainer_of(a_run("halves", runtime=exact)),
    )
    for trainer in (full, halves):
        give_scaler(trainer)
    in_backward(full.base.unet, 2, gpu_is_full)
    changes(full, [[SQUARE], [SQUARE]])
    changes(halves, [[SQUARE[:2], SQUARE[2:]], [SQUARE[:2], SQUARE[2:]]])
    counted, expected = (trainer.accelerator.scaler for trainer in (full, halves))
    assert counted is not None
    assert expected is not None
    assert counted.state_dict() == expected.state_dict()
    assert counted.state_dict()["_growth_tracker"] == 2
    assert_same(state_of(full), state_of(halves))


def test_a_step_of_the_optimizer_that_does_not_fit_is_not_tried_again(a_run):
    """It may have changed some weights already."""
    trainer, tried = trainer_of(a_run()), []

    def full(*_: object) -> None:
        tried.append(1)
        gpu_is_full()

    trainer.optimizer.optimizer.register_step_pre_hook(full)
    with pytest.raises(TrainingError, match="the computer's memory does not hold what adamw needs") as caught:
        trainer.train_step([SQUARE])
    assert "adapter.rank" in caught.value.problems[0].fix
    assert (len(tried), trainer.state.step) == (1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# in a run

RAGGED: dict[str, Any] = {"budget": {"images": 24, "batch": 3, "accumulate": 2}, "save": {"every": 1}}
"""Seven pictures of three shapes in batches of 3 make batches of 3 and 2, and now and then of 1."""


def full_from(trainer: Trainer, step: int, most: int) -> None:
    """From this step on there is no memory for more images than so many."""

    def fail_if_late(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if trainer.state.step + 1 >= step and len(given[0]) > most:
            gpu_is_full()

    trainer.base.unet.register_forward_pre_hook(fail_if_late)


def test_a_run_that_was_split_resumes_in_the_same_parts_bit_for_bit(a_run):
    unbroken = trainer_of(a_run("unbroken", **RAGGED))
    full_from(unbroken, 2, most=1)
    assert unbroken.train(lambda: False) == "finished"

    stopped = trainer_of(a_run("stopped", **RAGGED))
    full_from(stopped, 2, most=1)
    assert stopped.train(lambda: stopped.state.step == 2) == "stopped"
    AcceleratorState._reset_state(reset_partial_state=True)
    checkpoint = load_checkpoint(stopped.run.checkpoint(2))
    assert checkpoint.state.at_once == 1
    resumed = Trainer(make_plan(stopped.config), stopped.run, lambda event: None, checkpoint)
    seen = sizes_seen(resumed.base)  # there is room enough now, and yet
    assert resumed.train(lambda: False) == "finished"
    assert set(seen) == {1}
    assert_same(state_of(resumed), state_of(unbroken))


@pytest.mark.exhaustive
def test_a_run_that_was_split_ends_as_one_that_was_not(a_run):
    events: dict[str, list[Event]] = {"whole": [], "full": []}
    whole, full = (trainer_of(a_run(name, **RAGGED), told.append) for name, told in events.items())
    full_from(full, 3, most=2)
    for trainer in (whole, full):
        assert trainer.train(lambda: False) == "finished"
    steps = {name: [event for event in told if isinstance(event, Step)] for name, told in events.items()}
    assert len(steps["whole"]) >= 4
    assert [step.images for step in steps["full"]] == [step.images for step in steps["whole"]]
    assert [step.loss for step in steps["full"]] == pytest.approx([step.loss for step in steps["whole"]], rel=1e-5)
    start = adapter_state(trainer_of(a_run("start")).base)
    made, unbroken = ({n: t - start[n] for n, t in adapter_state(t.base).items()} for t in (full, whole))
    assert_close(made, unbroken)
    assert len(warnings_in(events["full"])) == 1


def test_a_run_whose_single_images_do_not_fit_fails_and_can_be_resumed(a_run, monkeypatch: pytest.MonkeyPatch):
    """What is left is told: not to halve batches, which was done."""
    config, full = a_run(save={"every": 1}), []
    convolve = nn.functional.conv2d

    def conv2d(*given: Any, **named: Any) -> Tensor:
        if full:
            gpu_is_full()
        return convolve(*given, **named)

    monkeypatch.setattr(nn.functional, "conv2d", conv2d)
    with pytest.raises(TrainingError):
        run.train(make_plan(config), lambda event: full.append(event) if isinstance(event, Checkpointed) else None)
    folder = RunFolder(Path(config.runs) / config.name)
    status = folder.status()
    assert status.sentence == "Failed at step 1: the GPU's memory is full."
    assert (status.overrides, status.anew) == (("runtime.gradient_checkpointing=true",), ())
    assert "budget.batch" not in status.fix
    assert folder.saved_steps() == [1]
    assert status.can_resume


# ---------------------------------------------------------------------------------------------------------------------
# while previews are drawn

PROMPTS = ["emoji of owl", "emoji of pizza", "emoji of tree"]
DRAWN: dict[str, Any] = {"sample": {"every": 2, "steps": 2, "prompts": PROMPTS}, "save": {"every": 2}}


def no_room_to_decode(base: Base, most: int) -> None:
    """No memory for more than `most` pictures in the VAE's decoder."""
    base.vae.decoder.register_forward_pre_hook(lambda _, given: gpu_is_full() if len(given[0]) > most else None)


def test_pictures_that_do_not_fit_together_are_drawn_fewer_at_a_time(tiny_base: Path):
    base, drawing = load_base(inspect_base(str(tiny_base))), Drawing("", 5, 2, 3.0, 32)
    together = draw(base, PROMPTS, drawing)
    no_room_to_decode(base, 1)
    apart = draw(base, PROMPTS, drawing)
    assert len({picture.tobytes() for picture in apart}) == len(PROMPTS)
    for one, other in zip(apart, together, strict=True):
        # a number of 8 bit rounds to its neighbour at most
        assert abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def a_run_whose_previews_fail(config: RunConfig, spoil: Callable[[Trainer], object]) -> tuple[Trainer, list[Event]]:
    events: list[Event] = []
    trainer = trainer_of(config, events.append)
    spoil(trainer)
    assert trainer.train(lambda: False) == "finished"
    return trainer, events


def test_previews_that_do_not_fit_are_left_out_and_training_goes_on(a_run):
    averaged = {"optimizer": {"ema_decay": 0.5}}
    spoilt, events = a_run_whose_previews_fail(a_run(**averaged, **DRAWN), lambda t: no_room_to_decode(t.base, 0))
    undisturbed = trainer_of(a_run("undisturbed", **averaged))
    undisturbed.train(lambda: False)
    assert_same(state_of(spoilt), state_of(undisturbed))
    steps = [0, *range(2, spoilt.plan.steps + 1, 2)]
    steps += [spoilt.plan.steps] if spoilt.plan.steps not in steps else []
    why = "the computer's memory does not hold what a single one of them takes"
    assert warnings_in(events) == [f"step {step} has no previews: {why}; training goes on" for step in steps]
    assert not any(isinstance(event, Sampled) for event in events)
    assert spoilt.run.saved_steps() == steps[1:]
    assert not any(spoilt.run.path.rglob("*.png"))


def test_previews_that_the_disk_does_not_take_are_told_and_training_goes_on(a_run):
    def no_folder(trainer: Trainer) -> None:
        trainer.run.samples(0).parent.write_text("in the way", encoding="utf-8")

    spoilt, events = a_run_whose_previews_fail(a_run(**DRAWN), no_folder)
    told = warnings_in(events)
    assert len(told) == 1 + len(spoilt.run.saved_steps())
    assert all("has no previews" in line and str(spoilt.run.path / "samples") in line for line in told)


def test_another_error_while_drawing_is_no_small_thing(a_run):
    trainer = trainer_of(a_run(**DRAWN))

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    trainer.base.vae.decoder.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        trainer.train(lambda: False)


@pytest.mark.parametrize("kind", ["adamw-schedulefree", "splus"])
def test_weights_come_back_if_their_averages_cannot_be_taken_to_the_end(kind: str):
    """The memory may be full between the first weight and the last."""
    weights = [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2)]
    settings = OptimizerSection(kind=kind, schedule="constant")
    optimizer = make_optimizer(settings, [{"params": weights, "lr": 1e-2, "name": "unet"}])
    averages = Averages(weights, optimizer)
    for _ in range(3):
        for weight in weights:
            weight.grad = weight.detach().clone()
        optimizer.step()
    trained = [weight.detach().clone() for weight in weights]
    kept = optimizer.state[weights[1]]
    name = next(name for name in ("z", "param_buffer", "ema") if name in kept)
    kept[name] = torch.zeros(5)  # which fits no weight
    with pytest.raises(RuntimeError), averages.swapped_in():
        pytest.fail("the second weight has no average")
    assert all(torch.equal(weight, value) for weight, value in zip(weights, trained, strict=True))


class Reluctant(nn.Linear):
    """Does not fit into the memory in fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reluctant:
        if fn(self.weight).dtype == torch.float32:
            gpu_is_full()
        return super()._apply(fn, recurse)


def test_a_vae_that_does_not_fit_in_fp32_stays_what_it_was():
    vae = nn.Sequential(nn.Linear(2, 2), Reluctant(2, 2, dtype=torch.bfloat16)).to(torch.bfloat16)
    vae.dtype = torch.bfloat16  # pyright: ignore[reportArgumentType]
    with pytest.raises(torch.OutOfMemoryError), _in_fp32(vae):
        pytest.fail("it did fit")
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------------
# while caches are filled


def examples_of(pictures: Path):
    return load_examples([Source(pictures, (32,))], BucketRules(16))


def quiet(done: int, total: int) -> None:
    """No progress is shown."""


def test_pictures_that_do_not_fit_together_are_encoded_fewer_at_a_time(tiny_base: Path, pictures: Path):
    base = load_base(inspect_base(str(tiny_base)))
    views = [(example, example.views[0]) for example in examples_of(pictures)]
    alike = [pair for pair in views if pair[1].fit.bucket == views[0][1].fit.bucket]
    assert len(alike) == 3
    alone = [encode(base, [pair], _pixels_of([pair]))[0] for pair in alike]
    seen: list[int] = []

    def watch(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(len(given[0]))
        if seen[-1] > 1:
            gpu_is_full()

    base.vae.encoder.register_forward_pre_hook(watch)
    found = encode_what_fits(base, alike, _pixels_of(alike))
    assert seen == [3, 2, 1, 1, 1]
    for one, other in zip(found, alone, strict=True):
        assert_same(one, other)


def test_a_picture_that_does_not_fit_alone_is_named_with_its_size(tiny_base: Path, pictures: Path, tmp_path: Path):
    base, examples = load_base(inspect_base(str(tiny_base))), examples_of(pictures)
    base.vae.encoder.register_forward_pre_hook(
        lambda _, given: gpu_is_full() if given[0].shape[-1] > given[0].shape[-2] else None
    )
    cache = LatentCache(tmp_path / "latents", base.vae_fingerprint)
    with pytest.raises(DataError) as caught:
        cache.fill(base, examples, quiet)
    [problem] = caught.value.problems
    wide = next(example for example in examples if example.fit.bucket[0] > example.fit.bucket[1])
    assert problem.where == str(wide.item.path)
    width, height = wide.fit.bucket
    assert problem.what == f"the computer's memory does not hold it in the VAE, at {width} x {height} pixels"
    assert problem.fix == 'Lower data.resolution, set runtime.vae_precision = "bf16", or end what else uses it.'
    kept = [example for example in examples if cache.path(example, example.views[0]).is_file()]
    assert 0 < len(kept) < len(examples)  # those before it need not be encoded again


def test_a_caption_that_does_not_fit_is_named(tiny_base: Path, tmp_path: Path):
    base = load_base(inspect_base(str(tiny_base)))
    next(iter(base.text_encoders.values())).register_forward_pre_hook(lambda *_: take_it_all())
    with pytest.raises(DataError, match="does not hold it in the text encoders") as caught:
        TextCache(tmp_path / "text", base.text_fingerprint).fill(base, ["an owl"], quiet)
    assert caught.value.problems[0].where == "'an owl'"


class OnAGpu:
    """What stands on a GPU, and where it goes."""

    def __init__(self) -> None:
        self.device, self.been = torch.device("cuda"), list[str]()

    def places(self) -> list[tuple[Any, torch.device]]:
        return [(self, self.device)]

    def put_back(self, places: list[tuple[Any, torch.device]]) -> None:
        [(_, device)] = places
        self.to(device)

    def to(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.been.append(self.device.type)


def test_what_a_gpu_does_not_hold_is_done_by_the_cpu():
    base, asked = OnAGpu(), list[str]()

    def work() -> str:
        asked.append(base.device.type)
        if base.device.type == "cuda":
            gpu_is_full()
        return "done"

    assert where_it_fits(cast(Any, base), work) == "done"
    assert asked == ["cuda", "cpu"]
    assert base.been == ["cpu", "cuda"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_computer_does_not_hold_or_is_wrong_is_not_tried_again(device: str):
    base = OnAGpu()
    base.device = torch.device(device)

    def work() -> None:
        if device == "cpu":
            take_it_all()
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises((RuntimeError, MemoryError)):
        where_it_fits(cast(Any, base), work)
    assert base.been == []


# ---------------------------------------------------------------------------------------------------------------------
# numbers that are none


def nan_in_a_latent(trainer: Trainer) -> None:
    """Of the first image of the second step, in the cache."""
    _, batches = islice(trainer.plan.order.steps(2), 2)
    example = trainer.plan.examples[batches[0][0].image]
    for view in example.views:
        file = trainer.latents.path(example, view)
        entry = {name: tensor.clone() for name, tensor in load_file(file).items()}
        entry["mean"][0, 0, 0] = torch.nan
        trainer.latents.cache.write(file, entry)


def nan_in_the_last_loss(trainer: Trainer) -> None:
    calls: list[int] = []

    def spoil(_: nn.Module, given: tuple[Tensor, ...], output: tuple[Tensor]) -> tuple[Tensor] | None:
        del given
        calls.append(trainer.state.step)
        return (output[0] * torch.nan,) if calls.count(1) == 2 and calls[-1] == 1 else None

    trainer.base.unet.register_forward_hook(spoil)


def nan_in_the_last_gradient(trainer: Trainer) -> None:
    calls: list[int] = []

    def spoil(gradient: Tensor) -> Tensor | None:
        calls.append(trainer.state.step)
        return gradient * torch.nan if calls.count(1) == 2 and calls[-1] == 1 else None

    def watch(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        del given
        if torch.is_grad_enabled():
            output.register_hook(spoil)

    trainer.base.unet.mid_block.register_forward_hook(watch)


def nan_in_a_weight(trainer: Trainer) -> None:
    """As an optimizer leaves it whose numbers overflow."""

    def spoil(*_: object) -> None:
        if trainer.state.step == 1:
            trainer.trained[-1].data.view(-1)[0] = torch.nan

    trainer.optimizer.optimizer.register_step_post_hook(spoil)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (nan_in_a_latent, "loss"),
        (nan_in_the_last_loss, "loss"),
        (nan_in_the_last_gradient, "gradient"),
        (nan_in_a_weight, "norm of the weights"),
    ],
)
def test_no_number_that_is_none_is_ever_saved_or_drawn(spoil: Callable[[Trainer], None], what: str, a_run):
    """The run ends in its second step, whichever number of it is spoilt, and says which images were in it."""
    previews = {"every": 1, "steps": 1, "prompts": ["emoji of owl"]}
    events: list[Event] = []
    trainer = trainer_of(a_run(save={"every": 1}, sample=previews, optimizer={"ema_decay": 0.5}), events.append)
    spoil(trainer)
    with pytest.raises(TrainingError) as caught:
        trainer.train(lambda: False)
    _, batches = islice(trainer.plan.order.steps(2), 2)
    files = ", ".join(trainer.plan.examples[shot.image].name for batch in batches for shot in batch)
    assert caught.value.problems[0].what == f"the {what} of step 2 is nan; its images: {files}"
    assert trainer.run.saved_steps() == [1]
    assert [event.step for event in events if isinstance(event, Sampled)] == [0, 1]
    checkpoint = load_checkpoint(trainer.run.checkpoint(1))
    tensors = [*checkpoint.adapter.values(), *checkpoint.trained.values()]
    tensors += [tensor for own in checkpoint.optimizer["optimizer"]["state"].values() for tensor in own.values()]
    assert all(tensor.isfinite().all() for tensor in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# what is said beforehand


@pytest.mark.parametrize(
    ("over", "processes", "sentence"),
    [
        ({}, "1", "batches are halved, down to single images, with the same result"),
        (
            {"adapter": {"dropout": 0.1}},
            "1",
            "batches are halved, down to single images, with the same result but for the adapter's dropout",
        ),
        ({"budget": {"batch": 1}}, "1", "the run ends, for single images cannot be halved; the last checkpoint stands"),
        ({}, "2", "the run ends, for several processes halve no batches; the last checkpoint stands"),
    ],
)
def test_the_plan_says_what_happens_if_the_memory_is_full(
    over: dict[str, Any],
    processes: str,
    sentence: str,
    short_run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("WORLD_SIZE", processes)
    plan = make_plan(short_run(**over))
    print_plan(plan)
    assert f"if the memory is full: {sentence}\n" in capsys.readouterr().out
    planned = Planned(plan.facts(), to_toml(plan.config), ())
    assert f"<p>{esc(f'If the memory is full, {sentence}.')}</p>" in Foreseen.of(planned, tmp_path, []).card()
