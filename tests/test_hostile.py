"""Files from anybody: damaged, lying, oversized or malicious ones are read or refused in words, and harm nothing."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import BertTokenizer, BlipConfig, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from lorasmith.datasets import archives, folder, sidecars, tables
from lorasmith.datasets.captioners import Blip, choose
from lorasmith.datasets.captions import CaptionRules, caption_variants
from lorasmith.datasets.folder import look, scan
from lorasmith.datasets.images import UnreadableImageError, read_rgb
from lorasmith.datasets.journal import JOURNAL, undo
from lorasmith.datasets.sidecars import LARGEST_SIDECAR, LONGEST_CAPTION
from lorasmith.datasets.unpack import as_folder
from lorasmith.trainer import jsonfile
from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.checkpoint import load_checkpoint, prune_checkpoints
from lorasmith.trainer.clients.reading import read_by_clients
from lorasmith.trainer.configfile import LARGEST, read_config
from lorasmith.trainer.diagnosis.inspection import inspect
from lorasmith.trainer.errors import BaseModelError, DataError, LorasmithError, RunError
from lorasmith.trainer.jobs import RunFolder, start_detached
from lorasmith.trainer.jsonfile import read_json
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.loraread import read_lora
from lorasmith.trainer.models import load_base, saved_tokenizer
from lorasmith.trainer.tensorheader import LONGEST, LONGEST_NAME, MOST_TENSORS, read_header
from tools.fuzz import seeds
from tools.fuzz.findings import FINDINGS
from tools.fuzz.mutations import mutated
from tools.fuzz.targets import TARGETS, Target

from .browser import wait_until
from .tiny import make_sd1

ROOT = Path(__file__).resolve().parents[1]
MOST_MEMORY = 512 * 2**20
_OF_A_RUN = [name for name, target in TARGETS.items() if target.around is seeds.runs]
EXAMPLES = dict.fromkeys(TARGETS, 30) | dict.fromkeys(_OF_A_RUN, 12)
EXAMPLES |= {"tokenizer": 3, "merges": 3, "tokenizer settings": 3, "base folder": 8, "lora": 15}
"""How many files are tried, by how long one takes."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thumbnails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---------------------------------------------------------------------------------------------------------------------
# damaged at random


@pytest.fixture
def memory() -> Iterator[None]:
    """No file makes the process much larger; a reader that believes a lying header would."""
    before = most_memory()
    yield
    assert most_memory() - before < MOST_MEMORY


