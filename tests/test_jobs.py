"""Run folders: a status is never a lie, a name in use is refused, a stop reaches only a run that lives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from lorasmith.trainer.checkpoint import (
    Checkpoint,
    TrainState,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import read_config, validate
from lorasmith.trainer.errors import Problem, RunError, UserError
from lorasmith.trainer.events import (
    Checkpointed,
    Done,
    Event,
    EventLog,
    Failed,
    Phase,
    PlanMade,
    Sampled,
    Step,
    Stopped,
    Warned,
)
from lorasmith.trainer.files import atomic_file, atomic_folder, user_cache, writable
from lorasmith.trainer.jobs import (
    Request,
    RunFolder,
    check_name_is_free,
    create_run,
    find_runs,
    is_main_process,
    open_run,
    start_detached,
)
from lorasmith.trainer.owner import ProcessId, write_process
from lorasmith.trainer.status import Status, duration
from lorasmith.trainer.story import Story


def config_in(folder: Path, name: str = "my run") -> RunConfig:
    return validate({"name": name, "runs": str(folder), "data": [{"path": str(folder / "photos")}]})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(config_in(tmp_path / "runs"))


def log(run: RunFolder, *events: Event) -> None:
    """Write the events, and the checkpoint folders they tell of."""
    writer = EventLog(run.events)
    for event in events:
        writer.append(event)
        if isinstance(event, Checkpointed):
            run.checkpoint(event.step).mkdir(parents=True)


def step(number: int) -> Step:
    return Step(number, number * 4, 0.5, 1.0, {"unet": 1e-4}, 0.1, 1536.0)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of our own that lives until the test ends."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def owned_by(run: RunFolder, pid: int) -> None:
    owner = {"pid": pid, "created": psutil.Process(pid).create_time()}
    run.owner_file.write_text(json.dumps(owner), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# creating


def test_a_new_run_folder_holds_its_complete_configuration(tmp_path: Path):
    config = config_in(tmp_path / "deep" / "runs")
    run = create_run(config)
    assert run.path == tmp_path / "deep" / "runs" / "my run"
    assert run.name == "my run"
    assert [file.name for file in run.path.iterdir()] == ["config.toml"]
    assert run.read_config() == config == read_config(run.config)
    assert [file.name for file in run.path.parent.iterdir()] == ["my run"]


def test_the_names_in_a_run_folder_are_the_contract():
    run = RunFolder(Path("runs", "x"))
    assert [path.as_posix() for path in (run.config, run.events, run.exports, run.log)] == [
        "runs/x/config.toml",
        "runs/x/events.jsonl",
        "runs/x/exports",
        "runs/x/trainer.log",
    ]
    assert [run.request(what).as_posix() for what in ("stop", "save", "sample")] == [
        "runs/x/stop",
        "runs/x/save",
        "runs/x/sample",
    ]
    assert run.checkpoint(500).as_posix() == "runs/x/checkpoints/step-000500"
    assert run.samples(0).as_posix() == "runs/x/samples/step-000000"


def test_a_name_in_use_is_refused_and_the_run_is_left_as_it_was(run: RunFolder):
    log(run, PlanMade(10, 40), step(10), Done(10, []))
    before = run.config.read_bytes()
    config = run.read_config()
    for attempt in (check_name_is_free, create_run):
        with pytest.raises(RunError) as caught:
            attempt(config)
        assert caught.value.problems == [
            Problem(
                str(run.path),
                "the name 'my run' is in use (Done, 10 steps)",
                f"Choose another name (--set name=...), or continue it with: lorasmith resume {run.path}",
            )
        ]
        assert caught.value.exit_code == 2
    assert run.config.read_bytes() == before
    assert run.events.exists()


def test_a_name_too_long_for_the_disk_is_refused(tmp_path: Path):
    """100 letters are 300 bytes in some scripts, and most disks of Linux take 255."""
    try:
        run = create_run(config_in(tmp_path, "絵" * 100))
    except UserError:
        assert list(tmp_path.iterdir()) == []
    else:
        assert run.config.is_file()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_name_taken_by_something_else_is_refused(tmp_path: Path, kind: str):
    taken = tmp_path / "my run"
    taken.mkdir() if kind == "folder" else taken.write_text("x", encoding="utf-8")
    with pytest.raises(RunError) as caught:
        create_run(config_in(tmp_path))
    assert caught.value.problems[0].what == "the name 'my run' is in use (it is not a run)"
    assert taken.exists()


def test_a_runs_path_that_is_a_file_is_refused(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    for runs in (file, file / "below"):
        with pytest.raises(RunError) as caught:
            create_run(config_in(runs))
        assert caught.value.problems == [
            Problem(
                "runs", f"{file} is a file, not a folder", "Set runs to a folder you may write to (--set runs=...)."
            )
        ]
    assert file.read_text(encoding="utf-8") == "x"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="rights do not bind this user")
def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(RunError, match="cannot be written"):
        create_run(config_in(tmp_path / "locked" / "runs"))
    assert list((tmp_path / "locked").iterdir()) == []


def test_checking_a_name_creates_nothing(tmp_path: Path):
    assert check_name_is_free(config_in(tmp_path / "runs")) == tmp_path / "runs" / "my run"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# status


def test_a_run_without_events_is_new(run: RunFolder):
    assert run.status() == Status("new", 0, 0, 0)
    assert run.status().sentence == "Not started."
    assert run.status().can_resume
    assert not run.status().is_active


@pytest.mark.parametrize(
    ("events", "status", "sentence"),
    [
        (
            [PlanMade(10, 40), step(3)],
            Status("interrupted", 3, 10, 0, loss=0.5),
            "Interrupted at step 3 of 10, nothing was saved.",
        ),
        (
            [PlanMade(10, 40), step(4), Checkpointed(4, "c"), step(5)],
            Status("interrupted", 5, 10, 4, loss=0.5),
            "Interrupted at step 5 of 10, saved up to step 4.",
        ),
        (
            [PlanMade(10, 40), step(4), Checkpointed(4, "c"), Stopped(4)],
            Status("stopped", 4, 10, 4, loss=0.5),
            "Stopped and saved at step 4 of 10.",
        ),
        (
            [PlanMade(10, 40), step(10), Checkpointed(10, "c"), Done(10, [])],
            Status("done", 10, 10, 10, loss=0.5),
            "Done, 10 steps.",
        ),
        (
            [PlanMade(10, 40), step(2), Failed("loss is nan", 2)],
            Status("failed", 2, 10, 0, "loss is nan", loss=0.5),
            "Failed at step 2: loss is nan.",
        ),
        (
            [Failed("out of ink.", 0, "Buy some.", ["a=1"], ["b=2", "c=3"], 7)],
            Status("failed", 0, 0, 0, "out of ink.", "Buy some.", ("a=1",), ("b=2", "c=3"), 7),
            "Failed before the first step: out of ink.",
        ),
        (
            [PlanMade(10, 40), step(4), Stopped(4), PlanMade(20, 80), step(5)],
            Status("interrupted", 5, 20, 0, loss=0.5),
            "Interrupted at step 5 of 20, nothing was saved.",
        ),
        (
            [PlanMade(10, 40), step(10), Phase("exporting and verifying")],
            Status("interrupted", 10, 10, 0, loss=0.5),
            "Interrupted at step 10 of 10, nothing was saved.",
        ),
        (
            [Phase("loading the base"), Warned("x")],
            Status("interrupted", 0, 0, 0),
            "Interrupted before the first step.",
        ),
    ],
    ids=[
        *("killed", "killed after a save", "stopped", "done", "failed", "failed at once", "resumed and killed"),
        *("in export", "in loading"),
    ],
)
def test_status_of_a_run_without_a_process(run: RunFolder, events: list[Event], status: Status, sentence: str):
    log(run, *events)
    assert run.status() == status
    assert run.status().sentence == sentence
    assert not run.status().is_active
    assert run.status().can_resume == (status.state != "done")


def test_the_saved_step_is_that_of_the_folders_which_are_there(run: RunFolder):
    log(run, PlanMade(10, 40), step(4), Checkpointed(4, "c"), step(6), Checkpointed(6, "c"))
    assert run.status().saved_step == 6
    run.checkpoint(6).rmdir()
    assert run.status().saved_step == 4
    assert run.status().sentence == "Interrupted at step 6 of 10, saved up to step 4."


def test_a_run_of_this_process_says_what_it_does(run: RunFolder):
    run.take_ownership()
    for event, state, sentence in [
        (Phase("loading the base"), "preparing", "Loading the base."),
        (Phase("encoding images", 14, 24), "preparing", "Encoding images, 14 of 24."),
        (PlanMade(10, 40), "training", "Step 0 of 10. Estimating the time left."),
        (Phase("drawing previews"), "sampling", "Drawing previews at step 0 of 10."),
        (Sampled(0, "s", []), "training", "Step 0 of 10. Estimating the time left."),
        (step(3), "training", "Step 3 of 10. Estimating the time left. 10 steps/s. 1.5 GB used. Loss 0.5."),
        (Phase("saving"), "saving", "Saving step 3 of 10."),
        (Checkpointed(3, "c"), "training", None),
        (Phase("exporting and verifying"), "exporting", "Exporting and verifying what was trained in 3 steps."),
    ]:
        log(run, event)
        assert run.status().state == state
        assert sentence in (None, run.status().sentence)
        assert run.status().is_active
        assert not run.status().can_resume
    run.give_up_ownership()
    assert run.status().state == "interrupted"
    assert run.status().memory == ""


def test_a_run_in_its_stride_says_how_long_it_takes(run: RunFolder):
    run.take_ownership()
    log(run, PlanMade(20 + 8 * 36_000, 40), *(step(number) for number in range(1, 21)))
    status = run.status()
    assert status.left == pytest.approx(8 * 3600, abs=60)
    end = datetime.now() + timedelta(seconds=status.left or 0)
    day = "" if end.date() == datetime.now().date() else f"{end:%Y-%m-%d} "
    assert status.sentence.startswith("Step 20 of 288020. 8 h 0 min left, ends ")
    assert f"ends {day}" in status.sentence
    assert re.search(r"ends [-\d ]*\d\d:\d\d\. 10 steps/s\. 1\.5 GB used\. Loss 0\.5\.$", status.sentence)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "0 s"), (99.4, "99 s"), (100, "2 min"), (720, "12 min"), (5900, "98 min"), (11_100, "3 h 5 min")],
)
def test_durations_have_a_unit(seconds: float, told: str):
    assert duration(seconds) == told


def test_slow_steps_are_told_in_seconds(run: RunFolder):
    run.take_ownership()
    log(run, PlanMade(10, 40), replace(step(1), seconds=3.25, memory_mib=0.0))
    assert run.status().sentence == "Step 1 of 10. Estimating the time left. 3.25 s/step. Loss 0.5."


def test_a_story_that_is_kept_is_read_on(run: RunFolder):
    story = Story(run.events)
    log(run, PlanMade(10, 40), step(3))
    assert run.status(story).step == 3
    log(run, step(4))
    assert run.status(story) == run.status()
    assert story.step == 4


def test_a_run_of_another_living_process_is_active(run: RunFolder, sleeper: subprocess.Popen[bytes]):
    owned_by(run, sleeper.pid)
    log(run, PlanMade(10, 40), step(3))
    assert run.status().state == "training"


def test_what_is_saved_was_taken_whatever_a_torn_log_has_lost(run: RunFolder):
    log(run, PlanMade(10, 40), step(3), Checkpointed(8, "checkpoints/step-000008"))
    assert (run.status().step, run.status().saved_step) == (8, 8)


def test_a_run_that_was_killed_before_its_first_event_is_interrupted(run: RunFolder, sleeper: subprocess.Popen[bytes]):
    owned_by(run, sleeper.pid)
    assert run.status().state == "preparing"
    assert run.status().sentence == "Starting."
    sleeper.kill()
    sleeper.wait()
    assert run.status().state == "interrupted"


def test_a_run_whose_process_was_killed_and_reaped_is_interrupted(run: RunFolder, sleeper: subprocess.Popen[bytes]):
    owned_by(run, sleeper.pid)
    log(run, PlanMade(10, 40), step(3))
    sleeper.kill()
    sleeper.wait()
    assert run.status().state == "interrupted"


@pytest.mark.skipif(os.name == "nt", reason="there are no zombies on Windows")
def test_a_run_whose_process_was_killed_and_not_yet_reaped_is_interrupted(
    run: RunFolder, sleeper: subprocess.Popen[bytes]
):
    """The browser app starts trainers as its children; a killed child stays a process until it is waited for."""
    owned_by(run, sleeper.pid)
    log(run, PlanMade(10, 40), step(3))
    sleeper.kill()
    while psutil.Process(sleeper.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert run.status().state == "interrupted"


def test_a_process_id_given_to_another_process_is_not_the_owner(run: RunFolder):
    owner = {"pid": os.getpid(), "created": psutil.Process().create_time() - 100}
    run.owner_file.write_text(json.dumps(owner), encoding="utf-8")
    log(run, PlanMade(10, 40), step(3))
    assert run.status().state == "interrupted"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"pid": 1}', '{"pid": "x", "created": 1}', '{"pid": -5, "created": 1}', "null", "\x00"],
)
def test_a_damaged_owner_file_means_no_owner(run: RunFolder, content: str):
    run.owner_file.write_text(content, encoding="utf-8")
    assert run.owner_alive() is False


def test_a_finished_run_reads_done_even_while_its_process_ends(run: RunFolder):
    run.take_ownership()
    log(run, PlanMade(10, 40), step(10), Done(10, []))
    assert run.status().state == "done"


def test_a_torn_last_line_does_not_hide_the_status(run: RunFolder):
    log(run, PlanMade(10, 40), step(3))
    with run.events.open("ab") as file:
        file.write(b'{"time": 1.0, "type": "do')
    assert run.status() == Status("interrupted", 3, 10, 0, loss=0.5)


def test_saved_steps_are_the_checkpoint_folders_in_order(run: RunFolder):
    assert run.saved_steps() == []
    for number in (100, 20, 1_000_000):
        run.checkpoint(number).mkdir(parents=True)
    (run.checkpoints / ".step-000300.1.tmp").mkdir()
    assert run.saved_steps() == [20, 100, 1_000_000]


@pytest.mark.parametrize("name", ["step-000100 copy", "step-000100.bak", "step-", "step-best"])
def test_a_folder_that_a_person_put_beside_the_checkpoints_is_passed_over(run: RunFolder, name: str):
    run.checkpoint(100).mkdir(parents=True)
    (run.checkpoints / name).mkdir()
    assert run.saved_steps() == [100]


# ---------------------------------------------------------------------------------------------------------------------
# owning and stopping


def test_ownership_of_a_run_that_another_process_trains_is_refused(run: RunFolder, sleeper: subprocess.Popen[bytes]):
    owned_by(run, sleeper.pid)
    before = run.owner_file.read_bytes()
    with pytest.raises(RunError) as caught:
        run.take_ownership()
    assert caught.value.problems[0].what == "another process is training this run"
    assert run.owner_file.read_bytes() == before


def test_taking_ownership_forgets_what_was_asked_of_an_earlier_process(run: RunFolder):
    write_process(run.request("stop"), replace(ProcessId.of(os.getpid()), boot="an earlier one"))
    write_process(run.request("save"), ProcessId.of(os.getpid()))  # while this process was being started
    run.request("sample").touch()  # by hand, of whoever trains it
    run.take_ownership()
    assert not run.request("stop").exists()
    assert run.request("save").exists()
    assert run.request("sample").exists()
    assert run.owner_alive()


def test_taking_ownership_forgets_what_was_asked_by_hand_before_this_process_was_there(run: RunFolder):
    run.request("stop").touch()
    os.utime(run.request("stop"), (0, 0))
    run.take_ownership()
    assert not run.request("stop").exists()


def test_giving_up_ownership_twice_does_no_harm(run: RunFolder):
    run.take_ownership()
    run.give_up_ownership()
    run.give_up_ownership()
    assert run.owner_alive() is False


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("stop", "my run will save and stop after its current step."),
        ("save", "my run will save after its current step."),
        ("sample", "my run will draw previews after its current step."),
    ],
)
def test_what_is_asked_of_a_living_run_is_a_file(
    run: RunFolder, sleeper: subprocess.Popen[bytes], what: Request, told: str
):
    owned_by(run, sleeper.pid)
    assert ask(run, what) == told
    assert run.request(what).exists()
    assert not run.take_request(what)  # this is not the process that was asked
    owned_by(run, os.getpid())
    assert ask(run, what) == told
    assert run.take_request(what)
    assert not run.take_request(what)


@pytest.mark.parametrize("what", ["stop", "save", "sample"])
def test_of_a_run_that_is_exported_nothing_can_be_asked(run: RunFolder, what: Request):
    run.take_ownership()
    log(run, PlanMade(3, 12), step(3), Phase("exporting and verifying"))
    assert ask(run, what) == "my run has taken its last step, and is being exported."
    assert not run.request(what).exists()


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        ([], "Not started"),
        ([PlanMade(10, 40), step(10), Done(10, [])], "Done, 10 steps"),
        ([PlanMade(10, 40), step(3)], "Interrupted at step 3 of 10, nothing was saved"),
    ],
    ids=["new", "done", "interrupted"],
)
@pytest.mark.parametrize(("what", "nothing"), [("stop", "stop"), ("save", "save"), ("sample", "draw")])
def test_nothing_can_be_asked_where_nothing_runs(
    run: RunFolder, events: list[Event], sentence: str, what: Request, nothing: str
):
    log(run, *events)
    with pytest.raises(RunError) as caught:
        ask(run, what)
    assert caught.value.problems == [
        Problem(str(run.path), f"is not being trained ({sentence})", f"There is nothing to {nothing}.")
    ]
    assert not run.request(what).exists()


def ask(run: RunFolder, what: Request) -> str:
    return {"stop": run.ask_to_stop, "save": run.ask_to_save, "sample": run.ask_to_sample}[what]()


# ---------------------------------------------------------------------------------------------------------------------
# choosing


def test_a_checkpoint_is_chosen_while_it_is_there(run: RunFolder):
    assert run.chosen is None
    run.checkpoint(4).mkdir(parents=True)
    run.choose(4, 0.8)
    assert run.chosen == (4, 0.8)
    assert json.loads((run.path / "chosen.json").read_text(encoding="utf-8")) == {"step": 4, "strength": 0.8}
    run.checkpoint(4).rmdir()
    assert run.chosen is None


@pytest.mark.parametrize("content", ["", "[]", "null", '{"step": "x", "strength": 1}', '{"step": 4}'])
def test_a_choice_that_cannot_be_read_is_none(run: RunFolder, content: str):
    (run.path / "chosen.json").write_text(content, encoding="utf-8")
    assert run.chosen is None


# ---------------------------------------------------------------------------------------------------------------------
# finding


def test_a_run_opens_by_its_folder_or_by_its_name_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = create_run(config_in(Path("runs")))
    assert run.path.is_absolute()
    assert open_run(tmp_path / "runs" / "my run").path == run.path
    assert open_run(Path("runs/my run")).path == run.path
    assert open_run(Path("my run")).path == run.path


@pytest.mark.parametrize("kind", ["missing", "empty folder", "file"])
def test_what_is_no_run_folder_is_refused(tmp_path: Path, kind: str):
    path = tmp_path / "x"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("x", encoding="utf-8")
    with pytest.raises(RunError) as caught:
        open_run(path)
    assert caught.value.problems == [
        Problem(str(path), "is not a run folder (it has no config.toml)", "See the runs with: lorasmith runs")
    ]


def test_runs_are_found_newest_first(tmp_path: Path):
    for age, name in enumerate(["newest", "middle", "oldest"]):
        run = create_run(config_in(tmp_path, name))
        os.utime(run.config, (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "no run").mkdir()
    (tmp_path / "file.txt").write_text("x", encoding="utf-8")
    assert [run.name for run in find_runs(tmp_path)] == ["newest", "middle", "oldest"]


def test_in_a_missing_folder_there_are_no_runs(tmp_path: Path):
    assert list(find_runs(tmp_path / "no")) == []


def test_what_a_killed_process_left_half_written_is_not_a_run(tmp_path: Path):
    run = create_run(config_in(tmp_path))
    run.path.rename(tmp_path / ".my run.123.tmp")
    assert list(find_runs(tmp_path)) == []


# ---------------------------------------------------------------------------------------------------------------------
# several processes at once

AT_ONCE = """
import sys, time
from pathlib import Path
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.errors import RunError
from lorasmith.trainer.jobs import RunFolder, create_run

