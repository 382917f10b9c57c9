"""Archives, tables and datasets of the Hub become folders of images; what is hostile or damaged becomes nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import types
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lorasmith.datasets import archives, tables
from lorasmith.datasets.folder import scan
from lorasmith.datasets.unpack import anchored, as_folder, display_name, pinned
from lorasmith.trainer.errors import DataError, Problem

from .hub import COMMIT, hub_of

ROOT = Path(__file__).resolve().parent.parent


def image_file(number: int = 0, kind: str = "PNG") -> bytes:
    """A different picture for each number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, 90, 200)).save(buffer, kind)
    return buffer.getvalue()


def zipped(path: Path, entries: Mapping[str, bytes] | Sequence[tuple[Any, bytes]], **options: Any) -> Path:
    """A zip file of names, or ZipInfos, and bytes."""
    pairs = entries.items() if isinstance(entries, Mapping) else entries
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in pairs:
            archive.writestr(name, content)
    return path


def entry(name: str, mode: int = 0) -> zipfile.ZipInfo:
    """A ZipInfo with exactly this name, which the constructor might mend."""
    info = zipfile.ZipInfo("x")
    info.filename, info.external_attr = name, mode << 16
    return info


def problems_of(path: Path | str, cache: Path) -> list[Problem]:
    with pytest.raises(DataError) as caught:
        as_folder(str(path), cache)
    assert leftovers(cache) == []
    return caught.value.problems


