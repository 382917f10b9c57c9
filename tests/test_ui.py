"""The browser app, through a real server: it shows what is in run folders, and starts runs as processes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from lorasmith.trainer.bases import POCKET
from lorasmith.trainer.demo import STYLE
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.events import EventLog, Failed, Sampled, Step
from lorasmith.trainer.jobs import RunFolder
from lorasmith.ui.app import EXAMPLE, Starts, build, losses, previews_of, sentence_of, serve, view
from lorasmith.ui.share import clients_of, files_of


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


def test_a_start_that_fails_says_why(client: Client, tmp_path: Path, pictures: Path):
    """The process ends before there is a run folder, or takes it away again; its log is what is left."""
    shutil.copytree(POCKET, tmp_path / "base")
    answers = [str(pictures), str(tmp_path / "base"), "doomed", "trg"]
    weights = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    starts = Starts(tmp_path / "runs")
    start_with(weights, starts, answers)
    assert news_of(starts) == "**doomed** is being started."
    starts.processes["doomed"].wait(240)
    assert not (tmp_path / "runs/doomed").exists()
    assert news_of(starts).startswith("**doomed** could not be started:")
    assert "error: " in news_of(starts)
    assert "unet" in news_of(starts)
    assert "could not be started" in client.predict("doomed", api_name="/status")


def start_with(weights: Path, starts: Starts, answers: list[str]) -> None:
    """Start a run whose base loses its weights after the plan was made."""
    from lorasmith.ui.app import plan_of

    _, toml = plan_of(starts.folder, *answers)
    weights.unlink()
    starts.folder.mkdir()
    (starts.folder / "doomed.toml").write_text(toml, encoding="utf-8")
    starts.start("doomed", ["train", str(starts.folder / "doomed.toml")])


def news_of(starts: Starts) -> str:
    return view(starts, None, None)[0]


def test_a_run_that_failed_shows_the_end_of_its_log(tmp_path: Path):
    run = a_run(tmp_path, Step(1, 4, 0.5, 0.1, {"unet": 1e-4}, 0.1), Failed("out of ink"))
    starts = Starts(tmp_path)
    assert sentence_of(starts, run.name) == "**x**: failed at step 1: out of ink"
    (tmp_path / "x.log").write_text("\n".join(f"line {number}" for number in range(100)), encoding="utf-8")
    said = sentence_of(starts, run.name)
    assert said.startswith("**x**: failed at step 1: out of ink\n\n~~~text\nline 88\n")
    assert "\nline 99\n~~~\n" in said


def test_without_runs_the_page_says_so_and_offers_the_example(tmp_path: Path):
    news, picker, shown, sentence, example, *hidden = view(Starts(tmp_path), None, None)
    assert (news, picker.value, shown) == ("", None, None)
    assert sentence.startswith("There are no runs yet.")
    assert example["visible"]
    assert [update["visible"] for update in hidden] == [False] * 4


def test_with_a_run_the_page_shows_it_and_sends_its_pictures_once(tmp_path: Path):
    a_run(tmp_path, Sampled(0, "samples/step-000000", ["a"]), Step(1, 4, 0.5, 0.1, {"unet": 1e-4}, 0.1))
    _, _, shown, sentence, example, *parts = view(Starts(tmp_path), None, None)
    assert sentence == "**x**: interrupted at step 1 of 0, saved up to step 0"
    assert not example["visible"]
    assert [update["visible"] for update in parts] == [True, True, False, False]
    *_, loss, previews, files, clients = view(Starts(tmp_path), "x", shown)
    assert loss["visible"]
    assert "value" not in previews
    assert "value" not in files
    assert "value" not in clients


def test_only_files_to_share_are_offered(tmp_path: Path):
    run = a_run(tmp_path, Step(1, 4, 0.5, 0.1, {"unet": 1e-4}, 0.1))
    (run.exports / ".x-diffusers.1.tmp").mkdir(parents=True)
    for name in ("x.safetensors", "x.unverified.safetensors", "x.safetensors.rejected", ".x-diffusers.1.tmp/a.json"):
        (run.exports / name).touch()
    assert [Path(file).name for file in files_of(run)] == ["x.safetensors"]


def test_what_clients_make_of_the_files_is_a_table(tmp_path: Path):
    run = a_run(tmp_path, Step(1, 4, 0.5, 0.1, {"unet": 1e-4}, 0.1))
    run.exports.mkdir()
    said = [("A1111", "same", ""), ("Forge", "none", "it skips the file")]
    clients = [{"client": client, "reading": reading, "why": why} for client, reading, why in said]
    report = {"file": "x.safetensors", "clients": clients}
    (run.exports / "x-verified.json").write_text(json.dumps({"files": [report]}), encoding="utf-8")
    assert clients_of(run).values.tolist() == [
        ["x.safetensors", "A1111", "does what was trained", ""],
        ["x.safetensors", "Forge", "does not read it", "it skips the file"],
    ]
    assert view(Starts(tmp_path), "x", None)[-1]["visible"]


def test_what_was_done_again_after_a_kill_is_shown_once(tmp_path: Path):
    first, again = (Step(1, 4, loss, 0.1, {"unet": 1e-4}, 0.1) for loss in (0.5, 0.25))
    drawn = Sampled(1, "samples/step-000001", ["a"])
    run = a_run(tmp_path, first, drawn, again, drawn)
    assert losses(run).values.tolist() == [[1, 0.25, "each step"], [1, 0.25, "smoothed"]]
    assert [label for _, label in previews_of(run)] == ["step 1: a"]


def a_run(folder: Path, *events) -> RunFolder:
    (folder / "x").mkdir()
    (folder / "x/config.toml").touch()
    log = EventLog(folder / "x/events.jsonl")
    for event in events:
        log.append(event)
    return RunFolder(folder / "x")


def test_losses_are_numbers_even_when_there_are_none(tmp_path: Path):
    """The plot takes a column for names if the first that it is given is empty and of no type."""
    none = losses(RunFolder(tmp_path))
    assert [none[column].dtype.kind for column in ("step", "loss")] == ["i", "f"]


def test_a_port_in_use_is_told(client: Client, tmp_path: Path):
    port = int(client.src.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"the port {port} is in use"):
        serve(tmp_path, port)


def test_the_example_is_the_run_that_the_demo_makes_first():
    assert EXAMPLE == STYLE


def test_the_endpoints_are_these(client: Client):
    api = client.view_api(return_format="dict")
    assert isinstance(api, dict)
    assert set(api["named_endpoints"]) == {"/plan", "/train", "/status", "/stop"}


def test_stopping_nothing_is_an_error(client: Client):
    with pytest.raises(AppError, match="no run to stop"):
        client.predict("", api_name="/stop")


def wait_until(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.3)
