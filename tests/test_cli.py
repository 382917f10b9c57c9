"""The command as a user runs it, as a process: results, exit codes, and what is left behind after a mistake."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.configs import recipe_for, recipe_names
from lorasmith.trainer.cli import for_a_person
from lorasmith.trainer.errors import TrainingError, UserError
from lorasmith.trainer.events import Warned
from lorasmith.trainer.jobs import RunFolder

from .command import ENVIRONMENT, MAIN, lorasmith
from .conftest import draw_picture


@pytest.fixture
def config(tmp_path: Path, pictures: Path) -> Path:
    """A short run's file."""
    file = tmp_path / "config.toml"
    file.write_text(
        f"""
name = "short"
[[data]]
path = "{pictures.name}"
trigger = "trg"
[adapter]
rank = 2
alpha = 1.0
[budget]
images = 8
batch = 4
[save]
every = 1
[sample]
every = 0
[runtime]
cache = "cache"
""",
        encoding="utf-8",
    )
    return file


# ---------------------------------------------------------------------------------------------------------------------
# the way it should go


def test_from_init_to_export(tmp_path: Path, pictures: Path):
    written = lorasmith(tmp_path, "init", "mine.toml", "--images", pictures.name, "--trigger", "trg").stdout
    assert "7 images" in written
    assert 'path = "pictures"' in (tmp_path / "mine.toml").read_text(encoding="utf-8")

    short = ["--set", "budget.images=8", "--set", "sample.steps=1", "--set", "runtime.cache=cache"]
    plan = lorasmith(tmp_path, "plan", "mine.toml", *short).stdout
    assert "captions: 7 of 7 used (7 from *.txt)" in plan
    assert "picture 0.png: 'trg, emoji of thing 0'" in plan
    assert not (tmp_path / "runs").exists()

    trained = lorasmith(tmp_path, "train", "mine.toml", *short)
    files = [Path(line) for line in trained.stdout.splitlines() if line.endswith(".safetensors")]
    assert [file.name for file in files] == ["mine.safetensors", "mine-diffusers.safetensors"]
    assert all(file.is_file() for file in files)
    assert "training unet: 129 modules" in trained.stderr
    beside = {path.name for path in (tmp_path / "runs/mine/exports").iterdir()}
    assert beside >= {"mine.md", "mine.json", "mine.png", "mine-grid.png"}

    listed = json.loads(lorasmith(tmp_path, "runs", "--json").stdout)
    assert [(run["name"], run["state"]) for run in listed] == [("mine", "done")]

    facts = json.loads(lorasmith(tmp_path, "inspect", files[0], "--json").stdout)
    assert facts["format"] == "kohya"

    drawn = lorasmith(tmp_path, "sample", "mine", "--prompt", "emoji of pizza", "--out", "mine-drawn").stdout
    with Image.open(tmp_path / drawn.strip()) as picture:
        assert picture.size == (64, 64)

    out = lorasmith(tmp_path, "export", "runs/mine", "--format", "diffusers", "--precision", "fp32", "--out", "own")
    assert Path(out.stdout.splitlines()[0]) == Path("own", "mine-diffusers.safetensors")


def test_plan_as_json_counts_everything(config: Path):
    facts = json.loads(lorasmith(config.parent, "plan", config, "--json").stdout)
    assert facts["images"] == facts["captions"] == 7
    assert sum(facts["buckets"].values()) == 7
    assert facts["images_seen"] >= 8


def test_set_goes_before_the_file(config: Path):
    lorasmith(
        config.parent, "train", config, "--set", "name=other", "--set", "adapter.rank=3", "--set", "adapter.alpha=9"
    )
    read = RunFolder(config.parent / "runs/other").read_config()
    assert (read.adapter.rank, read.adapter.alpha) == (3, 9.0)
    facts = json.loads(lorasmith(config.parent, "inspect", "runs/other/exports/other.safetensors", "--json").stdout)
    assert "9" in json.dumps(facts)