def most_memory() -> int:
    """Bytes that the process had at most so far; 0 where that is not told."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def meet_hostile_files(target: Target, place: Path, examples: int) -> None:
    path = target.prepare(place)
    valid = list(target.seeds(place).values())

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=[*HealthCheck])  # pyright: ignore[reportArgumentType]: an enum
    @given(random=st.randoms(use_true_random=False))
    def meet(random: Random) -> None:
        target.meet(path, mutated(random.choice(valid), valid, random))

    meet()


@pytest.mark.parametrize("name", TARGETS)
def test_a_hostile_file_is_read_or_refused_in_words(name: str, tmp_path: Path, memory: None):
    meet_hostile_files(TARGETS[name], tmp_path, EXAMPLES[name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TARGETS)
def test_very_many_hostile_files_are_read_or_refused_in_words(name: str, tmp_path: Path, memory: None):
    meet_hostile_files(TARGETS[name], tmp_path, 50 * EXAMPLES[name])


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_read(name: str, tmp_path: Path):
    """Else every hostile one would be refused at the door."""
    target = TARGETS[name]
    path = target.prepare(tmp_path)
    for content in target.seeds(tmp_path).values():
        path.write_bytes(content)
        with suppress(BaseModelError) if name in ("base file", "base pickle") else nullcontext():  # they lack weights
            target.read(path)


@pytest.mark.parametrize("number", range(len(FINDINGS)), ids=[f"{name}, {what}" for name, what, _ in FINDINGS])
def test_what_was_found_once_is_not_found_again(number: int, tmp_path: Path, memory: None):
    name, _, content = FINDINGS[number]
    target = TARGETS[name]
    target.meet(target.prepare(tmp_path), content)


# ---------------------------------------------------------------------------------------------------------------------
# limits, as docs/limits.md tells them


def problem_of(refused: Callable[[], object]) -> str:
    with pytest.raises((LorasmithError, UnreadableImageError)) as caught:
        refused()
    if isinstance(caught.value, LorasmithError):
        (problem,) = caught.value.problems
        assert problem.where
        assert problem.fix
    return str(caught.value)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is so large, of a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_pixels(tmp_path: Path, memory: None):
    (tmp_path / "a.png").write_bytes(png_of_size(20_000, 20_000))
    assert problem_of(lambda: read_rgb(tmp_path / "a.png")) == "it has more than 178 million pixels"


def tensors(names: list[str]) -> dict[str, Any]:
    return {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (seeds.header_only({"__metadata__": {"a": "x" * LONGEST}}), "16,777,216 bytes is the most that is read"),
        (seeds.header_only(tensors([f"{n}" for n in range(MOST_TENSORS + 1)])), "holds 50,001 tensors, and 50,000"),
        (seeds.header_only(tensors(["a" * (LONGEST_NAME + 1)])), "has 1,001 characters"),
        (seeds.header_only({"__metadata__": "deep"}).replace(b'"deep"', b"[[[]]]"), "__metadata__ in its metadata"),
    ],
    ids=["length", "tensors", "names", "metadata"],
)
def test_headers(tmp_path: Path, content: bytes, what: str, memory: None):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert what in problem_of(lambda: read_header(path))
    assert what in problem_of(lambda: inspect_base(str(path)))


def test_as_many_tensors_as_may_be_are_read(tmp_path: Path, memory: None):
    path = tmp_path / "a.safetensors"
    path.write_bytes(seeds.header_only(tensors([f"lora_unet_{n}.alpha" for n in range(MOST_TENSORS)])))
    assert len(read_header(path).entries) == MOST_TENSORS


def test_metadata_are_shown_in_part(tmp_path: Path):
    deep = "[" * 200 + "]" * 200
    said = {"thumbnail": "x" * 5000, "list": json.dumps(["x"] * 400_000), "deep": deep, "short": "[1]"}
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", said)
    shown = inspect(tmp_path / "a.safetensors")["metadata"]
    assert shown["thumbnail"] == "x" * 40 + "... (5000 characters)"
    assert shown["list"] == '["x", "x", "x", "x", "x", "x", "x", "x",... (2000000 characters)'
    assert shown["deep"] == deep
    assert shown["short"] == [1]


def test_entries_of_an_archive_are_counted_before_they_are_listed(tmp_path: Path, memory: None):
    """zipfile would read the list whole, and make a gigabyte of it."""
    size = archives.LARGEST_LIST + 1
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, size, 0, 0)
    with (tmp_path / "a.zip").open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(size)
        file.write(end)
    assert "the list of its entries has 25,165,825 bytes" in problem_of(
        lambda: as_folder(str(tmp_path / "a.zip"), tmp_path)
    )


def test_rows_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "MOST_ENTRIES", 1)
    path = tmp_path / "a.parquet"
    path.write_bytes(seeds.tables(tmp_path)["structs"])
    assert "row 1: is beyond 1 rows or 20 GiB" in problem_of(lambda: as_folder(str(path), tmp_path))
    monkeypatch.setattr(tables, "MOST_BYTES", 100)
    assert "is beyond" in problem_of(lambda: as_folder(str(path), tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", "x" * (LONGEST_CAPTION + 1), "holds a caption of 10,001 characters; 10,000 is the most"),
        ("a.txt", "x " * LARGEST_SIDECAR, "has 2,097,152 bytes; 1,048,576 is the most for captions"),
        ("a.json", json.dumps({"caption": "x" * (LONGEST_CAPTION + 1)}), "holds a caption of 10,001 characters"),
        ("a.json", '"\\ud800"', r"holds '\ud800', half a letter, which is no text"),
        ("a.json", "[" * 10_000, "is not JSON (it is nested too deep)"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\\udfff"}', "line 1: holds"),
        ("metadata.jsonl", "x" * 3000, "has 3,000 bytes; 2,000 is the most"),
    ],
)
def test_captions(tmp_path: Path, name: str, content: str, what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sidecars, "LARGEST_TABLE", 2000)
    seeds.photos(tmp_path)
    (tmp_path / "photos" / name).write_text(content, encoding="utf-8")
    assert what in problem_of(lambda: scan(tmp_path / "photos"))


def test_wildcards_that_never_close_take_no_time():
    caption = "{" + "|" * (LONGEST_CAPTION - 1)
    assert caption_variants([caption], CaptionRules(wildcards=True), "seed") == (caption,)


def test_files_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seeds.photos(tmp_path)
    (tmp_path / "photos" / "a.txt").write_text("a cat")
    monkeypatch.setattr(folder, "MOST_FILES", 1)
    assert "holds more than 1 files. Name the folder of your images." in problem_of(lambda: look(tmp_path / "photos"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("#" * (LARGEST + 1), "has more than 256 KiB"),
        ("a = " + "[" * 5000, "is not valid TOML"),
    ],
    ids=["size", "nesting"],
)
def test_configurations(tmp_path: Path, content: str, what: str):
    (tmp_path / "a.toml").write_text(content)
    assert what in problem_of(lambda: read_config(tmp_path / "a.toml"))


def test_small_files_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jsonfile, "LARGEST", 2**20)
    file = tmp_path / "a.json"
    for content, what in (("[" * 10_000, "too deep"), ("[NaN]", "no number"), (" " * (2**20 + 1), "more than 1 MiB")):
        file.write_text(content)
        with pytest.raises(ValueError, match=what):
            read_json(file)


@pytest.mark.parametrize(
    ("part", "settings_", "what"),
    [
        ("unet", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ("unet", {"transformer_layers_per_block": [[1, 10**6]]}, "transformer_layers_per_block is"),
        ("unet", {"sample_size": 10**6}, "sample_size is 1000000"),
        ("unet", {"block_out_channels": [32] * 9}, "block_out_channels is"),
        ("vae", {"scaling_factor": 10**400}, "scaling_factor is 1"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ],
)
def test_models(tmp_path: Path, part: str, settings_: dict[str, Any], what: str):
    seeds.base_folder(tmp_path)
    file = tmp_path / "base" / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings_))
    assert what in problem_of(lambda: skeleton(inspect_base(str(tmp_path / "base"))))


def test_tokenizers(tmp_path: Path):
    seeds.base_folder(tmp_path)
    info = inspect_base(str(tmp_path / "base"))
    with (tmp_path / "base/tokenizer/vocab.json").open("r+b") as file:
        file.truncate(jsonfile.LARGEST + 1)
    assert "vocab.json has more than 16 MiB" in problem_of(lambda: saved_tokenizer(info, "tokenizer"))


def test_patterns_that_would_be_tried_for_ever(tmp_path: Path):
    """PEFT's configuration in a header holds regular expressions."""
    path = tmp_path / "a.safetensors"
    weights = seeds.loras(tmp_path)["diffusers"]
    path.write_bytes(weights)
    base = skeleton(inspect_base("pocket"))
    alphas = {delta.name[-4:]: delta.alpha for delta in read_lora(path, base.components, "sd1")["unet"]}
    assert alphas == {"to_q": 2, "to_k": 4, "ut.0": 4}
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    for pattern in (r"(\w+\.?)+!", "(a|a)" * 40, ".*.*.*.*.*.*.*!"):
        said = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {pattern: 1}})}
        path.write_bytes(
            seeds.header_only(header | {"__metadata__": said}, weights[8 + int.from_bytes(weights[:8], "little") :])
        )
        assert "is not PEFT's configuration" in problem_of(lambda: read_lora(path, base.components, "sd1"))
        assert read_by_clients(LoraFile.open(path), base)


