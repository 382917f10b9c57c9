"""What a crash, a power cut, a clock that is set or a second process can do to files: each is healed or named."""

from __future__ import annotations

import ast
import errno
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from lorasmith.datasets import workers
from lorasmith.datasets.cache import Cache
from lorasmith.datasets.editing import save_caption
from lorasmith.datasets.folder import look, scan
from lorasmith.datasets.workers import map_files
from lorasmith.trainer import owner, run
from lorasmith.trainer.checkpoint import prune_checkpoints
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.errors import DataError, RunError, TakenOverError, TrainingError, UserError
from lorasmith.trainer.events import (
    Checkpointed,
    Event,
    EventLog,
    Phase,
    PlanMade,
    Step,
    Stopped,
    Warned,
    read_record,
)
from lorasmith.trainer.files import atomic_file, atomic_folder, quick_file, remove_leftovers, write_text
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.owner import Owner, ProcessId, read_process, write_process
from lorasmith.trainer.painting.easel import Drawn, Easel
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.queue import Queue
from lorasmith.trainer.story import Story
from lorasmith.trainer.waiting import Current, Entry, changed_waiting, read_waiting

ROOT = Path(__file__).parent.parent
POSIX = pytest.mark.skipif(os.name == "nt", reason="as on POSIX systems")


def config_in(folder: Path, name: str = "run"):
    return validate({"name": name, "runs": str(folder), "data": [{"path": str(folder / "photos")}]})


@pytest.fixture
def created(tmp_path: Path) -> RunFolder:
    return create_run(config_in(tmp_path / "runs"))


def step(number: int) -> Step:
    return Step(number, number * 4, 0.5, 1.0, {"unet": 1e-4}, 0.1)


def log(folder: RunFolder, *events: Event) -> None:
    writer = EventLog(folder.events)
    for event in events:
        writer.append(event)