def leftovers(cache: Path) -> list[str]:
    """What lies in the cache apart from locks, and the commits of names on the Hub."""
    kept = (cache / "unpacked").glob("*") if (cache / "unpacked").is_dir() else []
    return [path.name for path in kept if path.suffix != ".lock" and path.name not in ("hf", "commits")]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but hidden ones."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def captions(folder: Path) -> dict[str, Any]:
    """What the metadata holds: captions by file name."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row["text"] for row in map(json.loads, lines)}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# ---------------------------------------------------------------------------------------------------------------------
# paths


def test_a_folder_of_images_stays_where_it_is(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(image_file())
    monkeypatch.chdir(tmp_path)
    assert as_folder("photos", cache) == tmp_path / "photos"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("missing.zip", None, "there is no such folder or file"),
        ("a.rar", b"Rar!", "is a .rar archive, which is not read here"),
        ("a.png", image_file(), "is a file, and of no kind that is unpacked here"),
    ],
)
def test_other_paths_are_refused(tmp_path: Path, cache: Path, name: str, content: bytes | None, what: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = str(tmp_path / name)
    assert [(p.where, p.what) for p in problems_of(path, cache)] == [(path, what)]


def test_a_name_of_the_hub_without_its_prefix_is_recognised(cache: Path):
    assert "hf:owner/name" in problems_of("owner/name", cache)[0].fix


@pytest.mark.parametrize(
    ("query", "whats"),
    [
        ("?image=a&split=b", ["has image=, which has no effect here", "has split=, which has no effect here"]),
        ("?image", ["has 'image' after its ?"]),
        ("?image=&text=", ["has an empty image="]),
        ("?text=a&text=b", ["has text= more than once"]),
    ],
)
def test_a_question_without_effect_is_an_error(tmp_path: Path, cache: Path, query: str, whats: list[str]):
    path = zipped(tmp_path / "a.zip", {"a.png": image_file()})
    assert [p.what for p in problems_of(f"{path}{query}", cache)] == whats


def test_a_folder_of_images_takes_no_questions(tmp_path: Path, cache: Path):
    (tmp_path / "a.png").write_bytes(image_file())
    assert [p.what for p in problems_of(f"{tmp_path}?text=a", cache)] == ["has text=, which has no effect here"]


def test_a_question_mark_in_a_files_name_is_no_question(tmp_path: Path, cache: Path):
    try:
        path = zipped(tmp_path / "why?.zip", {"a.png": image_file()})
    except OSError:
        pytest.skip("this disk holds no such names")
    assert list(contents(as_folder(str(path), cache))) == ["a.png"]


def test_what_a_person_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    assert display_name("/somewhere/photos.zip") == "photos.zip"
    assert display_name("/somewhere/cats.parquet?image=img") == "cats.parquet"
    assert display_name(".") == "photos"
    assert display_name("hf:owner/name?split=train") == "hf:owner/name?split=train"
    assert display_name(f"hf:owner/name?split=a%20b&revision={COMMIT}") == "hf:owner/name?split=a%20b"
    assert display_name(f"hf:owner/name?revision={COMMIT}") == "hf:owner/name"
    assert display_name(f"hf:{tmp_path / 'photos'}?split=train") == "hf:photos"


def test_a_path_is_anchored_to_a_folder(tmp_path: Path):
    (tmp_path / "local").mkdir()
    tmp_path = tmp_path.resolve()
    assert anchored("a/photos.zip", tmp_path) == str(tmp_path / "a" / "photos.zip")
    assert anchored("../t.parquet?image=a b", tmp_path) == str(tmp_path.parent / "t.parquet?image=a b")
    assert anchored("hf:owner/name?split=train", tmp_path) == "hf:owner/name?split=train"
    assert anchored("hf:local?split=train", tmp_path) == f"hf:{tmp_path / 'local'}?split=train"
    assert anchored(str(tmp_path / "x"), tmp_path.parent) == str(tmp_path / "x")


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def test_the_same_content_is_the_same_folder_wherever_it_lies(tmp_path: Path, cache: Path):
    first = as_folder(str(zipped(tmp_path / "a.zip", {"a.png": image_file()})), cache)
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(tmp_path / "a.zip", tmp_path / "elsewhere" / "b.ZIP")
    assert first.parent == cache / "unpacked"
    assert first.is_absolute()
    assert len(first.name) == 32
    before = (first / "a.png").stat().st_mtime_ns
    assert as_folder(str(copy), cache) == first
    assert (first / "a.png").stat().st_mtime_ns == before


def test_an_edited_archive_is_another_folder(tmp_path: Path, cache: Path):
    first = as_folder(str(zipped(tmp_path / "a.zip", {"a.png": image_file(1)})), cache)
    second = as_folder(str(zipped(tmp_path / "a.zip", {"a.png": image_file(2)})), cache)
    assert first != second
    assert contents(second) == {"a.png": image_file(2)}


@pytest.mark.parametrize("harm", ["a file is gone", "a file is cut", "the seal is gone", "the seal is torn"])
def test_a_folder_that_was_harmed_in_the_cache_is_unpacked_anew(tmp_path: Path, cache: Path, harm: str):
    path = zipped(tmp_path / "a.zip", {"a.png": image_file(1), "b/c.png": image_file(2)})
    folder = as_folder(str(path), cache)
    if harm == "a file is gone":
        (folder / "b" / "c.png").unlink()
    elif harm == "a file is cut":
        (folder / "a.png").write_bytes(b"")
    elif harm == "the seal is gone":
        (folder / ".unpacked.json").unlink()
    else:
        (folder / ".unpacked.json").write_text("[", encoding="utf-8")
    assert as_folder(str(path), cache) == folder
    assert contents(folder) == {"a.png": image_file(1), "b/c.png": image_file(2)}


def test_two_at_once_unpack_it_once(tmp_path: Path, cache: Path):
    path = zipped(tmp_path / "a.zip", {f"{number}.png": image_file(number) for number in range(20)})
    folders: list[Path] = []
    reports: list[int] = []

    def unpack() -> None:
        folders.append(as_folder(str(path), cache, lambda done, total: reports.append(done)))

    threads = [threading.Thread(target=unpack) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert reports == list(range(21))


def test_a_file_that_changes_while_it_is_unpacked_leaves_nothing(tmp_path: Path, cache: Path):
    path = zipped(tmp_path / "a.zip", {"a.png": image_file()})

    def change(done: int, total: int) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    with pytest.raises(DataError, match="has changed while it was unpacked"):
        as_folder(str(path), cache, change)
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", {"a.png": image_file()})
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot be unpacked .*cache"):
        as_folder(str(path), tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------------------
# archives


def test_an_archive_is_read_like_the_folder_that_was_packed(tmp_path: Path, cache: Path):
    entries = {
        "top/a.png": image_file(1),
        "top/a.txt": b"a cat",
        "top/5_dog/b.jpg": image_file(2, "JPEG"),
        "top/meta/c.webp": image_file(3, "WEBP"),
        "top/meta/metadata.jsonl": b'{"file_name": "c.webp", "text": "a bird"}\n',
    }
    folder = as_folder(str(zipped(tmp_path / "a.zip", entries)), cache)
    assert contents(folder) == entries
    items = scan(folder)
    found = {item.path.relative_to(folder).as_posix(): (item.caption, item.repeats) for item in items}
    assert found == {
        "top/a.png": ("a cat", 1),
        "top/5_dog/b.jpg": ("dog", 5),
        "top/meta/c.webp": ("a bird", 1),
    }


@pytest.mark.parametrize(
    "name", ["__MACOSX/._a.png", "__MACOSX/x/a.png", ".hidden.png", "x/.git/a.png", "@eaDir/a.png", "x/Thumbs.db"]
)
def test_hidden_files_and_what_systems_leave_behind_stay_packed(tmp_path: Path, cache: Path, name: str):
    path = zipped(tmp_path / "a.zip", {"a.png": image_file(), name: b"whatever"})
    assert list(contents(as_folder(str(path), cache))) == ["a.png"]


def test_folders_of_an_archive_are_no_files(tmp_path: Path, cache: Path):
    path = zipped(tmp_path / "a.zip", [("x/", b""), ("x/y/", b""), ("x/a.png", image_file())])
    assert list(contents(as_folder(str(path), cache))) == ["x/a.png"]


def test_names_in_utf_8_and_in_the_old_code_page(tmp_path: Path, cache: Path):
    path = zipped(tmp_path / "a.zip", {"猫 ü.png": image_file(1), "gro_e.png": image_file(2)})
    path.write_bytes(path.read_bytes().replace(b"gro_e.png", "große.png".encode("cp437")))
    assert sorted(contents(as_folder(str(path), cache))) == ["große.png", "猫 ü.png"]


def test_backslashes_are_taken_for_folders_on_every_system(tmp_path: Path, cache: Path):
    path = zipped(tmp_path / "a.zip", [(entry("x\\y\\"), b""), (entry("x\\y\\a.png"), image_file())])
    assert list(contents(as_folder(str(path), cache))) == ["x/y/a.png"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("../a.png", "leads out of the folder"),
        ("x/../../a.png", "leads out of the folder"),
        ("x\\..\\..\\a.png", "leads out of the folder"),
        (".hidden/../../a.png", "leads out of the folder"),
        ("__MACOSX/../../a.png", "leads out of the folder"),
        ("..", "leads out of the folder"),
        ("/etc/a.png", "has an absolute path"),
        ("//server/share/a.png", "has an absolute path"),
        ("\\\\server\\share\\a.png", "has an absolute path"),
        ("C:\\a.png", "has an absolute path"),
        ("c:a.png", "has an absolute path"),
        ("con.txt", "means a device on Windows"),
        ("x/NUL/a.png", "means a device on Windows"),
        ("COM1 .png", "means a device on Windows"),
        ("lpt\u00b2.txt", "means a device on Windows"),
        ("a.png.", "that ends as no name does on Windows"),
        ("x /a.png", "that ends as no name does on Windows"),
        ("x/long:stream.png", "has ':' in its name"),
        ("what?.png", "has '?' in its name"),
        ("line\nbreak.png", "has '\\n' in its name"),
        ("a.png\x00.txt", "has '\\x00' in its name"),
        ("x" * 256, "a name of more than 255 bytes"),
        ("猫" * 86, "a name of more than 255 bytes"),
        ("x/" * 60 + "a.png", "lies 60 folders deep"),
        ("", "has no name"),
        ("./", "has no name"),
        ("inner.zip", "is itself an archive"),
        ("x/data.TAR.GZ", "is itself an archive"),
        ("train.parquet", "is itself an archive"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, cache: Path, name: str, what: str):
    path = zipped(tmp_path / "a.zip", [("a/good.png", image_file()), (entry(name), b"bytes")])
    problems = problems_of(path, cache)
    assert any(what in p.what for p in problems), problems
    assert {p.where for p in problems} == {f"{path} entry {name!r}"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zip", "cache"]


@pytest.mark.parametrize(
    "name", ["console.png", "com.png", "com10.png", "nullify.txt", "a.b.png", "x..y.png", "a .png"]
)
def test_names_that_only_look_refused(tmp_path: Path, cache: Path, name: str):
    path = zipped(tmp_path / "a.zip", {"a/good.png": image_file(), name: image_file(1)})
    assert name in contents(as_folder(str(path), cache))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (stat.S_IFLNK, "is a link, which may lead anywhere"),
        (stat.S_IFIFO, "is no ordinary file, but a device or the like"),
        (stat.S_IFBLK, "is no ordinary file, but a device or the like"),
        (stat.S_IFSOCK, "is no ordinary file, but a device or the like"),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, cache: Path, kind: int, what: str):
    path = zipped(tmp_path / "a.zip", [("a.png", image_file()), (entry("b.png", kind | 0o777), b"/etc/passwd")])
    assert [(p.where, p.what) for p in problems_of(path, cache)] == [(f"{path} entry 'b.png'", what)]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a.png", "a.png"),
        ("x/a.png", "X/A.PNG"),
        ("é.png", "e\u0301.png"),
        ("straße.png", "STRASSE.png"),
        ("./a.png", "a.png"),
        ("a//b.png", "a/b.png"),
        ("a", "A/b.png"),
        ("a/b.png", "A"),
        ("a", "a/"),
        ("a/", "A"),
    ],
)
def test_names_that_collide_are_refused(tmp_path: Path, cache: Path, first: str, second: str):
    good = ("good.png", image_file())
    path = zipped(tmp_path / "a.zip", [good, (entry(first), b"1"), (entry(second), b"2")])
    what = f"has the place of {first!r} on a disk that does not tell case"
    assert (f"{path} entry {second!r}", what) in [(p.where, p.what) for p in problems_of(path, cache)]


def test_everything_is_told_at_once_and_nothing_is_extracted(tmp_path: Path, cache: Path):
    entries = [
        ("good.png", image_file()),
        (entry("../a.png"), b""),
        (entry("/b.png"), b""),
        (entry("nul.png"), b""),
        (entry("GOOD.png"), b""),
        (entry("link.png", stat.S_IFLNK), b""),
    ]
    path = zipped(tmp_path / "a.zip", entries)
    named = [p.where.partition(" entry ")[2] for p in problems_of(path, cache)]
    assert named == ["'../a.png'", "'/b.png'", "'nul.png'", "'GOOD.png'", "'link.png'"]


def test_of_very_many_problems_the_rest_is_counted(tmp_path: Path, cache: Path):
    path = zipped(tmp_path / "a.zip", [("a.png", image_file()), *((entry(f"{n}:.png"), b"") for n in range(130))])
    problems = problems_of(path, cache)
    assert len(problems) == 101
    assert problems[-1].what.startswith("has ")
    assert "more problems" in problems[-1].what


def test_an_encrypted_archive_is_refused_once(tmp_path: Path, cache: Path):
    path = zipped(tmp_path / "a.zip", {"a.png": image_file(1), "b.png": image_file(2), "c.png": image_file(3)})
    content = bytearray(path.read_bytes())
    for name in (b"a.png", b"b.png"):
        content[content.find(name) - 30 + 6] |= 1
        content[content.rfind(name) - 46 + 8] |= 1
    path.write_bytes(content)
    assert [(p.where, p.what) for p in problems_of(path, cache)] == [(str(path), "is encrypted (2 of its 3 entries)")]


def test_an_archive_with_too_many_entries_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archives, "MOST_ENTRIES", 3)
    path = zipped(tmp_path / "a.zip", {f"{number}.png": image_file(number) for number in range(4)})
    assert [p.what for p in problems_of(path, cache)] == ["has 4 entries; 3 is the most"]


def test_an_archive_that_would_be_too_large_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 100)
    path = zipped(tmp_path / "a.zip", {"a.png": image_file(), "b.txt": b"x" * 101})
    assert [p.what for p in problems_of(path, cache)] == ["would be 0.0 GiB when unpacked; 0.0 GiB is the most"]


def test_a_bomb_is_refused(tmp_path: Path, cache: Path):
    entries = {"a.png": image_file(), "bomb.txt": b"\0" * (17 * 2**20), "small.txt": b"\0" * 2**20}
    path = zipped(tmp_path / "a.zip", entries, compression=zipfile.ZIP_DEFLATED)
    problems = problems_of(path, cache)
    assert [p.where for p in problems] == [f"{path} entry 'bomb.txt'"]
    assert "as only a zip bomb is" in problems[0].what


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_on_top_of_one_another_are_refused(tmp_path: Path, cache: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", image_file() + b"\0" * 5000)
        archive.filelist += archive.filelist
    assert problems_of(tmp_path / "a.zip", cache)[0].what.startswith("has entries that lie on top of one another")


@pytest.mark.parametrize("size", [1, 3_000])
def test_a_header_that_lies_about_the_size_is_found(tmp_path: Path, cache: Path, size: int):
    path = zipped(tmp_path / "a.zip", {"a.png": image_file() + b"\0" * 2000}, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    central = content.rfind(b"a.png") - 46
    struct.pack_into("<L", content, central + 24, size)
    path.write_bytes(content)
    problems = problems_of(path, cache)
    assert [p.where for p in problems] == [f"{path} entry 'a.png'"]
    assert problems[0].what.startswith("is damaged")


def test_each_damaged_entry_is_named(tmp_path: Path, cache: Path):
    files = {f"{number}.png": image_file(number) for number in range(4)}
    path = zipped(tmp_path / "a.zip", files)
    content = bytearray(path.read_bytes())
    for name in (b"1.png", b"3.png"):
        content[content.find(name) + 30] ^= 1
    path.write_bytes(content)
    problems = problems_of(path, cache)
    assert [p.where for p in problems] == [f"{path} entry '1.png'", f"{path} entry '3.png'"]
    assert all("Bad CRC-32" in p.what for p in problems)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_truncated_archive_is_cut_off(tmp_path: Path, cache: Path, share: float):
    path = zipped(tmp_path / "a.zip", {f"{number}.png": image_file(number) for number in range(9)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    problems = problems_of(path, cache)
    assert [p.where for p in problems] == [str(path)]
    assert problems[0].what.startswith("is cut off or damaged")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", image_file()])
def test_what_is_no_archive_is_told_so(tmp_path: Path, cache: Path, content: bytes):
    (tmp_path / "a.zip").write_bytes(content)
    assert [p.what for p in problems_of(tmp_path / "a.zip", cache)] == ["is not a zip file, whatever its name says"]


@pytest.mark.parametrize(("method", "name"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")])
def test_another_compression_is_named(tmp_path: Path, cache: Path, method: int, name: str):
    path = zipped(tmp_path / "a.zip", {"a.png": image_file()}, compression=method)
    assert [p.what for p in problems_of(path, cache)] == [f"is packed by {name}, which is not read here"]


@pytest.mark.parametrize(
    ("entries", "seen"),
    [
        ({"a.txt": b"x", "b.txt": b"y", "c.pdf": b"z"}, "2 x .txt, 1 x .pdf"),
        ({".a.png": b""}, "it is empty"),
        ({}, "it is"),
    ],
)
def test_an_archive_without_images_is_refused(tmp_path: Path, cache: Path, entries: dict[str, bytes], seen: str):
    problems = problems_of(zipped(tmp_path / "a.zip", entries), cache)
    assert len(problems) == 1
    assert problems[0].what.startswith(f"holds no images ({seen}")


def test_a_full_disk_is_found_before(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    path = zipped(tmp_path / "a.zip", {"a.png": image_file()})
    assert problems_of(path, cache)[0].what.startswith("needs 0.0 GiB when unpacked")


_FUZZED = {
    "top/a.png": image_file(1),
    "top/a.txt": b"a caption " * 30,
    "top/ü/b.png": image_file(2),
    ".hidden": b"x",
    "metadata.jsonl": b'{"file_name": "top/a.png", "text": "x"}',
}


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_an_archive_with_random_bytes_is_refused_or_unpacked_and_nothing_else_happens(data: st.DataObject):
    with tempfile.TemporaryDirectory() as folder:
        around = Path(folder)
        method = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        path = zipped(around / "a.zip", _FUZZED, compression=method)
        content = bytearray(path.read_bytes())
        places = st.integers(0, len(content) - 1)
        for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=12)):
            content[place] = byte
        length = data.draw(st.one_of(st.just(len(content)), places))
        path.write_bytes(content[:length] + data.draw(st.binary(max_size=30)))
        cache = around / "deep" / "er" / "cache"
        cache.mkdir(parents=True)
        try:
            unpacked = as_folder(str(path), cache)
        except DataError:
            assert leftovers(cache) == []
        else:
            assert leftovers(cache) == [unpacked.name]
            assert all(file.resolve().is_relative_to(unpacked.resolve()) for file in unpacked.rglob("*"))
        assert sorted(p.relative_to(around).as_posix() for p in around.rglob("*") if "cache" not in p.parts) == [
            "a.zip",
            "deep",
            "deep/er",
        ]


# ---------------------------------------------------------------------------------------------------------------------
# tables


def cells(count: int) -> list[dict[str, Any]]:
    return [{"bytes": image_file(number), "path": f"{number}.png"} for number in range(count)]


def table(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    """A parquet file."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(dict(columns)), path, **options)
    return path


