"""A base model is recognised from its small files; what is wrong with it is said, and said soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorasmith.trainer.bases import POCKET, anchored_base, inspect_base
from lorasmith.trainer.errors import BaseModelError

CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
NOBODY = "http://127.0.0.1:9"  # the discard port, where nothing listens


def copy_of_pocket(folder: Path) -> Path:
    """The small files of the embedded base."""
    for name in CONFIGS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((POCKET / name).read_bytes())
    return folder


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    config = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def what_is_wrong(model: Path | str) -> str:
    with pytest.raises(BaseModelError) as caught:
        inspect_base(str(model))
    [problem] = caught.value.problems
    assert problem.where == "base.model"
    assert problem.fix
    return problem.what


def in_a_new_process(model: str, **environment: str) -> str:
    """What is found, or what is wrong, where the Hub's address and cache are others."""
    code = (
        "import sys\n"
        "from lorasmith.trainer.bases import inspect_base\n"
        "from lorasmith.trainer.errors import BaseModelError\n"
        "try: print(inspect_base(sys.argv[1]).family)\n"
        "except BaseModelError as error: print(error.problems[0].what)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("model", "family", "resolution", "bucket_step"),
    [
        ("pocket", "sd1", 64, 16),
        ("random:sd15", "sd1", 512, 64),
        ("random:sd21", "sd2", 768, 64),
        ("random:sdxl", "sdxl", 1024, 32),
    ],
)
def test_the_family_is_recognised(model: str, family: str, resolution: int, bucket_step: int):
    found = inspect_base(model)
    assert (found.family, found.resolution, found.bucket_step) == (family, resolution, bucket_step)


def test_a_folder_is_the_same_base_as_the_embedded_one(tmp_path: Path):
    found, pocket = inspect_base(str(copy_of_pocket(tmp_path))), inspect_base("pocket")
    assert (found.family, found.prediction, found.resolution) == (pocket.family, pocket.prediction, pocket.resolution)
    assert found.source == str(tmp_path.resolve())


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet", "sample_size", None),
        ("unet", "sample_size", [8, 8]),
        ("unet", "sample_size", "8"),
        ("unet", "block_out_channels", None),
        ("unet", "block_out_channels", 8),
        ("vae", "block_out_channels", None),
        ("vae", "block_out_channels", []),
        ("vae", "scaling_factor", "0.2"),
        ("vae", "scaling_factor", 0),
    ],
)
def test_a_key_that_is_missing_or_odd_is_named(tmp_path: Path, file: str, key: str, value: Any):
    change(copy_of_pocket(tmp_path) / file / "config.json", **{key: value})
    assert key in what_is_wrong(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff", b"{"])
@pytest.mark.parametrize("file", CONFIGS[1:])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, file: str, content: bytes):
    (copy_of_pocket(tmp_path) / file).write_bytes(content)
    assert str(tmp_path / file) in what_is_wrong(tmp_path)


@pytest.mark.parametrize("file", CONFIGS)
def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path, file: str):
    (copy_of_pocket(tmp_path) / file).unlink()
    assert Path(file).name in what_is_wrong(tmp_path)


def test_paths_become_absolute_and_other_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "pocket").mkdir()
    for name in ("folder", "model.safetensors"):
        assert anchored_base(name) == str(tmp_path / name)
    for name in ("", "pocket", "owner/name", "random:sdxl"):
        assert anchored_base(name) == name


@pytest.mark.parametrize("model", ["a--b/c", "a/b..c", "-a/b", "a/b."])
def test_what_the_hub_would_never_accept_as_a_name_is_refused(model: str):
    assert what_is_wrong(model) == f"{model} is neither a folder here nor a Hub id"


@pytest.mark.parametrize("model", ["nothing", "./a/b", "a/b/c", "random:sd3"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(model: str):
    what_is_wrong(model)


def test_a_hub_that_does_not_answer_is_given_up_soon_and_quietly(tmp_path: Path):
    start = time.monotonic()
    said = in_a_new_process("owner/name", HF_ENDPOINT=NOBODY, HF_HOME=str(tmp_path))
    assert said == "owner/name is no folder here, and the Hugging Face Hub cannot be reached"
    assert time.monotonic() - start < 15  # huggingface_hub alone takes 23 seconds


def test_a_model_in_the_cache_needs_no_hub(tmp_path: Path):
    model = tmp_path / "hub" / "models--owner--name"
    copy_of_pocket(model / "snapshots" / ("0" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    environment = {"HF_ENDPOINT": NOBODY, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    assert in_a_new_process("owner/name", **environment) == "sd1"