@contextmanager
def child(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of our own that has said that it is ready; it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def tree(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# every file by write, flush, rename


class _Flushed:
    """What was flushed, in order, by its place; real calls go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, beyond: Callable[[Path], None] = lambda path: None) -> None:
        self.order: list[str] = []
        fsync, replace_, rename = os.fsync, Path.replace, Path.rename

        def flushed(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self.order.append("folder" if path.is_dir() else "file")
            beyond(path)
            fsync(descriptor)

        def moved(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
            def told(source: Path, target: Path) -> Path:
                self.order.append("rename")
                return move(source, target)

            return told

        monkeypatch.setattr(os, "fsync", flushed)
        monkeypatch.setattr(Path, "replace", moved(replace_))
        monkeypatch.setattr(Path, "rename", moved(rename))


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="open files are told in /proc")


@needs_proc
def test_a_name_is_on_the_disk_only_after_the_file_and_before_anything_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flushed = _Flushed(monkeypatch)
    write_text(tmp_path / "a.txt", "a")
    assert flushed.order == ["file", "rename", "folder"]

    flushed.order.clear()
    write_text(tmp_path / "new" / "below" / "a.txt", "a")
    assert flushed.order == ["folder", "folder", "file", "rename", "folder"]

    flushed.order.clear()
    with atomic_folder(tmp_path / "step") as temporary:
        (temporary / "a").touch()
        (temporary / "inner").mkdir()
        (temporary / "inner" / "b").touch()
    assert sorted(flushed.order[:4]) == ["file", "file", "folder", "folder"]
    assert flushed.order[4:] == ["rename", "folder"]

    flushed.order.clear()
    with quick_file(tmp_path / "cache" / "entry") as temporary:
        temporary.touch()
    assert flushed.order == ["rename"]


@needs_proc
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.ENOTSUP])
def test_a_file_system_that_does_not_flush_folders_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    _Flushed(monkeypatch, _refusing(number))
    write_text(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "a"


@needs_proc
def test_a_disk_that_fails_to_keep_a_name_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _Flushed(monkeypatch, _refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "a.txt", "a")


def _refusing(number: int) -> Callable[[Path], None]:
    def refuse(path: Path) -> None:
        if path.is_dir():
            raise OSError(number, os.strerror(number), str(path))

    return refuse


def test_a_folder_that_is_replaced_is_there_whole_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []
    rename = Path.rename

    def told(source: Path, target: Path) -> Path:
        seen.append(tree(tmp_path / "x"))
        return rename(source, target)

    with atomic_folder(tmp_path / "x") as temporary:
        (temporary / "old").touch()
    monkeypatch.setattr(Path, "rename", told)
    with atomic_folder(tmp_path / "x") as temporary:
        (temporary / "new").touch()
    assert seen == [["old"], []]  # set aside whole, and in the next moment the new one is there
    assert tree(tmp_path) == ["x", "x/new"]


_WHOLE = {"atomic_file", "atomic_folder", "quick_file", "until_verified"}
_WRITES = {
    *("write_text", "write_bytes", "touch", "save", "save_file", "save_model", "save_pretrained", "to_csv"),
    *("to_parquet", "copyfile", "copy", "copy2", "copytree", "move", "rename", "symlink_to", "hardlink_to"),
    *("mkstemp", "NamedTemporaryFile", "fdopen"),
}
_IN_A_TEMPORARY_FOLDER = "into a folder that atomic_folder made"
_IN_MEMORY = "no file, but bytes in memory"
_APPENDED = "only ever appended to, flushed, and a torn end is mended"
_OTHER_WRITES = {
    ("datasets/archives.py", "_extract"): _IN_A_TEMPORARY_FOLDER,
    ("datasets/repair.py", "_write_picture"): _IN_A_TEMPORARY_FOLDER,
    ("datasets/repair.py", "_write_mask"): _IN_A_TEMPORARY_FOLDER,
    ("datasets/repair.py", "_write_captions"): _IN_A_TEMPORARY_FOLDER,
    ("datasets/tables.py", "write_rows"): _IN_A_TEMPORARY_FOLDER,
    ("trainer/wholemodel.py", "_save_weights"): _IN_A_TEMPORARY_FOLDER,
    ("trainer/wholemodel.py", "_write_json"): _IN_A_TEMPORARY_FOLDER,
    ("trainer/rehearsal.py", "saved_and_loaded"): _IN_MEMORY,
    ("trainer/sharing/pictures.py", "data_uri"): _IN_MEMORY,
    ("trainer/sharing/pictures.py", "png"): _IN_MEMORY,
    ("datasets/views.py", "recolour"): _IN_MEMORY,
    ("datasets/machine.py", "append"): _APPENDED,
    ("trainer/events.py", "append"): _APPENDED,
    ("trainer/preferences/ratings.py", "_append"): _APPENDED,
    ("trainer/jobs.py", "start_detached"): "what a process says, as it says it",
    ("trainer/sweep.py", "_resume_here"): "what a process says, as it says it",
    ("ui/share/errand.py", "start"): "what a process says, as it says it",
    ("trainer/bench/case.py", "make_pictures"): "in a folder that is removed after it was measured",
    ("trainer/bench/peaks.py", "forget_peak"): "no file: a word to Linux",
    ("trainer/painting/easel.py", "cancel"): "an empty file, which is there or not",
    ("trainer/files.py", "quick_file"): "of entries that hold a checksum",
    ("trainer/files.py", "writable"): "tries whether a file can be made",
    ("trainer/files.py", "locked"): "an empty file, to be locked",
    ("trainer/files.py", "flush_to_disk"): "writes nothing; Windows flushes only what may be written",
}


def test_every_file_is_written_whole_or_for_a_reason():
    """By the names of the calls; what is written within a block of `files.py` has the temporary name."""
    found = {
        (file.relative_to(ROOT).as_posix(), function)
        for top in ("trainer", "datasets", "ui")
        for file in (ROOT / top).rglob("*.py")
        for function in _raw_writes(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert found - _OTHER_WRITES.keys() == set(), "write it by files.py, or say here why not"
    assert _OTHER_WRITES.keys() - found == set(), "is no more"


def _raw_writes(node: ast.AST, function: str = "") -> Iterator[str]:
    """The functions that write a file outside of the blocks in which it is whole or absent."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.With) and any(_called(item.context_expr) in _WHOLE for item in inner.items):
            continue
        if isinstance(inner, ast.Call) and _writes(inner):
            yield function
        yield from _raw_writes(inner, inner.name if isinstance(inner, ast.FunctionDef) else function)


def _called(expression: ast.expr) -> str:
    match expression:
        case ast.Call(ast.Attribute(attr=name) | ast.Name(id=name)):
            return name
    return ""


def _writes(call: ast.Call) -> bool:
    name, is_method = _called(call), isinstance(call.func, ast.Attribute)
    if name == "open":
        return any(_is_to_write(value) for value in [*call.args, *(key.value for key in call.keywords)])
    if name == "replace":  # of a path, and not of a text or a dataclass
        return is_method and len(call.args) == 1 and not call.keywords
    return name in _WRITES and (is_method or name in {"save_file", "save_model", "copyfile"})


def _is_to_write(value: ast.expr) -> bool:
    """Whether it is a mode that a file may be opened in, and one that changes the file."""
    mode = set(value.value) if isinstance(value, ast.Constant) and isinstance(value.value, str) else set()
    return mode <= set("rwaxbt+") and bool(mode & set("wax+"))


# ---------------------------------------------------------------------------------------------------------------------
# what a killed process leaves

WRITING = """
import sys
from pathlib import Path
from lorasmith.trainer.files import atomic_file, atomic_folder, until_verified

place = Path(sys.argv[1])
with atomic_file(place / "exports" / "a.json") as file, atomic_folder(place / "checkpoints" / "step-000003") as folder:
    with until_verified(place / "exports" / "style.safetensors") as unverified:
        for path in (file, folder / "adapter.safetensors", unverified):
            path.write_bytes(b"half")
        print("ready", flush=True)
        sys.stdin.read()
"""


def test_what_a_killed_process_had_half_written_goes_and_nothing_else(created: RunFolder):
    ours = ["checkpoints/step-000002", "checkpoints/step-000002.set-aside", "exports/style.safetensors"]
    theirs = ["exports/.x.tmp", "exports/notes.1-2.tmp", "exports/my.unverified.safetensors", ".a.12345-zzzzzzzz.tmp"]
    for name in (*ours, *theirs):
        write_text(created.path / name / "kept" if "step" in name else created.path / name, "kept")
    before = tree(created.path)
    with child(WRITING, str(created.path)) as process:
        half = set(tree(created.path)) - set(before)
        assert sorted(re.sub(r"\d+-[0-9a-f]{8}", "MARK", name) for name in half) == [
            "checkpoints/.step-000003.MARK.tmp",
            "checkpoints/.step-000003.MARK.tmp/adapter.safetensors",
            "exports/.a.json.MARK.tmp",
            "exports/style.MARK.unverified.safetensors",
        ]
        created.take_ownership()  # what the living write stays
        created.give_up_ownership()
        assert half <= set(tree(created.path))
        killed(process)
        assert half <= set(tree(created.path))
        assert created.saved_steps() == [2]
    created.take_ownership()
    created.give_up_ownership()
    assert [name for name in tree(created.path) if not name.endswith(".lock")] == before


def test_what_a_killed_process_was_removing_goes_and_does_not_stand_in_the_way(created: RunFolder):
    """As earlier versions called it, and as this one does."""
    for name in ("step-000001", "step-000002", ".step-000001.gone", f".step-000001.{_DEAD}-0123abcd.tmp"):
        write_text(created.checkpoints / name / "state.json", "{}")
    prune_checkpoints(created, 1)
    assert created.saved_steps() == [2]
    created.take_ownership()
    assert tree(created.checkpoints) == ["step-000002", "step-000002/state.json"]


_DEAD = 4_194_305
"""No process of Linux has a higher number than one less."""


def test_what_this_process_writes_is_no_leftover_but_what_one_of_its_number_left_is(tmp_path: Path):
    """In a container the next process often has the number of the one before."""
    left = tmp_path / f".b.txt.{os.getpid()}-0123abcd.tmp"
    left.touch()
    with atomic_file(tmp_path / "a.txt") as temporary:
        temporary.touch()
        remove_leftovers(tmp_path)
        assert temporary.exists()
    assert tree(tmp_path) == ["a.txt"]


def test_a_run_that_was_half_created_goes_with_the_next(tmp_path: Path):
    code = """
import sys
from pathlib import Path
from lorasmith.trainer.files import atomic_folder
with atomic_folder(Path(sys.argv[1]) / "first") as folder:
    (folder / "config.toml").touch()
    print("ready", flush=True)
    sys.stdin.read()
"""
    with child(code, str(tmp_path)) as process:
        killed(process)
    assert len(tree(tmp_path)) == 2
    create_run(config_in(tmp_path, "second"))
    assert tree(tmp_path) == ["second", "second/config.toml"]


def test_a_cache_clears_up_when_it_is_filled(tmp_path: Path):
    code = """
import sys
from pathlib import Path
from lorasmith.trainer.files import quick_file
with quick_file(Path(sys.argv[1])) as file:
    file.write_bytes(b"half")
    print("ready", flush=True)
    sys.stdin.read()
"""
    cache = Cache(tmp_path)
    with child(code, str(cache.path("x"))) as process:
        cache.clear_up()
        assert len(tree(tmp_path)) == 2
        killed(process)
    cache.clear_up()
    assert [name for name in tree(tmp_path) if "." in name] == []


@pytest.mark.exhaustive
def test_a_checkpoint_is_whole_or_absent_whenever_its_writer_is_killed(tmp_path: Path):
    code = """
import sys
from pathlib import Path
from lorasmith.trainer.files import atomic_folder
print("ready", flush=True)
for number in range(10**6):
    with atomic_folder(Path(sys.argv[1]) / "x") as folder:
        for name in ("a", "b"):
            (folder / name).write_text(str(number) * 1000)
"""
    chance = random.Random(8)
    for _ in range(40):
        with child(code, str(tmp_path)) as process:
            time.sleep(chance.uniform(0, 0.05))
            killed(process)
        if (tmp_path / "x").is_dir():
            one, other = ((tmp_path / "x" / name).read_text() for name in ("a", "b"))
            assert one == other != ""
        remove_leftovers(tmp_path)
        assert {name.partition("/")[0] for name in tree(tmp_path)} <= {"x"}


# ---------------------------------------------------------------------------------------------------------------------
# cache entries


@pytest.fixture
def entry(tmp_path: Path) -> tuple[Cache, Path, dict[str, Tensor]]:
    cache = Cache(tmp_path / "cache")
    tensors = {"mean": torch.randn(4, 3, 2), "std": torch.rand(4, 3, 2)}
    path = cache.path("entry")
    cache.write(path, tensors)
    return cache, path, tensors


def same(one: dict[str, Tensor] | None, other: dict[str, Tensor]) -> bool:
    return one is not None and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


@POSIX
def test_an_entry_with_any_bit_flipped_is_absent(entry: tuple[Cache, Path, dict[str, Tensor]]):
    cache, path, tensors = entry
    content = path.read_bytes()
    assert same(cache.read(path), tensors)
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(content):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), place)
                assert cache.read(path) is None, f"bit {bit} of byte {place} of {len(content)}"
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert same(cache.read(path), tensors)


