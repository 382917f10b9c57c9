"""`lorasmith bench`: what it trains, how it takes turns, what it makes of clocks, and how it fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from lorasmith.trainer.bench import measure as measuring
from lorasmith.trainer.bench.case import Case, Protocol, base_and_side, make_pictures
from lorasmith.trainer.bench.figures import Lap, Ratio, a_step, groups, in_turn, spread
from lorasmith.trainer.bench.measure import REFERENCE, Measured, Result, measure, require_room, settings_against
from lorasmith.trainer.bench.ours import Ours
from lorasmith.trainer.bench.peaks import forget_peak, peak
from lorasmith.trainer.bench.reference import Reference
from lorasmith.trainer.bench.telling import print_result
from lorasmith.trainer.bench.work import Work, work_of
from lorasmith.trainer.bench.worker import Block, Finished, Started, Worker, laps
from lorasmith.trainer.commands.measuring import bench
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.errors import ConfigError, TrainingError, UserError
from lorasmith.trainer.events import Event, Phase
from lorasmith.trainer.loop import Emit

from . import tiny
from .command import _server as processes

CPU = torch.device("cpu")
SHORT = Protocol(warmup=0, steps=1, rounds=2)


# ---------------------------------------------------------------------------------------------------------------------
# arithmetic


def test_a_ratio_is_taken_inside_each_round():
    """The second round was disturbed: both sides took twice as long, and nothing of that shows."""
    ours = [[Lap(1, 9.0, 1.0), Lap(1, 9.0, 3.0)], [Lap(1, 9.0, 4.0), Lap(1, 9.0, 4.0)], [Lap(2, 9.0, 4.0)]]
    other = [[Lap(1, 9.0, 3.0), Lap(1, 9.0, 3.0)], [Lap(2, 9.0, 12.0)], [Lap(1, 9.0, 2.0), Lap(1, 9.0, 3.0)]]
    ratio = Ratio.of(ours, other, "cpu")
    assert ratio.rounds == (1.5, 1.5, 1.25)
    assert (ratio.median, ratio.worst) == (1.5, 1.25)
    assert Ratio.of(ours, other, "wall").rounds == (1.0, 0.5, 2.0)


def test_steps_that_were_timed_together_share_their_time():
    timed = [Lap(10, 20.0, 10.0), Lap(5, 20.0, 10.0)]
    assert a_step(timed, "wall") == 40 / 15
    found = spread([timed, [Lap(10, 30.0, 5.0)]], "wall")
    assert (found.median, found.least, found.most) == (3.0, 2.0, 4.0)


def test_the_order_is_reversed_in_each_round():
    assert [in_turn(["a", "b"], number) for number in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


@pytest.mark.parametrize(("steps", "found"), [(25, [10, 10, 5]), (10, [10]), (5, [5]), (0, [])])
def test_steps_are_timed_in_groups(steps: int, found: list[int]):
    assert groups(steps, 10) == found


@pytest.mark.parametrize(
    ("protocol", "is_enough"),
    [
        (Protocol(), True),
        (Protocol(2, 5, 3), True),
        (Protocol(1, 5, 3), False),
        (Protocol(2, 4, 3), False),
        (Protocol(2, 5, 2), False),
    ],
    ids=str,
)
def test_nothing_is_claimed_from_too_little(protocol: Protocol, is_enough: bool):
    assert protocol.is_enough == is_enough


# ---------------------------------------------------------------------------------------------------------------------
# work


def test_the_work_of_sd15_is_what_others_counted(tmp_path: Path):
    """At 256 px: 0.180 TFLOP forward and 0.185 backward towards activations, counted by hand and by another program;
    with 77 tokens, and the adapters some hundredths on top."""
    config = Case("random:sd15", resolution=256).config(tmp_path, "ours", steps=1)
    work = work_of(*_base_config_side(config))
    assert work.forward == pytest.approx(0.180, rel=0.03)
    assert work.backward == pytest.approx(0.185, rel=0.03)
    assert work.weights == pytest.approx(859.5e6 + 123e6, rel=0.001)


def test_work_is_what_cannot_be_spared(tmp_path: Path):
    """Recomputing is no work; training another part is."""

    def of(*overrides: str) -> Work:
        return work_of(*_base_config_side(Case(overrides=overrides).config(tmp_path, "ours", steps=1)))

    plain, with_text = of(), of("adapter.text_encoder=true", "optimizer.text_encoder_lr=1e-4")
    assert of("runtime.gradient_checkpointing=true") == plain
    assert with_text.forward > plain.forward
    assert with_text.backward > plain.backward


def _base_config_side(config: RunConfig) -> tuple[Any, RunConfig, int]:
    base, side = base_and_side(config)
    return base, config, side


# ---------------------------------------------------------------------------------------------------------------------
# the two sides


@pytest.fixture
def made(tmp_path: Path) -> RunConfig:
    """A case with its pictures, ready to be trained."""
    config = Case(rank=4, batch=3).config(tmp_path, "ours", steps=2)
    make_pictures(config, base_and_side(config)[1])
    return config


def test_both_sides_train_the_same(made: RunConfig):
    """The same layers of the same weights, in batches of the same pictures; and each step changes them."""
    ours, reference = Ours(made, _deaf), Reference(made, _deaf)
    mine, theirs = ours.trainer.base.unet, reference.base.unet
    assert _shapes(mine) == _shapes(theirs)
    assert len(_shapes(mine)) == 2 * 4 * 14  # up and down of q, k, v and out of fourteen attentions
    frozen = {name: weight for name, weight in mine.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in frozen.items())

    plan = ours.trainer.plan
    assert len(plan.examples) == len(reference.loader.dataset) == 6  # whole batches
    assert {len(batch) for batch in plan.order.epoch(0)} == {len(pixels) for pixels, _ in reference.loader} == {3}
    captions = reference.loader.dataset.captions
    assert sorted(example.caption for example in plan.examples) == sorted(captions)
    assert len(set(captions)) == 6

    for side, unet in ((ours, mine), (reference, theirs)):
        before = _up(unet)
        side.train(iter([False, True]).__next__)
        assert not torch.equal(before, _up(unet))
        assert _up(unet).isfinite().all()
    assert ours.trainer.state.images == 3


def _shapes(unet: Any) -> list[tuple[int, ...]]:
    return sorted(tuple(parameter.shape) for parameter in unet.parameters() if parameter.requires_grad)


def _up(unet: Any) -> torch.Tensor:
    """What starts at zero and has a gradient in the first step."""
    return torch.cat([p.detach().float().flatten() for name, p in unet.named_parameters() if "lora_B" in name])


def _deaf(event: Event) -> None:
    pass


def test_the_first_steps_of_a_block_do_not_count():
    timed: list[Lap] = []

    def program() -> Iterator[bool]:
        timed.extend((yield from laps(Block(warmup=2, steps=3), CPU)))

    assert list(program()) == [False] * 5  # so often a side does not stop
    assert [lap.steps for lap in timed] == [1, 1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="no other system forgets the peak of a process's memory")
def test_the_peak_of_memory_can_be_forgotten():
    before = peak(CPU)
    del [torch.ones(before // 4 + 2**26)][0]  # four bytes each
    assert peak(CPU) > before
    assert forget_peak(CPU)
    assert peak(CPU) <= before


# ---------------------------------------------------------------------------------------------------------------------
# all together


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    get_temp_dir()  # of multiprocessing, which outlives the test
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_against_the_plain_loop(temporary: Path, monkeypatch: pytest.MonkeyPatch):
    """The command itself; its processes are forked from one that has imported torch."""
    monkeypatch.setattr(measuring, "new_processes", lambda: processes)
    app = typer.Typer()
    app.command()(bench)
    words = ["--against", "reference", "--rank", "4", "--warmup", "0", "--steps", "1", "--rounds", "2", "--json"]
    said = CliRunner().invoke(app, words, catch_exceptions=False)
    facts = json.loads(said.stdout)

    told = [line for line in said.stderr.splitlines() if line.startswith("round")]
    turns = ["1 of 2: ours", "1 of 2: reference", "2 of 2: reference", "2 of 2: ours"]
    assert told == [f"round {turn}" for turn in turns]

    for side in (facts, facts["other"]):
        positive = ("s_per_step", "cpu_s_per_step", "images_per_s", "peak_memory_mib", "s_to_first_step", "mfu")
        assert all(side[key] > 0 for key in positive)
        assert side["spreads"]["s_per_step"][0] <= side["s_per_step"] <= side["spreads"]["s_per_step"][1]
        assert side["images_per_s"] == pytest.approx(1 / side["s_per_step"])
        assert side["mfu"] < 1.5  # of a peak that was measured while the computer did other things as well
    work, seconds = facts["model_tflop_per_image"], facts["cpu_s_per_step"]
    assert facts["mfu"] == pytest.approx(work / seconds / facts["work"]["matmul_tflop_per_s"])
    assert len(facts["cpu_ratio_rounds"]) == 2
    assert facts["cpu_ratio_worst"] == min(facts["cpu_ratio_rounds"])
    assert facts["peak_memory_ratio"] == facts["peak_memory_mib"] / facts["other"]["peak_memory_mib"]
    assert facts["settings"] | {"base": "pocket", "rank": 4, "precision": "fp32", "threads": 1} == facts["settings"]
    assert facts["protocol"]["enough_for_a_claim"] is False
    assert facts["machine"]["cpu"]
    assert not list(temporary.iterdir())
    assert not multiprocessing.active_children()


def test_a_side_that_fails_ends_the_bench_with_its_own_error(tmp_path: Path, temporary: Path):
    base = tiny.make_sd1(tmp_path / "base")
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"base\.model: .*unet: its weights cannot be loaded"):
        measure(Case(str(base)), None, SHORT, _deaf, processes)
    assert not list(temporary.iterdir())
    assert not multiprocessing.active_children()


class Broken:
    """A side whose second step fails in one of many ways."""

    device, dtype = CPU, torch.float32

    def __init__(self, config: RunConfig, emit: Emit) -> None:
        self.how, self.taken = FAILURES[config.name], 0
        emit(Phase("setting up"))

    def train(self, should_stop: Callable[[], bool]) -> None:
        while not should_stop():
            self.taken += 1
            if self.taken == 2:
                self.how()


def _raise(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


FAILURES: dict[str, Callable[[], None]] = {
    "told": _raise(TrainingError("the loss is nan", "runs/x", "Lower the rate.")),
    "memory": _raise(MemoryError()),
    "fault": _raise(ZeroDivisionError("by zero\nand more")),
    "left": lambda: os._exit(3),
    "killed": lambda: os.kill(os.getpid(), signal.SIGTERM),
}
WORDS = {
    "told": "runs/x: the loss is nan. Lower the rate.",
    "memory": "memory: the computer's memory is full. Take a smaller --batch",
    "fault": "fault: failed with ZeroDivisionError: by zero. Its trace stands above.",
    "left": "left: its process ended with exit code 3, perhaps because the memory was full. Take a smaller --batch",
    "killed": "killed: its process was ended by SIGTERM, perhaps because the memory was full. Take a smaller --batch",
}


@pytest.mark.parametrize("how", [how for how in FAILURES if how != "killed" or os.name != "nt"])
def test_whatever_ends_a_process_is_one_clear_error(how: str, made: RunConfig):
    heard: list[Event] = []
    made.name = how
    with Worker(how, Broken, made, 0, heard.append, processes) as worker:
        assert worker.started().on_cpu
        assert worker.warnings == []
        with pytest.raises(TrainingError) as failed:
            worker.take(Block(0, 1))
    assert str(failed.value).startswith(WORDS[how])
    assert heard == [Phase(f"{how}: setting up")]
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------------------------------------------------------------
# what is refused before anything is started


@pytest.mark.parametrize(
    ("case", "against", "says"),
    [
        (Case(overrides=("data.path=x",)), None, "--set data.path=x: is chosen by the bench itself"),
        (Case(overrides=("budget.images = 5",)), None, "--set budget.images = 5: is chosen by the bench itself"),
        (Case(overrides=("runtime.nonsense=1",)), None, "runtime.nonsense: unknown key"),
        (Case(rank=0), None, "bench: adapter.rank: should be greater than or equal to 1"),
        (Case(targets="everything"), None, "bench: adapter.targets: should be 'attention'"),
        (Case("no/such"), None, "base.model: "),
        (Case(resolution=65), None, "--resolution: 65 is no multiple of the "),
        (Case(overrides=("adapter.kind=dora",)), REFERENCE, "--set adapter.kind=dora: would change ours alone"),
        (Case(), settings_against(["adapter.rnak=8"]), "adapter.rnak: unknown key. Did you mean adapter.rank?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_clear_error(case: Case, against: Any, says: str, temporary: Path):
    with pytest.raises(UserError) as refused:
        measure(case, against, SHORT, _deaf, processes)
    assert says in str(refused.value)
    assert not list(temporary.iterdir())


def test_the_sides_have_the_same_pictures_and_batches():
    with pytest.raises(ConfigError, match=r"--against-set budget\.batch=4: has to be the same on both sides"):
        settings_against(["runtime.precision=bf16", "budget.batch=4"])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU's memory says itself when it is full")
def test_what_does_not_fit_is_not_begun():
    require_room(1, "it takes", "pocket")
    with pytest.raises(UserError, match=r"--base random:sdxl: it takes 1,?073,?741,?824\.0 GiB, and .* are free"):
        require_room(2**60, "it takes", "random:sdxl")


# ---------------------------------------------------------------------------------------------------------------------
# for persons


def _result(tmp_path: Path, against: bool = True, on_cpu: bool = True, training: int | None = 2**30) -> Result:
    def side(name: str, wall: float, cpu: float, memory: int) -> Measured:
        started = Started(12.0, "cpu", on_cpu, 1, memory)
        rounds: list[Sequence[Lap]] = [[Lap(5, wall, cpu)]] * 3
        return Measured(name, started, rounds, Finished(memory, training and memory, None, 0.1), [])

    config, protocol = Case(batch=2).config(tmp_path, "ours", 1), Protocol()
    other = side("reference", 15.0, 30.0, 2**31) if against else None
    return Result(Case(batch=2), protocol, config, 64, Work(0.1, 0.1, 0), side("ours", 10.0, 10.0, 2**30), other)


def test_a_comparison_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    print_result(_result(tmp_path))
    said = " ".join(capsys.readouterr().out.split())
    assert "pocket at 64 px, fp32, batch 2, rank 16, attention; " in said
    assert "CPU seconds a step, of the process 2 (2 to 2) 6 (6 to 6)" in said
    assert "images a second 1 0.667" in said
    assert "share of the matmul peak 200.0% 66.7%" in said
    assert "memory that PyTorch reserved" not in said
    assert said.endswith(
        "Ours is 3.00 times as fast as reference, by the CPU time of the process (median of 3 rounds; the worst 3.00), "
        "and takes 50% of its memory while it trains."
    )


def test_on_a_gpu_the_clock_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    print_result(_result(tmp_path, on_cpu=False, training=None))
    said = " ".join(capsys.readouterr().out.split())
    assert "Ours is 1.50 times as fast as reference, by the clock (" in said
    assert said.endswith("takes 50% of its memory at its peak.")


def test_one_side_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = _result(tmp_path, against=False)
    print_result(result)
    assert capsys.readouterr().out.endswith("A step takes 2 s, 1 images a second.\n")
    assert "other" not in result.facts()


# ---------------------------------------------------------------------------------------------------------------------
# the page about it


@pytest.fixture
def page(tmp_path: Path) -> Path:
    document = tmp_path / "performance.md"
    names = ("machine", "reference", "techniques")
    document.write_text("".join(f"about {name}\n<!-- {name} -->\n<!-- end -->\n" for name in names), encoding="utf-8")
    return document


def test_a_row_stays_until_it_is_measured_again(page: Path, tmp_path: Path):
    from tools import performance

    result = _result(tmp_path)
    performance.make_ready(is_whole=False, document=page)
    performance.write({"sd15": result}, page)
    performance.make_ready(is_whole=False, document=page)
    performance.write({"pocket": result}, page)
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert [row.split("|")[1].strip() for row in rows] == ["`pocket`", "`sd15`"]
    assert "| 2 / 6 | 3.00 | 3.00 | 1,024 MiB / 2,048 MiB | 50% |" in rows[0]
    assert lines.count("about techniques") == 1
    performance.make_ready(is_whole=True, document=page)
    assert "`pocket`" not in page.read_text(encoding="utf-8")


def test_rows_of_two_computers_never_share_a_table(page: Path):
    from tools import performance

    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<!-- machine -->\n", "<!-- machine -->\nanother computer\n"), encoding="utf-8")
    with pytest.raises(UserError, match="its other rows were measured on another computer"):
        performance.make_ready(is_whole=False, document=page)
    performance.make_ready(is_whole=True, document=page)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_every_row_can_be_measured(tmp_path: Path, has_gpu: bool, monkeypatch: pytest.MonkeyPatch):
    """Also those of a setting that comes later: each switches one technique, and both sides are valid runs."""
    from tools import performance

    monkeypatch.setattr(performance.torch.cuda, "is_available", lambda: has_gpu)
    assert ("cuda_graphs" in performance.techniques()) == ("channels_last" in performance.techniques()) == has_gpu
    rows = performance.rows()
    assert len({row.name for row in rows}) == len(rows)
    switched = dict.fromkeys(performance.techniques(), 0)
    for row in rows:
        ours = row.case.config(tmp_path, "ours", 1).runtime.model_dump()
        if row.table == "techniques":
            laid_over = replace(row.case, overrides=(*row.case.overrides, *row.against.overrides))
            other = laid_over.config(tmp_path, "ours", 1).runtime.model_dump()
            [setting] = [name for name in ours if ours[name] != other[name]]
            assert row.name.endswith(f" runtime.{setting}={str(ours[setting]).lower()}")
            switched[setting] += 1
    assert set(switched.values()) == {2}
    assert {"fast_lora", "autocast", "base_weights"} <= set(switched)
    assert ("attention" in switched) == has_gpu
    assert performance.book().document.exists()
