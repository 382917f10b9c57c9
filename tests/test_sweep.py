"""Sweeps: what a grid makes, all that is wrong with it at once, and what becomes of its runs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorasmith.trainer import sweep as module
from lorasmith.trainer.commands.sweeping import sweep
from lorasmith.trainer.configfile import to_toml
from lorasmith.trainer.console import Reporter
from lorasmith.trainer.errors import ConfigError, LorasmithError, UserError
from lorasmith.trainer.events import Done, Event, EventLog, Failed, PlanMade, Step, Stopped
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.owner import ProcessId, write_process
from lorasmith.trainer.queue import Queue
from lorasmith.trainer.sweep import Sweep, plan_sweep, read_sweep, results_of, train_in_queue, train_on_ray

from .command import lorasmith

RANKS = '[grid]\n"adapter.rank" = [2, 4]\n'


@pytest.fixture
def grid(short_run, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a grid over a short run called ink."""
    (tmp_path / "ink.toml").write_text(to_toml(short_run(name="ink"), comments=False), encoding="utf-8")

    def write(text: str, section: str = 'config = "ink.toml"') -> Path:
        file = tmp_path / "grid.toml"
        file.write_text(f"[sweep]\n{section}\n{text}", encoding="utf-8")
        return file

    return write


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Queue]:
    """The queue of its runs, in which nothing is started."""
    queue = Queue(tmp_path / "runs")
    queue.runs.mkdir()
    assert queue.worker.take()
    yield queue
    queue.worker.give_up()


def planned(found: Sweep):
    return plan_sweep(found, found.variants, lambda done, total: None)


def told(call: Callable[[], object]) -> list[str]:
    """The problems that it tells, each with its place."""
    with pytest.raises(LorasmithError) as error:
        call()
    return [f"{problem.where}: {problem.what}" for problem in error.value.problems]


# ---------------------------------------------------------------------------------------------------------------------
# what a grid makes


def test_every_value_meets_every_other_one(grid):
    found = read_sweep(grid('[grid]\n"adapter.rank" = [2, 4]\noptimizer.lr = [1e-4, 3e-4]\n'))
    assert [variant.name for variant in found.variants] == [
        "ink-rank2-lr0.0001",
        "ink-rank2-lr0.0003",
        "ink-rank4-lr0.0001",
        "ink-rank4-lr0.0003",
    ]
    assert found.variants[1].overrides == ["adapter.rank=2", "optimizer.lr=0.0003"]
    config = found.config_of(found.variants[1])
    assert (config.name, config.adapter.rank, config.optimizer.lr) == ("ink-rank2-lr0.0003", 2, 3e-4)


def test_a_variant_is_a_table_of_values_that_belong_together(grid):
    rows = '[[variant]]\n[[variant]]\nadapter.rank = 8\nadapter.alpha = 8.0\noptimizer.schedule = "rex"\n'
    found = read_sweep(grid(rows + "[grid]\nseed = [1, 2]\n"))
    assert found.varies == ("adapter.rank", "adapter.alpha", "optimizer.schedule", "seed")
    assert [variant.name for variant in found.variants] == [
        "ink-seed1",
        "ink-seed2",
        "ink-rank8-alpha8.0-schedule-rex-seed1",
        "ink-rank8-alpha8.0-schedule-rex-seed2",
    ]
    config = found.config_of(found.variants[3])
    assert (config.adapter.rank, config.adapter.alpha, config.optimizer.schedule, config.seed) == (8, 8.0, "rex", 2)
    assert read_sweep(grid(rows)).variants[0].name == "ink-plain"


@pytest.mark.parametrize(
    ("setting", "values", "names"),
    [
        ("adapter.rslora", "[true, false]", ["ink-rslora-true", "ink-rslora-false"]),
        ("adapter.decompose_factor", "[-1, 4]", ["ink-decompose_factor-1", "ink-decompose_factor4"]),
        ("adapter.train_only", '[[], ["unet.a b", "x"]]', ["ink-train_only-none", "ink-train_only-unet.a-b-x"]),
        ("data.trigger", '["ink style", "x/y"]', ["ink-trigger-ink-style", "ink-trigger-x-y"]),
    ],
)
def test_a_name_says_what_varies(grid, setting: str, values: str, names: list[str]):
    found = read_sweep(grid(f"[grid]\n{setting} = {values}\n"))
    assert [variant.name for variant in found.variants] == names


def test_settings_that_end_alike_are_told_apart(grid):
    found = read_sweep(grid('[grid]\n"adapter.rank" = [2, 4]\n"block.0.rank" = [1, 3]\n'))
    assert found.variants[0].name == "ink-adapter.rank2-block.0.rank1"