def test_an_entry_that_is_cut_zeroed_or_of_an_earlier_version_is_absent(entry: tuple[Cache, Path, dict[str, Tensor]]):
    cache, path, tensors = entry
    content = path.read_bytes()
    for damaged in (
        *(content[:length] for length in range(0, len(content), 3)),
        *(content[:length] + bytes(len(content) - length) for length in range(0, len(content), 7)),
        content + b"\0",
        b"x" * len(content),
        (2**63).to_bytes(8, "little") + content[8:],
        len(b"[]      ").to_bytes(8, "little") + b"[]      ",
        without_checksum(tensors),
    ):
        path.write_bytes(damaged)
        assert cache.read(path) is None


def without_checksum(tensors: dict[str, Tensor]) -> bytes:
    """An entry as earlier versions wrote it, without a checksum."""
    from safetensors.torch import save

    return save(tensors)


@pytest.mark.parametrize("kind", ["folder", "folder with files", "link to nowhere", "unreadable"])
def test_what_stands_in_the_place_of_an_entry_is_replaced(entry: tuple[Cache, Path, dict[str, Tensor]], kind: str):
    cache, path, tensors = entry
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "folder with files":
            path.mkdir()
            (path / "x").touch()
        case "link to nowhere":
            path.symlink_to("nowhere")
        case "unreadable":
            path.touch(0)
    assert cache.read(path) is None
    cache.write(path, tensors)
    assert same(cache.read(path), tensors)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "cache").touch()
    cache = Cache(tmp_path / "cache")
    with pytest.raises(DataError) as caught:
        cache.write(cache.path("x"), {"a": torch.zeros(1)})
    [problem] = caught.value.problems
    assert problem.where == str(tmp_path / "cache")
    assert "runtime.cache" in problem.fix