def test_a_table_becomes_images_as_they_are_with_their_captions(tmp_path: Path, cache: Path):
    files = [image_file(0), image_file(1, "JPEG"), image_file(2, "WEBP"), image_file(3, "GIF"), image_file(4, "BMP")]
    texts = ["a cat", "", 'say "hi"\nthere', "猫", "e"]
    images = [{"bytes": file, "path": None} for file in files]
    reports: list[tuple[int, int]] = []
    path = table(tmp_path / "a.parquet", {"image": images, "text": texts, "label": [1, 2, 3, 4, 5]})
    folder = as_folder(str(path), cache, lambda done, total: reports.append((done, total)))
    names = ["000000.png", "000001.jpg", "000002.webp", "000003.gif", "000004.bmp"]
    assert captions(folder) == dict(zip(names, texts, strict=True))
    assert [(folder / name).read_bytes() for name in names] == files
    assert reports == [(done, 5) for done in range(6)]
    assert [item.caption for item in scan(folder)] == ["a cat", "", 'say "hi" there', "猫", "e"]


def test_a_table_is_read_a_few_rows_at_a_time_across_row_groups(tmp_path: Path, cache: Path):
    columns = {"image": cells(100), "text": [str(number) for number in range(100)]}
    folder = as_folder(str(table(tmp_path / "a.parquet", columns, row_group_size=7)), cache)
    assert captions(folder) == {f"{number:06d}.png": str(number) for number in range(100)}