def test_names_can_be_given(grid):
    section = 'config = "ink.toml"\nname = "r{adapter.rank} of {base}"'
    found = read_sweep(grid(RANKS, section), ["name=blot"])
    assert [variant.name for variant in found.variants] == ["r2 of blot", "r4 of blot"]


def test_what_is_set_for_all_is_under_what_varies(grid, tmp_path: Path):
    found = read_sweep(grid(RANKS), [f"runs={tmp_path / 'elsewhere'}", "seed=7"])
    assert found.runs == tmp_path / "elsewhere"
    assert found.config_of(found.variants[0]).seed == 7


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong with one


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "grid.toml: lets nothing vary"),
        ("[girl]\n", "grid.toml: girl: unknown key"),
        ('[grid]\n"adapter.rank" = 8\n', "grid.toml: adapter.rank: is no list of values (it is 8)"),
        ('[grid]\n"adapter.rank" = [8]\n', "grid.toml: adapter.rank: has one value, so it does not vary"),
        ('[grid]\n"adapter.rank" = []\n', "grid.toml: adapter.rank: has no value"),
        ('[grid]\n"adapter.rank" = [8, 4, 8]\n', "grid.toml: adapter.rank: has the value 8 twice"),
        ("[grid]\nseed = [1, 1979-05-27]\n", "which is no value of a setting"),
        ('[grid]\nname = ["a", "b"]\n', "grid.toml: name: cannot vary"),
        ('[grid]\nruns = ["a", "b"]\n', "grid.toml: runs: cannot vary"),
        (f"{RANKS}[[variant]]\nadapter.rank = 8\n[[variant]]\n", "grid.toml: variant.0.adapter.rank: is in [grid] as"),
        ("[[variant]]\nseed = 1\n[[variant]]\nseed = 1\n", "grid.toml: variant.1: is there twice"),
        (f"{RANKS}[[variant]]\nseed = 1\n", "grid.toml: variant.seed: has one value in all variants"),
        (f"[grid]\nseed = {list(range(501))}\n", "grid.toml: makes 501 runs, and 500 are the most"),
        ('[grid]\n"data.trigger" = ["a b", "a-b"]\n', "calls one run ink-trigger-a-b, and another one ink-trigger-a-b"),
        ('[grid]\n"data.trigger" = ["a", "A"]\n', "calls one run ink-trigger-a, and another one ink-trigger-A"),
    ],
)
def test_what_is_wrong_with_a_grid_is_told(grid, text: str, problem: str):
    assert any(problem in one for one in told(lambda: read_sweep(grid(text))))


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("", "grid.toml: sweep.config: is missing"),
        ('config = "inc.toml"', "inc.toml: no such file"),
        ('config = "ink.toml"\nnam = "x"', "grid.toml: sweep.nam: unknown key"),
        ('config = "ink.toml"\nname = "{adapter.alpha}"', "grid.toml: sweep.name: {adapter.alpha} does not vary"),
        ('config = "ink.toml"\nname = "same"', "grid.toml: sweep.name: calls one run same, and another one same"),
    ],
)
def test_what_is_wrong_with_its_first_table_is_told(grid, section: str, problem: str):
    assert any(problem in one for one in told(lambda: read_sweep(grid(RANKS, section))))