@pytest.mark.parametrize("what", ["latents", "text"])
def test_an_entry_that_is_damaged_while_training_is_made_anew_and_changes_nothing(short_run, what: str):
    settings = {"adapter": {"text_encoder": False}, "optimizer": {"text_encoder_lr": 0.0}}
    whole = run.train(make_plan(short_run(name="whole", **settings)), lambda event: None)

    warned: list[str] = []

    def damage(event: Event) -> None:
        if isinstance(event, Step) and event.step == 1:
            for file in Path(short_run().runtime.cache, what).rglob("*.safetensors"):
                content = bytearray(file.read_bytes())
                content[-1] ^= 1
                file.write_bytes(content)
        warned.extend([event.message] if isinstance(event, Warned) else [])

    healed = run.train(make_plan(short_run(name="healed", **settings)), damage)
    assert any("damaged; made anew" in message for message in warned)
    assert healed.run.status().state == "done"
    for one, other in zip(story_of(whole.run).steps, story_of(healed.run).steps, strict=True):
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)


def story_of(folder: RunFolder) -> Story:
    story = Story(folder.events)
    story.refresh()
    return story


# ---------------------------------------------------------------------------------------------------------------------
# the log

TORN = {
    "torn": b'{"time": 1.0, "type": "do',
    "zeros": bytes(4096),
    "zeros after a line's beginning": b'{"time": 1.0, "type"' + bytes(512),
    "half a letter": '{"time": 1.0, "type": "warning", "message": "\u00fc'.encode()[:-1],
    "a foreign byte": b"\xff",
}


