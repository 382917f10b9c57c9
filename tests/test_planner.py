"""Plans that another process makes for the page: it stays warm, is replaced when it dies, and ends with its parent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorasmith.trainer.configfile import validate
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.plan import make_plan
from lorasmith.ui.planner import Planner

from .browser import wait_until


@pytest.fixture(scope="module")
def planner() -> Iterator[Planner]:
    made = Planner()
    yield made
    made.close()


def values_for(pictures: Path, **over: Any) -> dict[str, Any]:
    return {"name": "x", "recipe": "demo", "data": [{"path": str(pictures), "trigger": "trg"}]} | over


def worker() -> psutil.Process:
    """The process that makes plans."""
    [found] = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    return found


def test_a_plan_is_the_one_that_training_would_make(planner: Planner, pictures: Path):
    values = values_for(pictures)
    planned, plan = planner.plan(values), make_plan(validate(values))
    assert planned.facts == plan.facts()
    assert planned.config == plan.config
    assert planned.warnings == list(plan.warnings())
    assert planned.captions == ("trg, emoji of thing 0", "trg, emoji of thing 3")


def test_every_problem_comes_back_with_its_place_and_its_fix(planner: Planner, pictures: Path):
    with pytest.raises(UserError) as caught:
        planner.plan(values_for(pictures, adapter={"rnak": 3}, budget={"batch": 0}))
    assert {problem.where for problem in caught.value.problems} == {"settings: adapter.rnak", "settings: budget.batch"}
    assert "Did you mean adapter.rank?" in [problem.fix for problem in caught.value.problems]
    with pytest.raises(UserError, match="there is no such folder"):
        planner.plan(values_for(Path("/no/such/folder")))


@pytest.mark.parametrize(
    ("model", "family", "sentence"),
    [
        ("pocket", "sd1", "the small base that comes with Lorasmith"),
        ("random:sd15", "sd1", "Stable Diffusion 1, 512 pixels: its text goes into the UNet through 1x1 convolutions"),
        ("random:sd21", "sd2", "through linear layers"),
        ("random:sdxl", "sdxl", "SDXL, 1024 pixels: its UNet is also told the size of the picture"),
    ],
)
def test_a_base_is_recognised_and_it_is_said_by_what(planner: Planner, model: str, family: str, sentence: str):
    found = planner.recognise(model)
    assert found.family == family
    assert sentence in found.sentence


def test_what_is_no_base_is_refused(planner: Planner):
    with pytest.raises(UserError, match="nonsense does not exist"):
        planner.recognise("nonsense")


def test_a_process_that_died_is_replaced(planner: Planner):
    assert planner.recognise("random:sd15").family == "sd1"
    first = worker()
    first.kill()
    first.wait(30)
    assert planner.recognise("random:sd15").family == "sd1"
    assert worker().pid != first.pid


ASKING = """
import sys
from lorasmith.ui.planner import Planner
if __name__ == "__main__":
    planner = Planner()
    print(planner.recognise("random:sd15").family, "torch" in sys.modules, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has asked, and lives on."""
    script = tmp_path / "asking.py"
    script.write_text(ASKING, encoding="utf-8")
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, str(script)], stdin=pipe, stdout=pipe, text=True)
    yield process
    process.kill()
    process.communicate()


def test_who_asks_needs_no_torch_and_takes_the_process_along_when_it_is_killed(asking: subprocess.Popen[str]):
    assert asking.stdout
    assert asking.stdout.readline().split() == ["sd1", "False"]
    children = [one for one in psutil.Process(asking.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    assert len(children) == 1
    asking.kill()
    wait_until(lambda: not children[0].is_running(), "the planning process has ended")


def test_after_a_close_the_process_is_gone(pictures: Path):
    planner = Planner()
    assert planner.plan(values_for(pictures)).facts["images"] == 7
    before = {child.pid for child in psutil.Process().children()}
    planner.close()
    assert len(before - {child.pid for child in psutil.Process().children()}) == 1
