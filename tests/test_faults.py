"""Faults of docs/faults.md, once: the run survives, and nothing that was saved is lost. `make faults` tries all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from lorasmith.trainer.events import Done, Event, EventLog, Failed, Step, Stopped
from lorasmith.trainer.files import write_text
from lorasmith.trainer.jobs import RunFolder
from tools.faults.__main__ import spread
from tools.faults.fault import Struck
from tools.faults.registry import FAULTS
from tools.faults.report import Row, markdown
from tools.faults.saved import Saved, damaged
from tools.faults.survival import untrue
from tools.faults.trial import Trial

ROOT = Path(__file__).resolve().parent.parent
FURTHER = {
    "two signals",
    "out of memory in backward",
    "out of memory in sampling",
    "out of memory in caching",
    "NaN in gradient",
    "NaN in latent",
    "read-only dataset",
    "data worker dies",
    "flipped bit in a checkpoint",
    "queue worker killed",
}
"""`make test-all` tries these too: others of their kind are tried in any case, and the queue has tests of its own."""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is no fork, and no SIGKILL")


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command finds, trying once each fault that is asked for."""
    asked = [item for item in request.session.items if getattr(item, "originalname", "") == "test_a_fault_is_survived"]
    file = tmp_path_factory.mktemp("faults") / "found.json"
    command = [sys.executable, "-m", "tools.faults", "--times", "1", "--json", str(file)]
    for item in asked:
        command += ["--only", item.callspec.params["name"]]  # pyright: ignore[reportAttributeAccessIssue]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert file.exists(), done.stderr
    rows = {row["fault"]: row for row in json.loads(file.read_text(encoding="utf-8"))}
    assert done.returncode == (1 if any(row["slips"] for row in rows.values()) else 0)
    return rows


@pytest.mark.parametrize(
    "name",
    [pytest.param(fault.name, marks=[pytest.mark.exhaustive] if fault.name in FURTHER else []) for fault in FAULTS],
)
def test_a_fault_is_survived(found: dict[str, Any], name: str):
    row = found[name]
    if row["skipped"]:
        pytest.skip(row["skipped"])
    assert row["slips"] == []
    assert (row["tried"], row["survived"], row["lost"]) == (1, 1, 0)


def test_the_page_lists_all_faults():
    rows = [Row(fault.name, fault.what) for fault in FAULTS]
    meant = [line.split(" | ")[:2] for line in markdown(rows).splitlines()]
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    table = page.partition("<!-- faults -->\n")[2].partition("<!-- end -->")[0]
    assert [line.split(" | ")[:2] for line in table.splitlines()] == meant


# ---------------------------------------------------------------------------------------------------------------------
# whoever judges is judged


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with a checkpoint and previews."""
    folder = RunFolder(tmp_path / "run")
    folder.checkpoint(2).mkdir(parents=True)
    save_file({"weight": np.ones(4, np.float32)}, folder.checkpoint(2) / "adapter.safetensors")
    folder.samples(0).mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder.samples(0) / "00.png")
    write_text(folder.config, 'name = "run"\n')
    return folder


def test_what_is_gone_or_has_changed_is_lost(run: RunFolder):
    saved = Saved.of(run)
    assert saved.lost(Saved.of(run)) == set()
    (run.samples(0) / "00.png").unlink()
    save_file({"weight": np.zeros(4, np.float32)}, run.checkpoint(2) / "adapter.safetensors")
    assert saved.lost(Saved.of(run)) == {"checkpoints/step-000002", "samples/step-000000"}
    assert saved.lost(Saved.of(run), ("checkpoints/step-000002/",)) == {"samples/step-000000"}


def test_what_is_hidden_or_set_aside_is_nobodys_loss(run: RunFolder):
    saved = Saved.of(run)
    run.checkpoint(2).rename(run.checkpoint(2).with_suffix(".set-aside"))
    assert saved.lost(Saved.of(run)) == {"checkpoints/step-000002"}
    (run.checkpoints / ".step-000004.1-a.tmp").mkdir()
    (run.checkpoints / ".step-000004.1-a.tmp" / "state.json").write_text("{", encoding="utf-8")
    assert damaged(run) == {}


@pytest.mark.parametrize("name", ["checkpoints/step-000002/adapter.safetensors", "samples/step-000000/00.png"])
def test_what_is_cut_short_is_damaged(run: RunFolder, name: str):
    assert damaged(run) == {}
    content = (run.path / name).read_bytes()
    (run.path / name).write_bytes(content[: len(content) // 2])
    assert list(damaged(run)) == [name]
    assert damaged(run, (name,)) == {}


@pytest.mark.parametrize(
    ("events", "ended", "slip"),
    [
        ([Done(8, [])], 0, "the status is done, and it is not"),
        ([Step(3, 6, 0.1, 0.1, {}, 0.1)], -9, "the status tells of step 3, and 0 were taken"),
        ([Failed("no")], 0, "the process ended well, and the status is failed"),
        ([Stopped(2)], 1, "the process ended with 1, and the status is stopped"),
    ],
)
def test_a_status_that_is_not_so_is_found_out(tmp_path: Path, events: list[Event], ended: int, slip: str):
    trial = Trial(tmp_path)
    write_text(trial.run.config, 'name = "tried"\n')
    for event in events:
        EventLog(trial.run.events).append(event)
    assert list(untrue(Struck(trial, "", ended))) == [slip]


def test_a_run_that_seems_to_go_on_is_found_out(tmp_path: Path):
    trial = Trial(tmp_path)
    write_text(trial.run.config, 'name = "tried"\n')
    assert list(untrue(Struck(trial, ""))) == []
    assert trial.run.owner.take()
    assert list(untrue(Struck(trial, ""))) == ["the status is preparing, and no process works on it"]


def test_a_traceback_is_no_word_for_a_person(tmp_path: Path):
    trial = Trial(tmp_path)
    trial.said.write_text("Traceback (most recent call last):\n  ...\nKeyError: 3\n", encoding="utf-8")
    assert list(untrue(Struck(trial, "", 1))) == ["it ended without a word for a person: KeyError: 3"]


@pytest.mark.parametrize(
    ("wanted", "numbers"), [(0, [0, 1, 2, 3, 4, 5]), (1, [3]), (2, [1, 4]), (9, [0, 1, 2, 3, 4, 5])]
)
def test_fewer_attempts_are_spread_over_the_places(wanted: int, numbers: list[int]):
    assert spread(6, wanted) == numbers