@pytest.mark.parametrize("tail", TORN.values(), ids=TORN.keys())
def test_a_torn_end_of_the_log_hides_nothing_and_swallows_nothing(created: RunFolder, tail: bytes):
    log(created, PlanMade(10, 40), step(3), Stopped(3))
    story, size = story_of(created), created.events.stat().st_size
    with created.events.open("ab") as file:
        file.write(tail)
    for each in (story, Story(created.events)):
        assert created.status(each).sentence == "Stopped and saved at step 0 of 10."
    log(created, PlanMade(10, 40), step(4))
    for each in (story, Story(created.events)):
        assert (created.status(each).state, each.step, each.size) == ("interrupted", 4, created.events.stat().st_size)
        assert not each.ended_since(size)
    assert created.events.read_bytes()[size:].startswith(tail + b"\n")


def test_what_a_power_cut_took_of_the_log_is_not_missed(created: RunFolder):
    """The last steps are not waited for; the file may come back shorter than it was read."""
    log(created, PlanMade(10, 40), *map(step, range(1, 6)))
    story = story_of(created)
    os.truncate(created.events, created.events.stat().st_size - 200)
    assert (created.status(story).step, created.status().step) == (3, 3)
    log(created, PlanMade(10, 40), step(3), step(4))
    assert [one.step for one in story_of(created).steps] == [1, 2, 3, 4]
    assert created.status(story).step == 4


def test_the_end_of_a_log_is_looked_at_without_reading_the_rest(created: RunFolder):
    """The file is larger than the memory of most computers, and takes no room: it is all hole."""
    created.events.touch()
    os.truncate(created.events, 2**36)
    log(created, Warned("first"), Warned("second"))
    with created.events.open("rb") as file:
        file.seek(2**36)
        end = file.read().split(b"\n")
    assert [read_record(line.decode()) is not None for line in end] == [False, True, True, False]


# ---------------------------------------------------------------------------------------------------------------------
# who owns what

needs_ticks = pytest.mark.skipif(not owner._began(os.getpid())[0], reason="only Linux counts ticks since its start")


def me() -> ProcessId:
    return ProcessId.of(os.getpid())


def before_the_restart() -> ProcessId:
    """A process of the same number, and, as after a restart of the same things, begun after as many ticks."""
    return replace(me(), boot="another") if me().boot else replace(me(), created=me().created - 86_400)


def as_earlier_versions_wrote(file: Path, process: ProcessId) -> None:
    file.write_text(json.dumps({"pid": process.pid, "created": process.created}), encoding="utf-8")


@needs_ticks
@pytest.mark.parametrize("shift", [-86_400.0, -30.0, 30.0, 86_400.0])
def test_a_process_is_known_again_after_the_clock_was_set(
    created: RunFolder, monkeypatch: pytest.MonkeyPatch, shift: float
):
    """What psutil tells of the moment moves with the clock: it adds to when the computer was started, by the clock."""
    created.take_ownership()
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + shift)
    assert created.owner_alive()
    assert created.owner.hold()
    with pytest.raises(RunError, match="another process is training this run"):
        created.take_ownership()