@pytest.mark.parametrize("image", ["image", "IMG", "jpg", "png"])
@pytest.mark.parametrize("text", ["text", "caption", "Prompt"])
def test_raw_bytes_under_the_usual_names(tmp_path: Path, cache: Path, image: str, text: str):
    path = table(tmp_path / "a.parquet", {image: [image_file(1)], text: ["x"], "other": ["y"], "bytes": [b"z"]})
    assert captions(as_folder(str(path), cache)) == {"000000.png": "x"}


def test_several_captions_of_an_image_stay_several(tmp_path: Path, cache: Path):
    path = table(tmp_path / "a.parquet", {"image": cells(2), "captions": [["a", "b"], ["c"]]})
    assert captions(as_folder(str(path), cache)) == {"000000.png": ["a", "b"], "000001.png": ["c"]}


def test_named_columns_are_used(tmp_path: Path, cache: Path):
    columns = {"my image": [image_file(1)], "image": [image_file(2)], "a&b": ["x"], "text": ["y"]}
    path = table(tmp_path / "a.parquet", columns)
    folder = as_folder(f"{path}?image=my%20image&text=a%26b", cache)
    assert contents(folder)["000000.png"] == image_file(1)
    assert captions(folder) == {"000000.png": "x"}
    assert as_folder(f"{path}?image=my+image&text=a%26b", cache) == folder
    assert as_folder(str(path), cache) != folder


