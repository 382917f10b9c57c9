"""`lorasmith init`: the file it writes is complete, names its recipe, and finds the images from where it lies."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lorasmith.configs import read_recipe
from lorasmith.trainer.cli import app
from lorasmith.trainer.configfile import read_config, read_toml, read_with_provenance, validate
from lorasmith.trainer.errors import ConfigError
from lorasmith.trainer.plan import make_plan


def init(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def here(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with `pictures/` and an empty `runs/conf/`."""
    (tmp_path / "runs" / "conf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorasmith.trainer.files.user_cache", lambda: tmp_path / "cache")
    return tmp_path


def test_the_file_names_its_recipe_and_only_the_answers_are_its_own(here: Path, pictures: Path):
    assert "7 images, base" in init("mine.toml", "--images", "pictures", "--trigger", "sks").output
    config, origins = read_with_provenance(here / "mine.toml")
    assert read_toml(here / "mine.toml")["recipe"] == "demo"
    expected = {"name": "mine", "recipe": "demo", "data": [{"path": str(pictures.resolve()), "trigger": "sks"}]}
    assert config == validate(expected)
    answers = {dotted for dotted, origin in origins.items() if origin == "file"}
    assert answers == {"name", "recipe", "data.0.path", "data.0.trigger"}
    sections = {dotted for dotted, origin in origins.items() if origin == "recipe"}
    recipe = {f"{name}.{key}" for name, table in read_recipe("demo").items() for key in table}
    assert sections == recipe


def test_a_recipe_that_is_not_shipped_is_refused(here: Path):
    with pytest.raises(ConfigError, match=r"--recipe: there is no recipe 'x'\. Recipes: .*demo, full, "):
        init("mine.toml", "--images", "pictures", "--recipe", "x")
    assert not (here / "mine.toml").exists()


def table_of(folder: Path) -> Path:
    """A table of one picture, as a part of a data set that two libraries can read."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = folder / "made.png"
    Image.new("RGB", (64, 64), (1, 2, 3)).save(file)
    folder.joinpath("set").mkdir()
    rows = pyarrow.table({"image": [{"bytes": file.read_bytes(), "path": "a.png"}], "words": ["a thing"]})
    parquet.write_table(rows, folder / "set" / "train.parquet")
    return folder / "set" / "train.parquet"


@pytest.mark.parametrize(
    ("images", "written"),
    [
        ("pictures", "../../pictures"),
        ("set/train.parquet?text=words", "../../set/train.parquet?text=words"),
        ("set?split=train&text=words", "../../set?split=train&text=words"),
        ("hf:set?text=words", "hf:../../set?text=words"),
    ],
)
def test_the_images_are_found_from_where_the_file_lies(here: Path, images: str, written: str):
    if images.startswith("hf:"):
        pytest.importorskip("datasets")
    table_of(here)
    init("runs/conf/mine.toml", "--images", images)
    assert read_toml(here / "runs" / "conf" / "mine.toml")["data"][0]["path"] == written
    config = read_config(here / "runs" / "conf" / "mine.toml", [f"runtime.cache={here / 'cache'}"])
    assert len(make_plan(config).examples) == (7 if images == "pictures" else 1)


def test_a_run_spells_out_what_its_recipe_stands_for(here: Path):
    """A recipe may change with a later version; a run that is resumed then must not."""
    init("mine.toml", "--images", "pictures")
    config = read_config(here / "mine.toml", [f"runtime.cache={here / 'cache'}"])
    planned = make_plan(config).config
    assert (config.recipe, planned.recipe) == ("demo", "")
    assert planned.adapter == config.adapter