def test_a_file_of_an_earlier_version_is_read(created: RunFolder):
    as_earlier_versions_wrote(created.owner_file, me())
    assert created.owner_alive()
    as_earlier_versions_wrote(created.owner_file, replace(me(), created=me().created - 10))
    assert not created.owner_alive()


def test_after_a_restart_of_the_computer_nobody_owns_anything(created: RunFolder):
    log(created, PlanMade(10, 40), step(3))
    queue, easel = Queue(created.path.parent), Easel(created.path.parent)
    ticket = easel.ticket(f"{7:020d}-0123abcd")
    write_text(ticket.order_file, "{}")
    ticket.tell(Drawn("drawing", 1, 3))
    for file in (created.owner_file, queue.worker.file, easel.folder / "painter.json", easel.folder / "started.json"):
        write_process(file, before_the_restart())
    with changed_waiting(queue.runs) as waiting:
        waiting.current = Current(Entry(created.name), 0, before_the_restart())

    assert created.status().sentence == "Interrupted at step 3 of 10, nothing was saved."
    assert queue.running() is None
    assert not easel.is_attended()
    assert (ticket.state().state, ticket.state().done) == ("failed", 1)
    created.take_ownership()
    assert queue.worker.take()
    easel.take_up()
    assert ticket.told() == ticket.state() != Drawn("drawing", 1, 3)
    for each in (created.owner, queue.worker, Owner(easel.folder / "painter.json")):
        assert each.is_mine()


def test_of_many_that_take_it_at_once_one_has_it(tmp_path: Path):
    for _ in range(20):
        file, taken = tmp_path / "trainer.json", []
        write_process(file, before_the_restart())
        begin = threading.Barrier(8)

        def take(file: Path = file, taken: list[bool] = taken, begin: threading.Barrier = begin) -> None:
            begin.wait()
            taken.append(Owner(file).take())

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == [False] * 7 + [True]


def test_a_run_that_is_trained_is_refused_to_whoever_else_would(short_run):
    plan = make_plan(short_run())
    folder = create_run(plan.config)
    with child("import sys; print('ready', flush=True); sys.stdin.read()") as process:
        write_process(folder.owner_file, ProcessId.of(process.pid))
        log(folder, Phase("loading the base"))
        before = {name: (folder.path / name).read_bytes() for name in ("config.toml", "events.jsonl", "trainer.json")}
        with pytest.raises(RunError, match="another process is training this run"):
            run.resume(folder, [], lambda event: None)
        with pytest.raises(RunError, match="another process is training this run"), run.refusals_told(folder):
            run.resume(folder, [], lambda event: None)
        with pytest.raises(RunError, match="the name 'short' is in use"):
            run.train(plan, lambda event: None)
        with pytest.raises(RunError, match="is being trained"):
            Queue(folder.path.parent).add(folder.name)
        assert {name: (folder.path / name).read_bytes() for name in before} == before