def test_no_captions_can_be_asked_for(tmp_path: Path, cache: Path):
    folder = as_folder(f"{table(tmp_path / 'a.parquet', {'image': cells(1), 'text': ['x']})}?text=", cache)
    assert list(contents(folder)) == ["000000.png"]


@pytest.mark.parametrize(
    ("columns", "query", "whats"),
    [
        (
            {"image": cells(1), "mask": cells(1), "text": ["a"], "prompt": ["b"]},
            "",
            [
                "has several columns that may hold images (image, mask)",
                "has several columns that may hold captions (text, prompt)",
            ],
        ),
        (
            {"thing": [b""], "words": ["a"]},
            "",
            ["has no column that is known to hold images", "has no column that is known to hold captions"],
        ),
        ({"image": ["path.png"], "text": [1]}, "?text=", ["has no column that is known to hold images"]),
        ({"image": cells(1), "text": ["a"]}, "?image=img&text=txt", ["has no columns 'img'", "has no columns 'txt'"]),
        (
            {"image": cells(1), "text": ["a"]},
            "?image=text&text=image",
            ["its column 'text' does not hold images", "its column 'image' does not hold captions"],
        ),
    ],
)
def test_columns_that_cannot_be_told_are_listed(
    tmp_path: Path, cache: Path, columns: dict[str, Any], query: str, whats: list[str]
):
    path = f"{table(tmp_path / 'a.parquet', columns)}{query}"
    problems = problems_of(path, cache)
    assert [(p.where, p.what) for p in problems] == [(path, what) for what in whats]
    assert all(f"{name} (" in p.fix for p in problems for name in columns)


