"""The browser app, through a real server: it shows what is in run folders, and starts runs as processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from lorasmith.trainer.jobs import RunFolder
from lorasmith.ui.app import build, losses, previews_of


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    page = build(tmp_path / "runs")
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        yield Client(url, verbose=False)
    finally:
        page.close(verbose=False)


def test_a_run_is_planned_started_watched_and_shown(client: Client, tmp_path: Path, pictures: Path):
    answers = [str(pictures), "pocket", "from the page", "trg"]
    assert "7 images, 7 captions used" in client.predict(*answers, api_name="/plan")
    (tmp_path / "runs").mkdir(exist_ok=True)
    assert "Started" in client.predict(*answers, api_name="/train")

    run = RunFolder(tmp_path / "runs" / "from the page")
    wait_until(lambda: run.status().step >= 1)
    assert "training, step" in client.predict("from the page", api_name="/status")
    assert "will save and stop" in client.predict("from the page", api_name="/stop")
    wait_until(lambda: run.status().state == "stopped")
    assert run.saved_steps()
    assert "stopped and saved" in client.predict("from the page", api_name="/status")
    assert len(losses(run)) == 2 * run.status().step
    assert [Path(file).is_file() for file, _ in previews_of(run)] == [True] * 4


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["/no/such/folder", "pocket", "x", ""], "no such folder"),
        (["", "pocket", "x", ""], "data.0.path"),
        (["/tmp", "nonsense", "x", ""], "does not exist"),
        (["/tmp", "pocket", "", ""], "name"),
    ],
    ids=["no folder", "no answer", "no base", "no name"],
)
def test_a_mistake_is_told_in_the_browser(client: Client, answers: list[str], message: str):
    with pytest.raises(AppError, match=message):
        client.predict(*answers, api_name="/plan")


def test_the_page_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, lorasmith.ui.app; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_stopping_nothing_is_an_error(client: Client):
    with pytest.raises(AppError, match="no run to stop"):
        client.predict("", api_name="/stop")


def wait_until(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.3)
