"""Uploads become a folder of images, whatever their files are called."""

from __future__ import annotations

import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorasmith.datasets.folder import look, scan
from lorasmith.datasets.uploads import EXAMPLE, example_images, receive, safe_name
from lorasmith.trainer.errors import DataError

from .conftest import draw_picture


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    return tmp_path / "runs" / ".uploads"


def sent(folder: Path, *names: str) -> list[Path]:
    """Files as the browser's server lays them down: each in a folder of its own."""
    files = []
    for number, name in enumerate(names):
        file = folder / str(number) / name
        file.parent.mkdir(parents=True)
        if file.suffix.lower() in (".png", ".jpg"):
            draw_picture(number, (64, 48)).save(file)
        else:
            file.write_text(f"text {number}")
        files.append(file)
    return files


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("given", "safe"),
    [
        ("cat.png", "cat.png"),
        ("../../etc/cat.png", "cat.png"),
        ("..\\..\\cat.png", "cat.png"),
        ("..png", "image.png"),
        (".hidden.png", "hidden.png"),
        ("CON.png", "_CON.png"),
        ("a:b?.png", "a_b_.png"),
        ("a\x00b.png", "a_b.png"),
        ("@eaDir.png", "_@eaDir.png"),
        ("x" * 300 + ".png", "x" * 120 + ".png"),
        ("cat .png", "cat.png"),
    ],
)
def test_names_are_made_safe(given: str, safe: str):
    assert safe_name(given) == safe


def test_images_and_captions_are_taken_and_the_rest_is_named(tmp_path: Path, uploads: Path):
    got = receive(sent(tmp_path / "sent", "a.png", "a.txt", "virus.exe", "page.html"), uploads)
    assert (got.taken, names(got.folder)) == (2, ["a.png", "a.txt"])
    assert [problem.where for problem in got.left_out] == ["virus.exe", "page.html"]
    assert got.folder.parent == uploads
    assert [item.caption for item in scan(got.folder)] == ["text 1"]


def test_nothing_that_can_be_used_is_told(tmp_path: Path, uploads: Path):
    with pytest.raises(DataError, match="neither an image nor a caption"):
        receive(sent(tmp_path / "sent", "virus.exe"), uploads)
    assert not uploads.exists()


def test_the_same_name_twice_keeps_both(tmp_path: Path, uploads: Path):
    got = receive(sent(tmp_path / "sent", "a.png", "A.png", "a.jpg"), uploads)
    assert names(got.folder) == ["A-2.png", "a.jpg", "a.png"]


def test_further_files_go_to_the_same_folder_and_take_no_place(tmp_path: Path, uploads: Path):
    first = receive(sent(tmp_path / "one", "a.png", "a.txt"), uploads)
    more = receive(sent(tmp_path / "two", "a.txt", "a.png"), uploads, first.folder)
    assert more.folder == first.folder
    assert names(more.folder) == ["a-2.png", "a-2.txt", "a.png", "a.txt"]
    assert [item.caption for item in scan(more.folder)] == ["text 0", "text 1"]
    assert receive(sent(tmp_path / "three", "a.png"), uploads).folder != first.folder


def test_what_came_together_stays_together(tmp_path: Path, uploads: Path):
    got = receive(sent(tmp_path / "one", "a.png", "a.png", "a.txt", "a.txt", "b.png", "c.txt"), uploads)
    assert names(got.folder) == ["a-2.png", "a-2.txt", "a.png", "a.txt", "b.png", "c.txt"]
    receive(sent(tmp_path / "two", "b.txt", "c.png"), uploads, got.folder)  # what was missing
    assert {item.path.name: item.caption for item in scan(got.folder)} == {
        "a.png": "text 2",
        "a-2.png": "text 3",
        "b.png": "text 0",
        "c.png": "text 5",
    }


def test_uploads_at_once_share_no_folder(tmp_path: Path, uploads: Path):
    with ThreadPoolExecutor(4) as tabs:
        got = list(tabs.map(lambda tab: receive(sent(tmp_path / str(tab), "a.png", "b.png"), uploads), range(8)))
    assert len({one.folder for one in got}) == 8
    assert all(names(one.folder) == ["a.png", "b.png"] for one in got)


def test_a_zip_gets_a_folder_of_its_name(tmp_path: Path, uploads: Path):
    archive = tmp_path / "My Drawings!.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for sent_file in sent(tmp_path / "sent", "a.png", "a.txt"):
            file.write(sent_file, f"inner/{sent_file.name}")
    got = receive([archive], uploads)
    assert got.folder == uploads / "my-drawings"
    assert names(got.folder) == ["inner/a.png", "inner/a.txt"]


def test_a_zip_that_leads_elsewhere_is_refused_whole(tmp_path: Path, uploads: Path):
    archive = tmp_path / "bad.zip"
    [image] = sent(tmp_path / "sent", "a.png")
    with zipfile.ZipFile(archive, "w") as file:
        file.write(image, "a.png")
        file.write(image, "../../evil.png")
    with pytest.raises(DataError, match="leads out of the folder"):
        receive([archive], uploads)
    assert list(tmp_path.rglob("evil.png")) == []
    assert not (uploads / "bad").exists()


def test_a_zip_comes_alone(tmp_path: Path, uploads: Path):
    with pytest.raises(DataError, match="comes with other files"):
        receive(sent(tmp_path / "sent", "a.png", "b.zip"), uploads)


def test_the_example_is_a_copy_that_can_be_changed(uploads: Path):
    folder = example_images(uploads)
    assert folder == uploads / EXAMPLE
    assert look(folder).problems == []
    (folder / "lion-face.txt").write_text("mine")
    assert example_images(uploads) == folder
    assert (folder / "lion-face.txt").read_text() == "mine"
