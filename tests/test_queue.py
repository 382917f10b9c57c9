"""The queue: real processes, one run at a time, whatever becomes of whoever watches over them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import to_toml
from lorasmith.trainer.errors import ConfigError, RunError
from lorasmith.trainer.events import Done, EventLog, PlanMade, Step
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.owner import Owner
from lorasmith.trainer.queue import Queue, begin, go_on
from lorasmith.trainer.waiting import Entry, read_waiting

from .command import MAIN, lorasmith

LONG = {"images": 100_000, "batch": 2}


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    """A queue over an empty folder; what it has started ends with the test."""
    made = Queue(tmp_path / "runs")
    yield made
    for kill in (made.worker, *(RunFolder(file.parent).owner for file in made.runs.glob("*/config.toml"))):
        _kill(kill)
    if (current := read_waiting(made.runs).current) and current.process.alive():
        psutil.Process(current.process.pid).kill()


def _kill(owner: Owner) -> int | None:
    """The number of the process that was killed; none if it is this one."""
    if not owner.alive() or json.loads(owner.file.read_text(encoding="utf-8"))["pid"] == os.getpid():
        return None
    process = psutil.Process(json.loads(owner.file.read_text(encoding="utf-8"))["pid"])
    process.kill()
    wait_until(lambda: not owner.alive())
    return process.pid


def hold(queue: Queue) -> None:
    """Let this process be the worker, so that nothing is started."""
    queue.runs.mkdir(parents=True, exist_ok=True)
    assert queue.worker.take()


def let_go(queue: Queue) -> None:
    queue.worker.give_up()


def wait_until(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def names(queue: Queue) -> list[str]:
    return [entry.name for entry in queue.waiting()]


# ---------------------------------------------------------------------------------------------------------------------
# who waits


def test_runs_wait_in_the_order_in_which_they_came(queue: Queue, short_run):
    hold(queue)
    for name in ("a", "b", "c"):
        run = begin(short_run(name=name), queue)
        assert run.status().state == "queued"
        assert run.status().sentence == "Waiting in the queue."
        assert not run.status().can_resume
    assert names(queue) == names(Queue(queue.runs)) == ["a", "b", "c"]
    assert queue.running() is None


@pytest.mark.parametrize(
    ("by", "order"),
    [(-1, ["b", "a", "c"]), (1, ["a", "c", "b"]), (-9, ["b", "a", "c"]), (9, ["a", "c", "b"]), (0, ["a", "b", "c"])],
)
def test_a_run_moves_up_and_down(queue: Queue, short_run, by: int, order: list[str]):
    hold(queue)
    for name in ("a", "b", "c"):
        begin(short_run(name=name), queue)
    queue.move("b", by)
    assert names(queue) == order


def test_a_run_that_is_taken_out_is_as_it_was(queue: Queue, short_run):
    hold(queue)
    run, other = begin(short_run(name="a"), queue), begin(short_run(name="b"), queue)
    queue.remove("a")
    assert run.status().state == "new"
    assert other.ask_to_stop() == "b waits in the queue no more."
    assert other.status().state == "new"
    assert names(queue) == []
    for change in (lambda: queue.remove("a"), lambda: queue.move("a", 1)):
        with pytest.raises(RunError, match="does not wait in the queue"):
            change()
    go_on(run, queue)
    assert names(queue) == ["a"]


def test_a_run_waits_once(queue: Queue, short_run):
    hold(queue)
    run = begin(short_run(), queue)
    with pytest.raises(RunError, match="waits in the queue already"):
        go_on(run, queue)
    with pytest.raises(RunError, match=re.escape("the name 'short' is in use (Waiting in the queue)")):
        begin(short_run(), queue)
    queue.remove("short")
    run.take_ownership()
    with pytest.raises(RunError, match="is being trained"):
        go_on(run, queue)


def test_what_is_to_be_set_waits_with_the_run(queue: Queue, short_run):
    hold(queue)
    run = create_run(short_run(runs=str(queue.runs)))
    run.checkpoint(2).mkdir(parents=True)
    go_on(run, queue, ["save.every=1"], from_step=2)
    assert queue.waiting() == [Entry("short", ("save.every=1",), 2)]


def test_what_cannot_go_on_does_not_wait(queue: Queue, short_run):
    hold(queue)
    run = create_run(short_run(runs=str(queue.runs)))
    with pytest.raises(RunError, match=r"adapter\.rank cannot change"):
        go_on(run, queue, ["adapter.rank=8"])
    with pytest.raises(ConfigError, match=r"save\.evry"):
        go_on(run, queue, ["save.evry=8"])
    with pytest.raises(RunError, match="has no checkpoint"):
        go_on(run, queue, from_step=2)
    log = EventLog(run.events)
    for event in (PlanMade(4, 16), Step(4, 16, 0.5, 0.1, {"unet": 1e-4}, 0.1), Done(4, [])):
        log.append(event)
    with pytest.raises(RunError, match=r"has seen 16 images already, and budget\.images is 16"):
        go_on(run, queue)
    assert names(queue) == []
    go_on(run, queue, ["budget.images=32"])
    assert names(queue) == ["short"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"waiting": [{}], "current": null}', "null"])
def test_a_list_that_cannot_be_read_is_empty(queue: Queue, content: str):
    queue.runs.mkdir()
    (queue.runs / ".queue.json").write_text(content, encoding="utf-8")
    assert queue.waiting() == []
    assert queue.running() is None


# ---------------------------------------------------------------------------------------------------------------------
# what is trained


def test_two_runs_are_trained_one_after_the_other(queue: Queue, short_run):
    """The second can never be carried out: its images are gone when its turn comes."""
    hold(queue)
    first = begin(short_run(name="first", save={"every": 2}), queue)
    second = begin(short_run(name="second"), queue)
    let_go(queue)
    queue.ensure_worker()
    wait_until(lambda: first.status().is_active)
    assert first.status().sentence == "Starting."
    assert (queue.running(), names(queue)) == ("first", ["second"])
    wait_until(lambda: first.status().step >= 1)
    config = second.read_config()
    config.data[0].path += " of yesterday"
    second.config.write_text(to_toml(config), encoding="utf-8")
    wait_until(lambda: first.status().state == "done")
    assert second.status().state == "queued"

    wait_until(lambda: second.status().state == "failed")
    assert second.status().sentence.startswith("Failed before the first step: ")
    assert "there is no such folder" in second.status().message
    assert second.status().fix
    wait_until(lambda: not queue.worker.alive())
    assert (queue.running(), names(queue)) == (None, [])

    said = first.log.read_text(encoding="utf-8")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d lorasmith resume ", said)
    assert "done, " in said
    assert "error: " in second.log.read_text(encoding="utf-8")


@pytest.mark.exhaustive  # new processes take a minute; `make faults` has it as well
def test_a_killed_worker_and_a_killed_trainer_lose_nothing(queue: Queue, short_run):
    first = begin(short_run(name="first", save={"every": 1}, budget=LONG), queue)
    second = begin(short_run(name="second", budget={"images": 4, "batch": 4}), queue)
    wait_until(lambda: first.status().saved_step >= 1)
    assert first.status().state in ("training", "saving")

    # the worker dies: the run goes on, and the next worker lets it
    trainer = first.owner_file.read_text(encoding="utf-8")
    assert _kill(queue.worker)
    assert first.status().is_active
    assert second.status().state == "queued"
    queue.ensure_worker()
    wait_until(queue.worker.alive)
    step = first.status().step
    wait_until(lambda: first.status().step > step)
    assert first.owner_file.read_text(encoding="utf-8") == trainer

    # the trainer dies: that is told, and the next run has its turn
    assert _kill(first.owner)
    assert first.status().state == "interrupted"
    killed_at = first.status().step
    wait_until(lambda: second.status().is_active)

    # what was killed goes on behind it
    go_on(first, queue, [f"budget.images={first.status().saved_step * 2 + 4}"])
    assert first.status().state == "queued"
    assert first.status().step == killed_at
    wait_until(lambda: first.status().state == "done")
    assert second.status().state == "done"
    assert first.read_config().budget.images < LONG["images"]


def test_a_run_of_the_command_line_is_waited_for(queue: Queue, short_run, tmp_path: Path):
    config: RunConfig = short_run(name="mine", budget=LONG)
    (tmp_path / "mine.toml").write_text(to_toml(config), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            [*MAIN, "train", "mine.toml"], cwd=tmp_path, env=environment, stdout=said, stderr=said
        )
    try:
        mine = RunFolder(queue.runs / "mine")
        wait_until(mine.owner_alive)
        assert queue.running() == "mine"
        other = begin(short_run(name="other"), queue)
        wait_until(queue.worker.alive)
        wait_until(lambda: mine.status().step >= 1)
        assert other.status().state == "queued"
        mine.ask_to_stop()
        wait_until(lambda: other.status().is_active)
        assert mine.status().state == "stopped"
    finally:
        process.kill()
        process.wait()


def test_a_process_that_ends_without_a_word_is_told_of(queue: Queue, short_run, monkeypatch: pytest.MonkeyPatch):
    """As one whose installation is broken."""
    hold(queue)
    run = begin(short_run(), queue)
    broken = queue.runs.parent / "broken"
    (broken / "torch").mkdir(parents=True)
    (broken / "torch" / "__init__.py").write_text("raise ImportError('torch is broken')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    let_go(queue)
    queue.ensure_worker()
    wait_until(lambda: run.status().state == "failed")
    assert run.status().message == "its process ended before it began: ImportError: torch is broken"
    assert str(run.log) in run.status().fix


def test_a_run_whose_folder_is_gone_holds_nobody_up(queue: Queue, short_run):
    hold(queue)
    gone = begin(short_run(name="gone"), queue)
    gone.config.unlink()
    let_go(queue)
    queue.ensure_worker()
    wait_until(lambda: not names(queue) and not queue.worker.alive())
    assert f"{gone.path} is there no more" in queue.log.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# the commands


def test_the_queue_of_the_command_line(queue: Queue, short_run, tmp_path: Path):
    hold(queue)
    (tmp_path / "short.toml").write_text(to_toml(short_run()), encoding="utf-8")
    added = lorasmith(tmp_path, "queue", "add", "short.toml", "--set", "save.every=2").stdout
    assert "captions: 7 of 7 used" in added
    assert added.endswith(f"{queue.runs / 'short'} is in the queue\n")
    assert RunFolder(queue.runs / "short").read_config().save.every == 2
    listed = json.loads(lorasmith(tmp_path, "queue", "list", "--json").stdout)
    assert listed == {"running": None, "waiting": [{"name": "short", "overrides": []}]}
    assert "short: Waiting in the queue." in lorasmith(tmp_path, "runs").stdout
    assert "waits in the queue no more" in lorasmith(tmp_path, "queue", "remove", "short").stdout
    assert lorasmith(tmp_path, "queue", "list").stdout == "nothing waits in runs\n"
    assert "is in use" in lorasmith(tmp_path, "queue", "add", "short.toml", code=2).stderr