def test_a_grid_that_is_not_there_is_told_as_one(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no such file\. Write one: config"):
        read_sweep(tmp_path / "grid.toml")


def test_what_varies_cannot_be_set_for_all(grid):
    assert told(lambda: read_sweep(grid(RANKS), ["adapter.rank=8"])) == [
        "--set adapter.rank: has no effect, because the grid lets it vary"
    ]


def test_all_problems_of_all_combinations_are_told_at_once(grid, held: Queue):
    text = (
        '[[variant]]\n[[variant]]\n"adapter.rnak" = 3\n[[variant]]\n"optimizer.schedule_cycles" = 5\n'
        '[grid]\n"data.path" = ["pictures", "gone"]\n'
    )
    found = read_sweep(grid(text))
    create_run(found.config_of(found.variants[0]).model_copy(update={"runs": str(held.runs)}))
    problems = told(lambda: planned(found))
    assert len(problems) == 4
    assert "is in use (Not started) (in 1 of 6 runs: " in problems[0]
    assert problems[1].endswith(f"gone: there is no such folder or file (in 1 of 6 runs: {found.variants[1].name})")
    assert problems[2] == f"grid.toml: adapter.rnak: unknown key (in 2 of 6 runs: {found.variants[2].name}, ...)"
    assert problems[3].startswith("grid.toml: optimizer.schedule_cycles: has no effect")
    assert held.waiting() == []


def test_what_all_combinations_share_is_told_once_and_of_none(grid):
    assert told(lambda: planned(read_sweep(grid(RANKS), ["save.evry=1"]))) == ["--set save.evry: unknown key"]


def test_a_value_that_makes_no_difference_is_told(grid):
    found = read_sweep(grid('[grid]\n"data.path" = ["pictures", "./pictures"]\nseed = [1, 2]\n'))
    pairs = [(f"ink-path-pictures-seed{seed}", f"ink-path-.-pictures-seed{seed}") for seed in (1, 2)]
    assert told(lambda: planned(found)) == [
        f"grid.toml: data.path makes no difference between {one} and {other}" for one, other in pairs
    ]


def test_runs_that_would_fill_the_disk_do_not_start(grid, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(module, "free_bytes", lambda folder: 100_000_000)  # one of them needs 64 MB and a little
    [problem] = told(lambda: planned(read_sweep(grid(RANKS))))
    assert problem.startswith(f"{tmp_path / 'runs'}: the 2 runs write about 1")
    assert problem.endswith("and 100 MB are free on its disk")


# ---------------------------------------------------------------------------------------------------------------------
# what becomes of its runs


def test_the_time_is_told_once_one_of_each_kind_was_trained(grid, tmp_path: Path):
    found = read_sweep(grid(RANKS))
    foreseen = planned(found)
    assert [(one.plan.config.adapter.rank, one.plan.steps, one.seconds) for one in foreseen] == [
        (2, foreseen[0].plan.steps, None),
        (4, foreseen[0].plan.steps, None),
    ]
    before = create_run(foreseen[1].plan.config.model_copy(update={"name": "before"}))
    log = EventLog(before.events)
    log.append(PlanMade(9, 36, foreseen[1].plan.facts()))
    for step in range(1, 10):
        log.append(Step(step, 4 * step, 0.5, 0.1, {"unet": 1e-4}, 3.0))
    assert [one.seconds for one in planned(found)] == [None, 3.0 * foreseen[1].plan.steps]


def test_its_runs_wait_in_the_queue_and_those_that_go_on_come_first(grid, held: Queue):
    found = read_sweep(grid('[grid]\n"adapter.rank" = [2, 3, 4]\n'))
    foreseen = planned(found)
    stopped = create_run(foreseen[1].plan.config)
    EventLog(stopped.events).append(Stopped(2))
    train_in_queue(found, [foreseen[0], foreseen[2]], [stopped])
    assert [entry.name for entry in held.waiting()] == ["ink-rank3", "ink-rank2", "ink-rank4"]
    assert found.run_of(found.variants[2]).read_config().adapter.rank == 4


def test_results_are_what_the_runs_say(grid, held: Queue):
    found = read_sweep(grid('[grid]\n"adapter.rank" = [1, 2, 3, 4]\n'))
    for number, variant in enumerate(found.variants[:3]):
        run = create_run(found.config_of(variant).model_copy(update={"runs": str(held.runs)}))
        log = EventLog(run.events)
        log.append(PlanMade(2, 8))
        for step in range(1, number + 1):
            log.append(Step(step, 4 * step, 0.5 / step, 0.1, {"unet": 1e-4}, 1.5))
        if number == 1:  # it was trained where this process is not
            here = ProcessId.of(1)
            write_process(run.owner_file, ProcessId(here.pid, here.created, "another start", 1))
        elif number == 2:
            log.append(Done(2, []))
    facts = [result.facts() for result in results_of(found)]
    assert [one["state"] for one in facts] == [
        "interrupted",
        "interrupted, or trained on another computer",
        "done",
        "not made",
    ]
    assert [(one["step"], one["steps"], one["seconds"]) for one in facts] == [
        (0, 2, 0.0),
        (1, 2, 1.5),
        (2, 2, 3.0),
        (0, 0, 0.0),
    ]
    assert facts[2]["loss"] == pytest.approx(0.95 * 0.5 + 0.05 * 0.25)
    assert facts[3]["values"] == {"adapter.rank": 4}


# ---------------------------------------------------------------------------------------------------------------------
# Ray


def test_without_ray_it_is_said_how_to_install_it(grid, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed .*lorasmith\[ray\]"):
        train_on_ray("local", [], [], print)


class _RayError(Exception):
    pass


class _Ray(SimpleNamespace):
    """Of Ray what is asked of it, carried out at once in this process: Ray itself is too large to test with."""

    def __init__(self, gpus: int) -> None:
        super().__init__(gpus=gpus, asked={}, exceptions=SimpleNamespace(RayError=_RayError), shut=False)

    def init(self, address: str, **options: object) -> None:
        self.address = address

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, "GPU": float(self.gpus)} if self.gpus else {"CPU": 8.0}

    def remote(self, **asked: object):
        self.asked = asked
        return lambda act: SimpleNamespace(options=lambda name: SimpleNamespace(remote=lambda path: (act, path)))

    def wait(self, tasks: list) -> tuple[list, list]:
        return tasks[:1], tasks[1:]

    def get(self, task) -> None:
        act, path = task
        try:
            act(path)
        except OSError as error:
            raise _RayError(f"a traceback\n{type(error).__name__}: {error}") from error

    def shutdown(self) -> None:
        self.shut = True


def test_runs_are_trained_on_ray(grid, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """One is trained, one cannot be, and the folder of one is not on the computer that Ray has chosen."""
    text = '[grid]\n"data.path" = ["pictures", "gone"]\n'
    found = read_sweep(grid(text, 'config = "ink.toml"\nname = "{base}-{data.path}"'), _SHORTEST)
    [foreseen] = plan_sweep(found, found.variants[:1], lambda done, total: None)
    broken = create_run(found.config_of(found.variants[1]))
    ray, said = _Ray(gpus=2), []
    monkeypatch.setitem(sys.modules, "ray", ray)
    train_on_ray("auto", [foreseen], [broken, RunFolder(tmp_path / "nowhere")], said.append)
    assert said[0] == "Ray's GPUs: 2, for a run each"
    assert "there is no such folder" in said[1]
    assert said[2].startswith("nowhere: could not be trained to its end: FileNotFoundError: ")
    assert said[3] == "ink-pictures: Done, 1 steps."
    assert [result.state for result in results_of(found)] == ["done", "failed"]
    assert (ray.address, ray.asked["num_gpus"], ray.asked["max_calls"], ray.shut) == ("auto", 1, 1, True)
    assert "error: " in broken.log.read_text(encoding="utf-8")
    assert "done, 1 steps" in found.run_of(found.variants[0]).log.read_text(encoding="utf-8")


_SHORTEST = ["budget.images=1", 'export.formats=["kohya"]']


def test_a_cluster_without_gpus_is_told_of(monkeypatch: pytest.MonkeyPatch):
    ray, said = _Ray(gpus=0), []
    monkeypatch.setitem(sys.modules, "ray", ray)
    train_on_ray("local", [], [], said.append)
    assert (said, ray.asked["num_gpus"]) == (["Ray has no GPU: the runs are trained on CPUs"], 0)


def test_a_run_whose_process_was_told_to_end_is_begun_again(grid, monkeypatch: pytest.MonkeyPatch):
    """Ray does so after this error, as where a computer is taken away; a run that a person has stopped stays so."""
    found = read_sweep(grid(RANKS), ["budget.images=6"])
    told_to_end, stopped = (create_run(found.config_of(variant)) for variant in found.variants)

    def hear(self: Reporter, event: Event) -> None:
        if isinstance(event, Step):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Reporter, "__call__", hear)
    with pytest.raises(InterruptedError, match="was stopped and saved"):
        module._resume_here(str(told_to_end.path))
    assert told_to_end.status().saved_step == 1
    stopped.request("stop").touch()
    module._resume_here(str(stopped.path))
    assert [result.state for result in results_of(found)] == ["stopped", "stopped"]


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_the_command_plans_queues_and_tells(grid, held: Queue, tmp_path: Path):
    grid(RANKS)
    plan = json.loads(lorasmith(tmp_path, "sweep", "grid.toml", "--plan", "--json").stdout)
    assert [one["name"] for one in plan["runs"]] == ["ink-rank2", "ink-rank4"]
    assert plan["runs"][0]["overrides"] == ["adapter.rank=2"]
    assert plan["steps"] == 2 * plan["runs"][0]["steps"] > 0
    assert plan["seconds"] is None
    assert held.waiting() == []

    shown = lorasmith(tmp_path, "sweep", "grid.toml")
    assert "2 runs, " in shown.stdout
    assert shown.stdout.endswith(f"in the queue of {held.runs}: 2 runs\n")
    assert [entry.name for entry in held.waiting()] == ["ink-rank2", "ink-rank4"]
    assert "is in use (Waiting in the queue)" in lorasmith(tmp_path, "sweep", "grid.toml", code=2).stderr

    held.remove("ink-rank2")
    EventLog(RunFolder(held.runs / "ink-rank2").events).append(Failed("the disk was full"))
    results = lorasmith(tmp_path, "sweep", "grid.toml", "--results").stdout
    assert "ink-rank2: Failed before the first step: the disk was full." in results
    assert "queued" in results
    again = lorasmith(tmp_path, "sweep", "grid.toml", "--resume").stdout
    assert f"these go on first: ink-rank2\nin the queue of {held.runs}: 1 run\n" in again
    assert [entry.name for entry in held.waiting()] == ["ink-rank4", "ink-rank2"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"plan": True, "results": True}, "--plan: cannot be had together with --results"),
        ({"plan": True, "ray": "auto"}, "--ray: has no effect with --plan"),
        ({"results": True, "resume": True}, "--resume: has no effect with --results"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], problem: str):
    assert told(lambda: sweep(Path("grid.toml"), **options)) == [problem]