def test_stop_then_resume_reaches_the_end(config: Path):
    process, run = _training(config, "budget.images=4000", "save.every=0", "sample.steps=1")
    assert run.status().state == "training"
    assert "short will save after its current step." in lorasmith(config.parent, "save", "short").stdout
    _wait(lambda: run.status().step > max(run.saved_steps(), default=run.status().step))
    assert "short will draw previews" in lorasmith(config.parent, "preview", "short").stdout
    assert "will save and stop" in lorasmith(config.parent, "stop", "short").stdout
    process.communicate()
    assert process.returncode == 0
    stopped = run.status()
    assert stopped.state == "stopped"
    assert len(run.saved_steps()) == 2
    assert run.saved_steps()[-1] == stopped.step
    assert len(list((run.path / "samples").iterdir())) == 1

    budget = f"budget.images={4 * stopped.step + 8}"
    lorasmith(config.parent, "resume", "short", "--from", run.saved_steps()[0], "--set", budget)
    assert run.status().state == "done"


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process on Windows")
def test_the_first_ctrl_c_stops_and_saves(config: Path):
    process, run = _training(config, "budget.images=4000", "save.every=0")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert run.status().state == "stopped"
    assert run.saved_steps() == [run.status().step]


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
@pytest.mark.exhaustive  # `make test` has it among the faults
def test_a_killed_run_says_so_and_resumes(config: Path):
    process, run = _training(config, "budget.images=120")
    process.kill()
    process.communicate()
    status = run.status()
    assert status.state == "interrupted"
    assert f"Interrupted at step {status.step}" in lorasmith(config.parent, "runs").stdout
    lorasmith(config.parent, "resume", "short")
    assert run.status().state == "done"