def test_a_run_that_another_computer_took_over_is_left_to_it(short_run):
    """Over a network drive neither sees whether the other lives; who comes later has it, and the first one ends."""
    theirs = replace(before_the_restart(), pid=4)

    def take_over(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            write_process(folder.owner_file, theirs)
            write_process(folder.request("save"), theirs)

    plan = make_plan(short_run(save={"every": 3}))
    folder = RunFolder(Path(plan.config.runs) / plan.config.name)
    with pytest.raises(TakenOverError, match="taken this run over"):
        run.train(plan, take_over)
    assert read_process(folder.owner_file) == theirs
    assert folder.request("save").exists()
    assert folder.saved_steps() == []
    assert (story_of(folder).step, story_of(folder).last_word) == (2, None)
    assert run.resume(folder, [], lambda event: None).run.status().state == "done"


def test_a_run_whose_owner_file_was_removed_goes_on_and_writes_it_again(short_run):
    seen: list[bool] = []

    def remove(event: Event) -> None:
        if isinstance(event, Step):
            seen.append(folder.owner_alive())
            folder.owner_file.unlink()

    plan = make_plan(short_run())
    folder = RunFolder(Path(plan.config.runs) / plan.config.name)
    assert run.train(plan, remove).run.status().state == "done"
    assert seen == [True] * len(seen)


# ---------------------------------------------------------------------------------------------------------------------
# a clock that is set


class Clock:
    """The time of day, as it is read; it can be set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "time_ns", lambda: int(self.now * 10**9))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_log_whose_times_fall_tells_the_same(created: RunFolder, clock: Clock):
    created.take_ownership()
    events = [PlanMade(100, 400, every={"save": 10}), *map(step, range(1, 10))]
    events += [Phase("saving"), Checkpointed(10, "c"), *map(step, range(10, 41))]
    for event in events:
        clock.now -= 1000
        log(created, event)
    status = created.status()
    assert (status.state, status.step, status.rate) == ("training", 40, 10)
    assert status.left == pytest.approx(60 * 0.1, abs=0.001)  # a log tells milliseconds
    clock.now -= 86_400
    assert created.status().left == pytest.approx(60 * 0.1, abs=0.001)
    clock.now += 10**6
    assert created.status().left == 0


def test_what_a_run_said_last_is_of_this_start_whatever_the_clock_says(created: RunFolder, clock: Clock):
    """The queue has started it; the clock was set back by an hour before it said something."""
    log(created, PlanMade(10, 40), step(3), Stopped(3))
    size = EventLog(created.events).size()
    with changed_waiting(created.path.parent) as waiting:
        waiting.current = Current(Entry(created.name), size, me())
    assert created.status().state == "preparing"
    clock.now -= 3600
    log(created, PlanMade(10, 40), Stopped(3))
    assert created.status().state == "stopped"
    queue_tells(created, size)
    assert created.status().state == "stopped"


def test_a_process_that_said_nothing_is_told_of_whatever_the_clock_says(created: RunFolder, clock: Clock):
    log(created, PlanMade(10, 40), step(3), Stopped(3))
    clock.now -= 3600
    queue_tells(created, EventLog(created.events).size())
    assert created.status().sentence.startswith("Failed at step 3: its process ended before it began")


def queue_tells(folder: RunFolder, size: int) -> None:
    """What the queue does when a process has ended that it started."""
    from lorasmith.trainer.queue import _tell_if_it_could_not

    _tell_if_it_could_not(folder, size)


def test_a_waiting_list_of_an_earlier_version_is_read(created: RunFolder):
    process = {"pid": os.getpid(), "created": psutil.Process().create_time()}
    entry = asdict(Entry(created.name))
    current = {"entry": entry, "since": time.time(), "process": process}
    text = json.dumps({"waiting": [asdict(Entry("next"))], "current": current})
    (created.path.parent / ".queue.json").write_text(text, encoding="utf-8")
    waiting = read_waiting(created.path.parent)
    assert waiting.has("next")
    assert waiting.current == Current(Entry(created.name), 0, ProcessId(**process))
    assert created.status().state == "preparing"


def test_orders_rise_though_the_clock_falls_and_stay_though_it_leaps(tmp_path: Path, clock: Clock):
    from lorasmith.trainer.painting.orders import PictureOrder

    easel = Easel(tmp_path)
    easel.folder.mkdir()
    assert Owner(easel.folder / "painter.json").take()  # so that no painter is started
    placed = []
    for leap in (0, -3600, 10**6, -(10**6)):
        clock.now += leap
        placed.append(easel.place(PictureOrder(base="pocket", prompts=("a",), seeds=(1,))))
    assert [ticket.id for ticket in reversed(easel.tickets())] == [ticket.id for ticket in placed]
    assert [ticket.state().state for ticket in placed] == ["waiting"] * 4


# ---------------------------------------------------------------------------------------------------------------------
# workers that die

DYING = """
import os

def dies_once(path):
    mark = path.with_suffix(".died")
    if path.stem == "30" and not mark.exists():
        mark.touch()
        os._exit(9)
    return path.stem

def dies(path):
    return os._exit(9) if path.stem == "30" else path.stem
"""


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that workers can import, with what ends whoever calls it."""
    import importlib

    (tmp_path / "dying.py").write_text(DYING, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(workers, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return importlib.import_module("dying")


def test_what_a_worker_that_died_has_left_is_done_by_another(dying: Any, tmp_path: Path):
    paths = [tmp_path / f"{number}.txt" for number in range(40)]
    seen: list[tuple[int, int]] = []
    assert list(map_files(dying.dies_once, paths, lambda *at: seen.append(at))) == [path.stem for path in paths]
    assert seen == [(number, 40) for number in range(41)]


def test_a_file_of_which_every_reader_dies_is_named(dying: Any, tmp_path: Path):
    paths = [tmp_path / f"{number}.txt" for number in range(40)]
    done: list[str] = []
    with pytest.raises(DataError, match="the process that read it died") as caught:
        done.extend(map_files(dying.dies, paths))
    assert caught.value.problems[0].where == str(paths[30])


# ---------------------------------------------------------------------------------------------------------------------
# disks that are unplugged, or take nothing


def test_a_folder_that_is_unplugged_while_it_is_scanned_is_named_once(pictures: Path):
    def unplug(done: int, total: int) -> None:
        if done == 2:
            pictures.rename(pictures.with_name("elsewhere"))

    with pytest.raises(DataError) as caught:
        look(pictures, progress=unplug)
    [problem] = caught.value.problems
    assert problem.where == str(pictures)
    assert "unplugged" in problem.what


def test_a_folder_that_is_unplugged_while_it_is_encoded_is_named_and_nothing_is_left(short_run, pictures: Path):
    def unplug(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "encoding images" and pictures.exists():
            pictures.rename(pictures.with_name("elsewhere"))

    with pytest.raises(DataError, match="can be read no more") as caught:
        run.train(make_plan(short_run()), unplug)
    [problem] = caught.value.problems
    assert Path(problem.where).parent == pictures
    assert "connect its disk again" in problem.fix
    assert not (Path(short_run().runs) / "short").exists()

    pictures.with_name("elsewhere").rename(pictures)
    assert run.train(make_plan(short_run()), lambda event: None).run.status().state == "done"


def test_a_folder_that_is_unplugged_while_training_is_not_missed(short_run, pictures: Path):
    def unplug(event: Event) -> None:
        if isinstance(event, Step) and pictures.exists():
            pictures.rename(pictures.with_name("elsewhere"))

    sample = {"every": 2, "steps": 1, "prompts": ["emoji of owl"]}
    finished = run.train(make_plan(short_run(save={"every": 2}, sample=sample)), unplug)
    assert finished.run.status().state == "done"
    with pytest.raises(UserError, match="there is no such folder"):
        run.resume(finished.run, ["budget.images=32"], lambda event: None)
    assert finished.run.status().state == "done"


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder whose permissions bind this process, which is not the case for root; it is nobody meanwhile."""
    import shutil
    import tempfile

    place = Path(tempfile.mkdtemp())
    if os.name == "nt":
        pytest.skip("permissions are of another kind")
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(place, 65534, 65534)
        os.seteuid(65534)
    try:
        yield place
    finally:
        if is_root:
            os.seteuid(0)
        for folder in (place, *place.rglob("*")):
            if folder.is_dir():
                folder.chmod(0o700)
        shutil.rmtree(place)


def read_only(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_read_only_dataset_is_read_and_says_why_it_is_not_changed(nobody: Path):
    photos = nobody / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 64)).save(photos / "a.png")
    (photos / "a.txt").write_text("a thing", encoding="utf-8")
    read_only(photos)
    assert [item.caption for item in scan(photos)] == ["a thing"]
    with pytest.raises(DataError, match="cannot be written") as caught:
        save_caption(photos, "a.png", "a thing", "another")
    assert caught.value.problems[0].fix
    assert tree(photos) == ["a.png", "a.txt"]


def test_a_run_on_a_disk_that_takes_nothing_any_more_says_so_and_goes_on_later(short_run, nobody: Path):
    def protect(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            read_only(nobody / "runs" / "short")

    photos = nobody / "photos"
    photos.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(photos / f"{number}.png")
    places = {
        "runs": str(nobody / "runs"),
        "data": [{"path": str(photos)}],
        "runtime": {"cache": str(nobody / "cache")},
    }
    config = short_run(base={"model": "pocket"}, save={"every": 1}, **places)  # others are in a folder of root's
    with pytest.raises(TrainingError, match="Permission denied") as caught:
        run.train(make_plan(config), protect)
    assert "lorasmith resume" in caught.value.problems[0].fix
    folder = RunFolder(nobody / "runs" / "short")
    assert folder.saved_steps() == [1]

    for path in (folder.path, *folder.path.rglob("*")):
        path.chmod(0o700)
    write_process(folder.owner_file, before_the_restart())  # for the process that this was lives on here
    assert folder.status().state == "interrupted"
    assert run.resume(folder, [], lambda event: None).run.status().state == "done"