# ---------------------------------------------------------------------------------------------------------------------
# no pickle is ever executed


class Malicious:
    """Whoever unpickles it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_the_malicious_pickle_is_one(tmp_path: Path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def folder_of_bins(path: Path, content: bytes) -> str:
    """A diffusers folder that holds nothing but pickles."""
    make_sd1(path)
    for file in list(path.rglob("*.safetensors")):
        name = "pytorch_model.bin" if file.parent.name == "text_encoder" else "diffusion_pytorch_model.bin"
        file.with_name(name).write_bytes(content)
        file.unlink()
    return str(path)


def captioner_of(path: Path, content: bytes) -> Path:
    """All of it but weights."""
    BlipConfig().save_pretrained(path)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]"))})
    BlipProcessor(BlipImageProcessorPil(), tokenizer).save_pretrained(path)
    (path / "pytorch_model.bin").write_bytes(content)
    return path


def run_with_optimizer(path: Path, content: bytes) -> Path:
    path.mkdir()
    seeds.checkpoint(path)
    step = path / "c" / "step-000002"
    (step / "optimizer.pt").write_bytes(content)
    return step


PLACES: dict[str, Callable[[Path, bytes], object]] = {
    **{
        f"base{ending}": lambda file, _: inspect_base(str(file))
        for ending in (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
    },
    **{
        f"vae{ending}": lambda file, _: inspect_base("pocket", vae=str(file))
        for ending in (".ckpt", ".pt", ".safetensors")
    },
    **{f"lora{ending}": lambda file, _: inspect(file) for ending in (".ckpt", ".pt", ".pth", ".bin", ".safetensors")},
    "merged.safetensors": lambda file, _: read_lora(file, skeleton(inspect_base("pocket")).components, "sd1"),
    "merged.pt": lambda file, _: inspect_base("pocket", merge=[str(file)]),
    "folder": lambda file, content: load_base(inspect_base(folder_of_bins(file.with_name("bins"), content))),
    "captioner": lambda file, content: Blip(choose(str(captioner_of(file.with_name("blip"), content))), "cpu"),
    "optimizer.pt": lambda file, content: load_checkpoint(run_with_optimizer(file.with_name("run"), content)),
    "table.parquet": lambda file, _: as_folder(str(file), file.with_name("cache")),
    "archive.zip": lambda file, _: as_folder(str(file), file.with_name("cache")),
    "captions.toml": lambda file, _: read_config(file),
}


@pytest.mark.parametrize("form", ["plain", "zip", "legacy"])
@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_is_executed(place: str, form: str, tmp_path: Path):
    trace, file = tmp_path / "trace", tmp_path / place
    content = pickle.dumps(Malicious(trace), protocol=2)  # that of PyTorch
    if form != "plain":
        torch.save({"state_dict": Malicious(trace)}, file, _use_new_zipfile_serialization=form == "zip")
        content = file.read_bytes()
    file.write_bytes(content)
    with pytest.raises(LorasmithError) as caught:
        PLACES[place](file, content)
    assert not trace.exists()
    assert all(problem.what and problem.where and problem.fix for problem in caught.value.problems)


SOURCES = sorted(file for part in ("trainer", "ui", "datasets") for file in (ROOT / part).rglob("*.py"))
_NEVER = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput", "pickle.load"),
    *("pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load"),
    *("joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "pandas.read_pickle", "tempfile.mktemp"),
}
_WITH = {
    "shell": "no shell is ever asked",
    "trust_remote_code": "no code of a model is ever run",
    "allow_pickle": "no pickle is ever read",
}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_in_the_source_runs_what_it_reads(file: Path):
    for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name, keywords = ast.unparse(call.func), {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        where = f"{file.relative_to(ROOT)}:{call.lineno}: {name}"
        assert name not in _NEVER, where
        assert not [why for word, why in _WITH.items() if keywords.get(word, "False") != "False"], where
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", where


def test_the_search_of_the_source_finds_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "a.py"
    for line in (
        "eval(x)",
        "torch.load(x)",
        "subprocess.run(x, shell=True)",
        "np.load(x, allow_pickle=True)",
        "os.system(x)",
    ):
        file.write_text(line)
        with pytest.raises(AssertionError, match=r"a\.py:1"):
            test_nothing_in_the_source_runs_what_it_reads(file)


def test_arguments_are_no_commands(tmp_path: Path):
    """What starts a process of ours gives it a list, which no shell takes apart."""
    hostile = f"$(touch {tmp_path}/pwned) `touch {tmp_path}/pwned`; touch {tmp_path}/pwned && | \" ' \n%PATH%"
    log = tmp_path / "said.log"
    process = start_detached(["stop", hostile], log)
    wait_until(lambda: process.poll() is not None, "it has ended")
    assert process.returncode == 2
    assert "is not a run folder" in log.read_text()
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------------------------------------------------------------
# no path leaves its root


def test_links_in_a_run_folder_lead_to_nothing_that_is_deleted(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    run = RunFolder(tmp_path / "runs" / "r")
    run.checkpoints.mkdir(parents=True)
    run.checkpoint(1).symlink_to(outside)
    run.checkpoint(2).symlink_to(outside)
    run.checkpoint(3).mkdir()
    prune_checkpoints(run, 1)
    run.set_aside_checkpoints(0)
    assert (outside / "kept").read_text() == "kept"


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "link/outside.txt", "a/../../outside.txt"])
def test_a_journal_undoes_nothing_outside_of_its_folder(tmp_path: Path, name: str):
    photos = tmp_path / "photos"
    photos.mkdir()
    (tmp_path / "outside.txt").write_text("kept")
    (photos / "link").symlink_to(tmp_path)
    moves = [{"source": name, "target": ".removed/a"}]
    for deed in (
        {"what": "x", "changes": [], "moves": moves},
        {"what": "x", "changes": [{"file": name, "before": None, "after": None}], "moves": []},
    ):
        (photos / JOURNAL).write_text(json.dumps({"version": 1, "deeds": [deed]}))
        with pytest.raises(DataError, match="outside of the folder"):
            undo(photos)
    assert (tmp_path / "outside.txt").read_text() == "kept"


def test_a_checkpoint_of_no_words_is_refused(tmp_path: Path):
    step = run_with_optimizer(tmp_path / "run", b"")
    with pytest.raises(RunError, match="cannot be read"):
        load_checkpoint(step)