def _training(config: Path, *settings: str) -> tuple[subprocess.Popen[bytes], RunFolder]:
    """A process that trains, and has taken a step."""
    overrides = [part for setting in settings for part in ("--set", setting)]
    process = subprocess.Popen(
        [*MAIN, "train", str(config), *overrides],
        cwd=config.parent,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    run = RunFolder(config.parent / "runs/short")
    _wait(lambda: run.status().step)
    return process, run


def _wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------------------------
# a user's folder


def test_a_folder_as_people_have_it(tmp_path: Path):
    """Twelve photographs of many kinds, half of them without captions: trains, and says what it did with each."""
    folder = tmp_path / "Ferien Fotos"
    folder.mkdir()
    sizes = [(400, 300), (300, 400), (640, 480), (200, 200), (500, 180), (180, 500), (96, 96), (320, 200), (150, 300)]
    for number, size in enumerate(sizes):
        draw_picture(number, size).save(folder / f"foto {number}.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_picture(9, (300, 200)).save(folder / "schräg über Öl.jpg", exif=exif)
    transparent = draw_picture(10, (128, 128)).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((128, 128)))
    transparent.save(folder / "猫 [1].png")
    draw_picture(11, (256, 192)).convert("CMYK").save(folder / "print.jpg")
    for number in range(6):
        (folder / f"foto {number}.txt").write_text(f"eine Straße, {number}", encoding="utf-8")

    lorasmith(tmp_path, "init", "ferien.toml", "--images", folder, "--trigger", "ferien")
    short = ["--set", "budget.images=24", "--set", "sample.steps=2", "--set", "runtime.cache=cache"]
    said = lorasmith(tmp_path, "train", "ferien.toml", *short).stdout

    rows = {line.split("  ")[0]: line for line in said.splitlines()}
    assert "images: 12" in rows
    assert "rotated by EXIF orientation 6" in rows["schräg über Öl.jpg"]
    assert "200 x 300" in rows["schräg über Öl.jpg"]
    assert "transparency laid on white" in rows["猫 [1].png"]
    assert "converted from CMYK to RGB" in rows["print.jpg"]
    assert "foto 0.txt" in rows["foto 0.jpg"]
    assert "none" in rows["foto 8.jpg"]
    assert "captions: 12 of 12 used (6 from *.txt, 6 from trigger alone)" in said
    assert "foto 0.jpg: 'ferien, eine Straße, 0'" in said
    assert RunFolder(tmp_path / "runs/ferien").status().state == "done"


# ---------------------------------------------------------------------------------------------------------------------
# mistakes: one clear error, exit code 2, nothing half-written


def _no_folder(file: Path, pictures: Path) -> list[str]:
    return ["--set", "data.path=/no/such/folder"]


def _no_images(file: Path, pictures: Path) -> list[str]:
    (file.parent / "empty").mkdir()
    (file.parent / "empty/notes.doc").touch()
    return ["--set", f"data.path={(file.parent / 'empty').as_posix()}"]


def _broken_image(file: Path, pictures: Path) -> list[str]:
    (pictures / "broken.jpg").write_bytes(b"this is no picture")
    return []


def _unknown_key(file: Path, pictures: Path) -> list[str]:
    file.write_text(file.read_text(encoding="utf-8").replace("rank", "rnak"), encoding="utf-8")
    return []


def _rank_0(file: Path, pictures: Path) -> list[str]:
    return ["--set", "adapter.rank=0"]


def _no_base(file: Path, pictures: Path) -> list[str]:
    return ["--set", "base.model=models/none"]


def _unwritable(file: Path, pictures: Path) -> list[str]:
    (file.parent / "occupied").write_text("a file stands where the folder should be")
    return ["--set", "runs=occupied"]


def _xformers(file: Path, pictures: Path) -> list[str]:
    return ["--set", "runtime.attention=xformers"]


def _graphs(file: Path, pictures: Path) -> list[str]:
    return ["--set", "runtime.cuda_graphs=true"]


def _idle_part(file: Path, pictures: Path) -> list[str]:
    return ["--set", "optimizer.text_encoder_lr=0"]


def _orphan(file: Path, pictures: Path) -> list[str]:
    (pictures / "nobody.txt").write_text("a caption", encoding="utf-8")
    return []


MISTAKES = {
    "missing folder": (_no_folder, ["/no/such/folder", "no such folder", "data.path"]),
    "no images": (_no_images, ["empty", "no images", ".doc"]),
    "unreadable image": (_broken_image, ["broken.jpg", "cannot be read", "remove it"]),
    "unknown key": (_unknown_key, ["config.toml: adapter.rnak", "unknown key", "Did you mean adapter.rank?"]),
    "rank 0": (_rank_0, ["adapter.rank", "greater than or equal to 1"]),
    "no such base": (_no_base, ["base.model", "models/none", "Hub"]),
    "unwritable output": (_unwritable, ["occupied", "runs", "you may write to"]),
    "xformers without a GPU": (_xformers, ["runtime.attention", "NVIDIA", '"auto"']),
    "CUDA graphs without a GPU": (_graphs, ["runtime.cuda_graphs", "NVIDIA", "runtime.cuda_graphs = false"]),
    "a part that would not learn": (_idle_part, ["optimizer.text_encoder_lr", "adapter.text_encoder = false"]),
    "a caption that would be ignored": (_orphan, ["nobody.txt", "without an image", "remove it"]),
}


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_error_and_leaves_nothing(mistake: str, command: str, config: Path, pictures: Path):
    make, words = MISTAKES[mistake]
    if mistake.endswith("without a GPU"):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this computer has a GPU")
    arguments = make(config, pictures)
    before = sorted(config.parent.rglob("*"))
    done = lorasmith(config.parent, command, config, *arguments, code=2)
    assert done.stderr.startswith("error: ")
    assert [word for word in words if word not in done.stderr] == []
    assert sorted(config.parent.rglob("*")) == before


def test_a_finished_runs_name_is_refused(config: Path):
    lorasmith(config.parent, "train", config)
    before = {path: path.stat().st_mtime_ns for path in config.parent.rglob("*") if path.is_file()}
    done = lorasmith(config.parent, "train", config, code=2)
    assert "'short' is in use (Done, " in done.stderr
    assert "--set name=" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in config.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "none.toml"], "no such file"),
        (["resume", "none"], "is not a run folder"),
        (["stop", "none"], "is not a run folder"),
        (["inspect", "none.safetensors"], "none.safetensors"),
        (["nonsense"], "nonsense"),
        (["train"], "Missing argument"),
        (["sample", "none", "--prompt", "x", "--seed", "99999999999999999999"], "--seed"),
        (["sample", "none", "--prompt", "x", "--strength", "nan"], "--strength: nan is no strength"),
        (["sample", "none", "--prompt", "x", "--strength", "inf"], "--strength: inf is no strength"),
        (["sample", "none", "--prompt", "x", "--out", "afile/x"], "afile is a file, not a folder"),
        (["export", "none", "--out", "afile"], "afile is a file, not a folder"),
        (["demo", "--out", "afile"], "afile is a file, not a folder"),
        (["init", "afile/x.toml", "--images", "."], "afile is a file, not a folder"),
        (["ui", "--runs", "afile"], "afile is a file, not a folder"),
        (["ui", "--port", "0"], "--port"),
        (["ui", "--port", "65536"], "--port"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_use_is_exit_code_2(arguments: list[str], words: str, tmp_path: Path):
    (tmp_path / "afile").touch()
    assert words in lorasmith(tmp_path, *arguments, code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that not even root can write to")
@pytest.mark.parametrize("arguments", [["sample", "none", "--prompt", "x"], ["export", "none"], ["demo"]], ids=str)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(arguments: list[str], tmp_path: Path):
    done = lorasmith(tmp_path, *arguments, "--out", "/proc/x", code=2)
    assert done.stderr.startswith("error: --out: /proc cannot be written (")
    assert len(done.stderr.splitlines()) == 1


def test_errors_of_the_system_are_one_line_with_the_file(tmp_path: Path):
    """A runs folder whose run.toml became a folder in the middle, a full disk, a port in use."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.toml").write_text('name = "x"\n[[data]]\npath = "p"\n', encoding="utf-8")
    (tmp_path / "broken/events.jsonl").mkdir()
    done = lorasmith(tmp_path, "runs", ".", code=2)
    assert done.stderr.startswith("error: ")
    assert "events.jsonl: cannot be read or written (" in done.stderr
    assert len(done.stderr.splitlines()) == 1

    full = for_a_person(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file"))
    assert isinstance(full, UserError)
    assert str(full).startswith(f"some/file: cannot be read or written ({os.strerror(errno.ENOSPC)}). ")
    assert str(for_a_person(OSError("no port\n is free"))).startswith("no port is free")


def test_a_full_gpu_is_told_with_what_helps_and_a_bug_is_not():
    import torch

    told = for_a_person(torch.OutOfMemoryError("CUDA out of memory"))
    assert isinstance(told, TrainingError)
    assert (told.exit_code, told.problems[0].what) == (1, "the GPU's memory is full")
    assert "CUDA_VISIBLE_DEVICES" in told.problems[0].fix
    assert for_a_person(RuntimeError("a bug")) is None


@pytest.mark.parametrize(
    ("base", "family", "prediction", "recipe"),
    [
        ("pocket", "sd1", "epsilon", "demo"),
        ("random:sd15", "sd1", "epsilon", "style-sd1"),
        ("random:sd21", "sd2", "v_prediction", "style-sd2"),
        ("some/xl", "sdxl", "epsilon", "style-sdxl"),
        ("some/xl", "sdxl", "v_prediction", "style-sdxl-v"),
    ],
)
def test_each_family_has_its_recipe(base: str, family: str, prediction: str, recipe: str):
    assert recipe_for(base, family, prediction) == recipe
    assert recipe in recipe_names()


def test_previews_can_be_switched_off_at_resume(config: Path):
    short = ["--set", "sample.every=1", "--set", "sample.steps=1", "--set", 'sample.prompts=["a"]']
    lorasmith(config.parent, "train", config, *short)
    lorasmith(config.parent, "resume", "short", "--set", "sample.every=0", "--set", "budget.images=16")
    run = RunFolder(config.parent / "runs/short")
    assert run.status().state == "done"
    assert run.read_config().sample.every == 0


def test_weights_that_cannot_be_loaded_leave_no_run_behind(config: Path, tmp_path: Path):
    from . import tiny

    tiny.make_sd1(tmp_path / "base")
    weights = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = lorasmith(tmp_path, "train", config, "--set", "base.model=base", code=2)
    assert "cannot be loaded" in done.stderr
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("resize", "x.safetensors", "--out", "y.safetensors"), "--rank, --energy: give one of the two"),
        (("resize", "x.safetensors", "--energy", "0", "--out", "y.safetensors"), "--energy: 0 is no share to keep"),
        (("merge", "x.safetensors", "--into", "pocket", "--format", "kohya", "--out", "y"), "--format: has no effect"),
        (("merge", "x.safetensors:0", "--out", "y.safetensors"), "FILE: '0' in 'x.safetensors:0' is no strength"),
        (("merge", "x.safetensors", "z.safetensors", "--block", "unet=0", "--out", "y.safetensors"), "--block: cannot"),
        (("convert", "pocket", "y.safetensors", "--format", "kohya"), "--format: has no effect: pocket is a whole"),
        (
            ("extract", "pocket", "pocket", "--energy", "0.9", "--conv-rank", "4", "--out", "y.safetensors"),
            "--conv-rank",
        ),
        (("verify", "x.safetensors"), "x.safetensors: no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:3]),
)
def test_a_mistake_in_a_file_command_gets_one_clear_line(tmp_path: Path, words: tuple[str, ...], says: str):
    done = lorasmith(tmp_path, *words, code=2)
    assert done.stderr.startswith(f"error: {says}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_heavy():
    code = "import sys, lorasmith.trainer.cli; print([m for m in ('torch', 'diffusers', 'gradio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "train" in lorasmith(Path.cwd(), "--help").stdout
    assert lorasmith(Path.cwd(), "--version").stdout.startswith("lorasmith ")


def test_warnings_are_events():
    assert Warned("x").type == "warning"