def test_every_row_that_cannot_be_used_is_named(tmp_path: Path, cache: Path):
    images = [
        *cells(2),
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": b"not an image", "path": None},
        {"bytes": image_file(0, "ICO"), "path": None},
        *cells(1),
    ]
    path = table(tmp_path / "a.parquet", {"image": images, "text": ["a", None, *["b"] * 5, None]})
    assert [(p.where.removeprefix(f"{path} "), p.what) for p in problems_of(path, cache)] == [
        ("row 1", "its 'text' is missing"),
        ("row 2", "its 'image' is missing"),
        ("row 3", "its 'image' is missing"),
        ("row 4", "its 'image' is only a path, '/etc/passwd', without the image"),
        ("row 5", "its 'image' is no image of a kind that is read"),
        ("row 6", "its 'image' is no image of a kind that is read"),
        ("row 7", "its 'text' is missing"),
    ]


def test_lists_of_captions_with_none_among_them_are_named(tmp_path: Path, cache: Path):
    path = table(tmp_path / "a.parquet", {"image": cells(3), "text": [["a"], [], ["b", None]]})
    assert [(p.where[-5:], p.what) for p in problems_of(path, cache)] == [
        ("row 1", "its 'text' is missing"),
        ("row 2", "its 'text' holds no text"),
    ]


def test_a_caption_that_is_no_utf_8_is_named(tmp_path: Path, cache: Path):
    arrow = pytest.importorskip("pyarrow")
    texts = arrow.array([b"fine", b"\xff\xfe"]).view(arrow.string())
    path = table(tmp_path / "a.parquet", {"image": cells(2), "text": texts})
    assert [(p.where[-5:], p.what) for p in problems_of(path, cache)] == [
        ("row 1", "its 'text' is not UTF-8 text (invalid start byte at byte 0)")
    ]


def test_after_very_many_bad_rows_it_stops(tmp_path: Path, cache: Path):
    path = table(tmp_path / "a.parquet", {"image": [image_file()] * 300, "text": [None, "a", *[None] * 298]})
    problems = problems_of(f"{path}?text=text", cache)
    assert len(problems) == tables.ENOUGH + 1
    assert problems[-1].what == "is the last that was looked at"


def test_a_table_without_rows_is_refused(tmp_path: Path, cache: Path):
    arrow = pytest.importorskip("pyarrow")
    columns = {"image": arrow.array([], arrow.binary()), "text": arrow.array([], arrow.string())}
    assert [p.what for p in problems_of(table(tmp_path / "a.parquet", columns), cache)] == ["holds no rows"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 50 + b"PAR1", image_file()])
def test_what_is_no_table_is_told_so(tmp_path: Path, cache: Path, content: bytes):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(content)
    problems = problems_of(tmp_path / "a.parquet", cache)
    assert [p.where for p in problems] == [str(tmp_path / "a.parquet")]
    assert problems[0].what.startswith("cannot be read as parquet")


def test_a_folder_of_tables_is_one_table_in_order(tmp_path: Path, cache: Path):
    data = tmp_path / "set"
    for shard in range(2):
        columns = {"image": cells(2), "text": [f"{shard} {number}" for number in range(2)]}
        table(data / "data" / f"train-0000{shard}-of-00002.parquet", columns)
    (data / "README.md").write_text("about it", encoding="utf-8")
    folder = as_folder(str(data), cache)
    assert list(captions(folder).values()) == ["0 0", "0 1", "1 0", "1 1"]
    assert as_folder(f"{data}?split=train", cache) == folder


def test_of_several_tables_in_a_folder_one_must_be_named(tmp_path: Path, cache: Path):
    for split in ("train", "test"):
        table(tmp_path / "set" / f"{split}-00000-of-00001.parquet", {"image": cells(1), "text": [split]})
    (problem,) = problems_of(tmp_path / "set", cache)
    assert problem.what == "holds 2 tables"
    assert "?split=NAME" in problem.fix
    assert "test, train" in problem.fix
    assert problems_of(f"{tmp_path / 'set'}?split=dev", cache)[0].what == "holds no tables 'dev'"
    assert list(captions(as_folder(f"{tmp_path / 'set'}?split=test", cache)).values()) == ["test"]


def test_a_missing_file_of_a_table_is_found(tmp_path: Path, cache: Path):
    for shard in (0, 2):
        table(tmp_path / "set" / f"train-0000{shard}-of-00003.parquet", {"image": cells(1), "text": ["a"]})
    assert problems_of(tmp_path / "set", cache)[0].what == "is one of 3 files of a table, of which 2 are here"


def test_a_file_with_other_columns_is_named(tmp_path: Path, cache: Path):
    table(tmp_path / "set" / "0.parquet", {"image": cells(1), "text": ["a"]})
    second = table(tmp_path / "set" / "1.parquet", {"image": cells(1), "caption": ["a"]})
    assert [(p.where, p.what) for p in problems_of(tmp_path / "set", cache)] == [(str(second), "has no columns 'text'")]