runs, go = Path(sys.argv[1]), Path(sys.argv[2])
config = validate({"name": "x", "seed": int(sys.argv[3]), "runs": str(runs), "data": [{"path": "photos"}]})
print("ready", flush=True)
while not go.exists():
    pass
try:
    ACTION
    print("yes", flush=True)
except RunError as error:
    print(error.problems[0].what, flush=True)
sys.stdin.read()
"""


def at_once(action: str, folder: Path, processes: int = 4) -> list[str]:
    """What each of several processes says after the same action at the same moment; they live until all have spoken."""
    code, go = AT_ONCE.replace("ACTION", action), folder / "go"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder / "runs"), str(go), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        assert [next_line(process) for process in started] == ["ready"] * processes
        go.touch()
        return sorted(next_line(process) for process in started)
    finally:
        for process in started:
            process.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_of_several_processes_one_creates_the_run(tmp_path: Path):
    said = at_once("create_run(config)", tmp_path)
    assert said == ["the name 'x' is in use (Not started)"] * 3 + ["yes"]
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["x"]
    assert RunFolder(tmp_path / "runs" / "x").read_config().name == "x"


def test_of_several_processes_one_takes_over_a_run_whose_owner_died(tmp_path: Path):
    run = create_run(config_in(tmp_path / "runs", "x"))
    run.owner_file.write_text(json.dumps({"pid": os.getpid(), "created": 1.0}), encoding="utf-8")
    said = at_once('RunFolder(runs / "x").take_ownership()', tmp_path)
    assert said == ["another process is training this run"] * 3 + ["yes"]


def test_a_folder_that_is_not_to_be_replaced_is_kept(tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kept").touch()
    with pytest.raises(OSError, match="x"), atomic_folder(tmp_path / "x", replace=False) as temporary:
        (temporary / "new").touch()
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["x", "x/kept"]


# ---------------------------------------------------------------------------------------------------------------------
# files and processes


def test_where_files_can_be_created_nothing_is_said_and_nothing_left(tmp_path: Path):
    assert writable(tmp_path) == writable(tmp_path / "not" / "there" / "yet") == ""
    assert list(tmp_path.iterdir()) == []


def test_below_a_file_nothing_can_be_created(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        assert writable(path) == f"{tmp_path / 'file'} is a file, not a folder"


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that not even root can write to")
def test_it_is_tried_whether_a_folder_can_be_written():
    assert os.access("/proc", os.W_OK) or os.geteuid()
    assert writable(Path("/proc/lorasmith/x")).startswith("/proc cannot be written (")


def test_a_name_longer_than_the_disk_takes_is_said_to_be_so(tmp_path: Path):
    assert "cannot be written" in writable(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("refusals", [2, 99], ids=["a quick reader", "a reader that stays"])
def test_on_windows_folders_and_files_wait_for_their_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int
):
    refused = []

    def busy(move):
        def moved(self: Path, target: Path) -> Path:
            refused.append(target)
            if len(refused) <= refusals:
                raise PermissionError(13, "in use", str(target))
            return move(self, target)

        return moved

    monkeypatch.setattr("lorasmith.trainer.files.sys.platform", "win32")
    monkeypatch.setattr("lorasmith.trainer.files._WAITS_FOR_READERS", (0, 0, 0))
    monkeypatch.setattr(Path, "rename", busy(Path.rename))
    monkeypatch.setattr(Path, "replace", busy(Path.replace))
    for kind, path in ((atomic_folder, tmp_path / "folder"), (atomic_file, tmp_path / "file")):
        refused.clear()
        try:
            with kind(path) as temporary:
                (temporary / "x" if kind is atomic_folder else temporary).touch()
        except PermissionError:
            assert refusals == 99
        assert path.exists() == (refusals == 2)
        assert refused == [path] * (3 if refusals == 2 else 4)


def test_the_users_cache_is_one_folder_of_this_name():
    assert user_cache().is_absolute()
    assert user_cache().name.lower() == "lorasmith"


@pytest.mark.parametrize(("rank", "main"), [(None, True), ("0", True), ("1", False)])
def test_the_first_of_the_processes_is_the_main_one(monkeypatch: pytest.MonkeyPatch, rank: str | None, main: bool):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_main_process() is main


def test_what_a_detached_command_says_is_in_its_log(tmp_path: Path):
    process = start_detached(["stop", str(tmp_path / "none")], tmp_path / "runs" / "none.log")
    assert process.wait(60) == 2
    again = start_detached(["stop", str(tmp_path / "other")], tmp_path / "runs" / "none.log")
    assert again.wait(60) == 2
    said = (tmp_path / "runs" / "none.log").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d lorasmith stop .*none'?", said[0])
    assert said[1].startswith("error: ")
    assert "is not a run folder" in said[1]
    assert said[2].rstrip("'").endswith("other")


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.fixture
def saved(run: RunFolder) -> Path:
    folder = run.checkpoint(3)
    save_checkpoint(folder, Checkpoint(TrainState(step=3, images=12), {"w": torch.arange(3.0)}, {"groups": [1]}))
    return folder


def test_a_checkpoint_is_read_back_equal(saved: Path):
    checkpoint = load_checkpoint(saved)
    assert checkpoint.state == TrainState(step=3, images=12)
    assert checkpoint.adapter["w"].tolist() == [0, 1, 2]
    assert checkpoint.optimizer == {"groups": [1]}


def test_a_checkpoint_may_be_pruned_while_its_tensors_are_in_use(run: RunFolder, saved: Path):
    tensors = load_checkpoint(saved).adapter
    run.checkpoint(4).mkdir()
    prune_checkpoints(run, 1)
    assert run.saved_steps() == [4]
    assert tensors["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("file", ["state.json", "adapter.safetensors", "optimizer.pt", "origin.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"[1]", b"3", b"{}", b"\xff\xfe", b"null"])
def test_a_damaged_checkpoint_names_its_folder(saved: Path, file: str, content: bytes):
    (saved / file).write_bytes(content)
    with pytest.raises(RunError) as caught:
        load_checkpoint(saved)
    assert caught.value.problems[0].where == str(saved)


@pytest.mark.parametrize(
    ("word", "state"),
    [(Done(3, []), "done"), (Stopped(3), "stopped"), (Failed("out of ink"), "failed")],
    ids=["done", "stopped", "failed"],
)
def test_a_resume_that_was_refused_leaves_the_last_word(tmp_path: Path, word, state):
    (tmp_path / "config.toml").touch()
    run = RunFolder(tmp_path)
    log = EventLog(run.events)
    for event in (Step(3, 12, 0.1, 0.1, {"unet": 1e-4}, 0.1), word, Phase("loading the base")):
        log.append(event)
    assert run.status().state == state
    log.append(Step(4, 16, 0.1, 0.1, {"unet": 1e-4}, 0.1))
    assert run.status().state == "interrupted"


def test_a_file_may_be_read_by_whom_any_new_file_may(tmp_path: Path):
    """safetensors writes files that only their owner can read; a web interface may run as another user."""
    (tmp_path / "plain").touch()
    with atomic_file(tmp_path / "a.safetensors") as temporary:
        save_file({"x": torch.zeros(1)}, temporary)
    with atomic_folder(tmp_path / "folder") as temporary:
        save_file({"x": torch.zeros(1)}, temporary / "b.safetensors")
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "a.safetensors", "folder/b.safetensors")}
    assert len(modes) == 1