def test_tables_beside_images_are_not_taken_for_the_data(tmp_path: Path, cache: Path):
    table(tmp_path / "set" / "0.parquet", {"image": cells(1), "text": ["a"]})
    (tmp_path / "set" / "a.png").write_bytes(image_file())
    assert as_folder(str(tmp_path / "set"), cache) == tmp_path / "set"


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_table_with_random_bytes_is_refused_or_read(data: st.DataObject):
    with tempfile.TemporaryDirectory() as folder:
        path = table(Path(folder, "a.parquet"), {"image": cells(2), "text": ["a", "b"]})
        content = bytearray(path.read_bytes())
        places = st.integers(0, len(content) - 1)
        for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)):
            content[place] = byte
        path.write_bytes(content)
        try:
            unpacked = as_folder(str(path), Path(folder, "cache"))
        except DataError:
            assert leftovers(Path(folder, "cache")) == []
        else:
            assert leftovers(Path(folder, "cache")) == [unpacked.name]


# ---------------------------------------------------------------------------------------------------------------------
# datasets of Hugging Face


def hugging_face(split_sizes: Mapping[str, int], folder: Path) -> Any:
    """A dataset as `push_to_hub` lays it out, and the library."""
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    features = library.Features({"image": library.Image(), "text": library.Value("string"), "n": library.Value("int8")})
    (folder / "data").mkdir(parents=True)
    for split, count in split_sizes.items():
        columns = {"image": cells(count), "text": [f"{split} {n}" for n in range(count)], "n": list(range(count))}
        made = library.Dataset.from_dict(columns, features=features)
        made.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return library


def test_a_dataset_in_a_folder_here(tmp_path: Path, cache: Path):
    hugging_face({"train": 3}, tmp_path / "set")
    reports: list[tuple[int, int]] = []
    folder = as_folder(f"hf:{tmp_path / 'set'}", cache, lambda done, total: reports.append((done, total)))
    assert captions(folder) == {f"{n:06d}.png": f"train {n}" for n in range(3)}
    assert [contents(folder)[f"{n:06d}.png"] for n in range(3)] == [image_file(n) for n in range(3)]
    assert reports[-1] == (3, 3)
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert as_folder(f"hf:{tmp_path / 'copy'}", cache) == folder
    table(tmp_path / "copy" / "data" / "train-00000-of-00001.parquet", {"image": cells(1), "text": ["other"]})
    assert list(captions(as_folder(f"hf:{tmp_path / 'copy'}", cache)).values()) == ["other"]


def test_a_split_must_be_named_if_there_are_several(tmp_path: Path, cache: Path):
    hugging_face({"train": 2, "test": 1}, tmp_path / "set")
    (problem,) = problems_of(f"hf:{tmp_path / 'set'}", cache)
    assert (problem.what, "train, test" in problem.fix) == ("has 2 splits", True)
    assert problems_of(f"hf:{tmp_path / 'set'}?split=dev", cache)[0].what == "has no split 'dev'"
    assert list(captions(as_folder(f"hf:{tmp_path / 'set'}?split=test", cache)).values()) == ["test 0"]


def test_a_revision_of_a_folder_here_has_no_effect(tmp_path: Path, cache: Path):
    hugging_face({"train": 1}, tmp_path / "set")
    problems = problems_of(f"hf:{tmp_path / 'set'}?revision=main", cache)
    assert [p.what for p in problems] == ["has revision=, which has no effect here"]


def test_a_dataset_that_was_saved_to_disk(tmp_path: Path, cache: Path):
    library = hugging_face({"train": 2}, tmp_path / "set")
    loaded = library.load_dataset("parquet", data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "hf"))
    loaded.save_to_disk(tmp_path / "all")
    loaded["train"].save_to_disk(tmp_path / "one")
    for name in ("all", "one"):
        assert list(captions(as_folder(f"hf:{tmp_path / name}", cache)).values()) == ["train 0", "train 1"]


def test_a_folder_of_images_read_as_a_dataset(tmp_path: Path, cache: Path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    lines = [{"file_name": f"{number}.png", "text": f"caption {number}"} for number in range(2)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    for number in range(2):
        (tmp_path / "set" / f"{number}.png").write_bytes(image_file(number))
    folder = as_folder(f"hf:{tmp_path / 'set'}", cache)
    assert captions(folder) == {"000000.png": "caption 0", "000001.png": "caption 1"}
    assert contents(folder)["000001.png"] == image_file(1)


def test_archives_of_images_in_a_dataset(tmp_path: Path, cache: Path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    lines = b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n'
    files = {"metadata.jsonl": lines, "a.png": image_file(1), "b.png": image_file(2)}
    zipped(tmp_path / "set" / "train.zip", files)
    folder = as_folder(f"hf:{tmp_path / 'set'}", cache)
    assert captions(folder) == {"000000.png": "one", "000001.png": "two"}
    assert contents(folder)["000001.png"] == image_file(2)


def test_a_path_in_a_dataset_cannot_lead_out_of_it(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    library = pytest.importorskip("datasets")
    (tmp_path / "private.png").write_bytes(image_file())
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.png").write_bytes(image_file(7))
    inside, outside = str(tmp_path / "set" / "mine.png"), str(tmp_path / "private.png")
    paths = [
        *(inside, outside, f"file://{outside}", str(tmp_path / "set" / ".." / "private.png")),
        *("http://127.0.0.1:9/a.png", f"file://{outside}::{inside}", "mine.png", inside + "x"),
    ]
    monkeypatch.chdir(tmp_path / "set")  # where `http:` could be a folder's name
    columns = {"image": [{"bytes": None, "path": path} for path in paths], "text": ["a"] * 8}
    schema = library.Features({"image": library.Image(), "text": library.Value("string")}).arrow_schema
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns, schema=schema), tmp_path / "set" / "train.parquet")
    problems = problems_of(f"hf:{tmp_path / 'set'}", cache)
    assert [p.where[-5:] for p in problems] == [f"row {number}" for number in range(1, 8)]
    assert all("leads out of the dataset" in p.what for p in problems[:6])
    assert "where nothing is" in problems[6].what


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", "image,text\nx,y\n", "does not say what its columns hold"),
        ("a.jsonl", '{"text": "x"}\n', "has no column that is known to hold images"),
        ("a.unknown", "x", "cannot be loaded"),
    ],
)
def test_a_dataset_without_images_is_refused(tmp_path: Path, cache: Path, name: str, content: str, what: str):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text(content, encoding="utf-8")
    (problem,) = problems_of(f"hf:{tmp_path / 'set'}", cache)
    assert problem.where == f"hf:{tmp_path / 'set'}"
    assert what in problem.what


@pytest.mark.parametrize("absent", ["datasets", "pyarrow"])
def test_without_the_extra_the_command_that_brings_it_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, absent: str
):
    path = table(tmp_path / "set" / "a.parquet", {"image": cells(1), "text": ["a"]})
    monkeypatch.setitem(sys.modules, absent, None)
    place = f"hf:{path.parent}" if absent == "datasets" else str(path)
    (problem,) = problems_of(place, cache)
    assert problem.where == place
    assert problem.what.startswith(f"{absent} cannot be imported")
    assert problem.fix == "Run: pip install lorasmith[huggingface]"


def test_our_own_folder_of_that_name_is_not_taken_for_the_library(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    path = table(tmp_path / "set" / "a.parquet", {"image": cells(1), "text": ["a"]})
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    (problem,) = problems_of(f"hf:{path.parent}", cache)
    assert problem.what.startswith("Hugging Face's datasets is not installed")
    assert "pip install lorasmith[huggingface]" in problem.fix


# -- the Hub, in processes of their own: its address is read when the library is imported


_ASK = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
from lorasmith.datasets.unpack import as_folder
from lorasmith.trainer.errors import DataError
for path in sys.argv[2:]:
    try:
        print(json.dumps(str(as_folder(path, Path(sys.argv[1])))))
    except DataError as error:
        print(json.dumps([str(problem) for problem in error.problems]))
"""


def ask(cache: Path, *paths: str, **environment: str) -> list[Any]:
    """What `as_folder` gives for each path, in a process that starts in the root of the repository."""
    surroundings = {**os.environ, "HF_HOME": str(cache.parent / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-c", _ASK, str(cache), *paths]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_dataset_of_the_hub(tmp_path: Path, cache: Path):
    hugging_face({"train": 3}, tmp_path / "set")
    questions = [
        "hf:owner/name",
        f"hf:owner/name?revision={COMMIT}",
        "hf:owner/name?revision=v9",
        "hf:owner/other",
        "hf:a/b/c",
    ]
    with hub_of(tmp_path / "set") as address:
        folder, same, revision, other, no_name = ask(cache, *questions, HF_ENDPOINT=address)
    assert captions(Path(folder)) == {f"{n:06d}.png": f"train {n}" for n in range(3)}
    assert same == folder
    assert "has no revision 'v9'" in revision[0]
    assert "is not on the Hub, or not open to everyone" in other[0]
    assert "is neither a folder here nor a name on the Hub" in no_name[0]
    known, unknown = ask(cache, "hf:owner/name", "hf:owner/other", HF_HUB_OFFLINE="1")
    assert known == folder
    assert "the Hugging Face Hub cannot be reached" in unknown[0]
    unreachable = ask(cache, "hf:owner/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hugging Face Hub cannot be reached" in unreachable[0][0]


def test_a_name_on_the_hub_is_pinned_to_the_commit_that_was_read(tmp_path: Path, cache: Path):
    hugging_face({"train": 1}, tmp_path / "set")
    names = ["hf:owner/name", "hf:owner/name?split=train", "hf:owner/name?revision=main"]
    with hub_of(tmp_path / "set") as address:
        first, *_ = ask(cache, *names, HF_ENDPOINT=address)
    found = [pinned(name, cache) for name in names]
    assert found == [
        f"hf:owner/name?revision={COMMIT}",
        f"hf:owner/name?split=train&revision={COMMIT}",
        f"hf:owner/name?revision={COMMIT}",
    ]
    assert [pinned(name, cache) for name in found] == found
    assert ask(cache, found[0], HF_HUB_OFFLINE="1") == [first]
    untouched = ["hf:owner/other", f"hf:{tmp_path / 'set'}", str(tmp_path / "t.parquet?image=a")]
    assert [pinned(name, cache) for name in untouched] == untouched


def test_a_folder_of_images_on_the_hub(tmp_path: Path, cache: Path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    lines = [{"file_name": f"{number}.png", "text": f"caption {number}"} for number in range(2)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    for number in range(2):
        (tmp_path / "set" / f"{number}.png").write_bytes(image_file(number))
    with hub_of(tmp_path / "set") as address:
        (folder,) = ask(cache, "hf:owner/name", HF_ENDPOINT=address)
    assert captions(Path(folder)) == {"000000.png": "caption 0", "000001.png": "caption 1"}
    assert contents(Path(folder))["000001.png"] == image_file(1)
