"""The four folders install as one namespace; what starts quickly stays free of heavy imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomlkit

from lorasmith.configs import read_recipe, recipe_names, recipe_text
from lorasmith.trainer.configfile import merge, validate

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["torch", "gradio", "diffusers", "transformers", "peft", "accelerate", "xformers"]

in_source_tree = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file() or not (ROOT / "trainer").is_dir(), reason="the source tree is not here"
)


def python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints, started in a folder that `-c` puts on its path."""
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@in_source_tree
def test_the_datasets_folder_is_no_package_of_its_own():
    assert (ROOT / "datasets" / "folder.py").is_file()
    assert not (ROOT / "datasets" / "__init__.py").exists()


@in_source_tree
def test_our_datasets_import_from_the_repository_root():
    code = "import lorasmith.datasets.folder as f; print(f.__name__); print(f.__file__)"
    name, file = python(code, ROOT).splitlines()
    assert name == "lorasmith.datasets.folder"
    assert Path(file).name == "folder.py"


@in_source_tree
def test_hugging_face_datasets_wins_over_the_folder_even_in_the_repository_root(tmp_path: Path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("origin = 'installed'\n", encoding="utf-8")
    code = f"import sys; sys.path.insert(1, {str(tmp_path)!r}); import datasets; print(datasets.origin)"
    assert python(code, ROOT) == "installed"


@pytest.mark.parametrize("module", ["trainer.errors", "datasets.folder", "configs", "ui"])
def test_each_folder_is_found_in_the_namespace_and_is_typed(module: str, tmp_path: Path):
    file = python(f"import lorasmith.{module} as module; print(module.__file__)", tmp_path)
    assert Path(file).with_name("py.typed").is_file()


def test_the_embedded_base_is_in_the_package(tmp_path: Path):
    code = "from lorasmith.trainer.bases import POCKET; print((POCKET / 'model_index.json').is_file())"
    assert python(code, tmp_path) == "True"


@pytest.mark.parametrize("module", ["cli", "config", "plan", "jobs", "events", "bases", "errors", "files"])
def test_no_heavy_library_is_imported_by(module: str, tmp_path: Path):
    code = f"import sys, lorasmith.trainer.{module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code, tmp_path) == "[]"


@pytest.mark.parametrize(
    "module", ["folder", "captions", "buckets", "images", "dataset", "checks", "unpack", "filling"]
)
def test_no_heavy_library_is_imported_by_the_data_module(module: str, tmp_path: Path):
    code = f"import sys, lorasmith.datasets.{module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code, tmp_path) == "[]"


def imported_by(file: Path) -> set[str]:
    """The top-level names of all absolute imports of a file, wherever they stand."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@in_source_tree
@pytest.mark.parametrize("folder", ["trainer", "datasets", "configs"])
def test_only_the_browser_app_imports_gradio(folder: str):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [file.name for file in files if "gradio" in imported_by(file)] == []


@in_source_tree
def test_the_browser_app_imports_no_torch():
    heavy = set(HEAVY) - {"gradio"}
    files = sorted((ROOT / "ui").rglob("*.py"))
    assert files
    assert [file.name for file in files if imported_by(file) & heavy] == ["planner.py"]  # in another process


@in_source_tree
@pytest.mark.parametrize("folder", ["trainer", "datasets", "configs", "ui"])
def test_no_module_imports_a_sibling_folder_by_its_bare_name(folder: str):
    bare = {"trainer", "ui", "configs", "datasets"}
    files = sorted((ROOT / folder).glob("*.py"))
    assert [file.name for file in files if imported_by(file) & bare] == []


@in_source_tree
def test_every_module_that_is_imported_at_the_top_is_declared_as_a_dependency():
    project = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8")).unwrap()["project"]
    declared = {re.split(r"[<>=!;\[ ]", line)[0].replace("-", "_").lower() for line in project["dependencies"]}
    names = {"pillow": "PIL", "scikit_learn": "sklearn", "nvidia_ml_py": "pynvml", "markdown_it_py": "markdown_it"}
    allowed = {names.get(name, name) for name in declared} | set(sys.stdlib_module_names) | {"lorasmith"}
    used = {
        name: file.name
        for folder in ("trainer", "datasets", "configs", "ui")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for name in imported_by(file)
    }
    assert {name: file for name, file in used.items() if name not in allowed} == {}


SUBJECTS = [f"{subject}-{base}" for subject in ("style", "character", "object") for base in ("sd1", "sdxl", "sdxl-v")]


def test_there_are_recipes():
    assert {"demo", "full", "style-sd2", *SUBJECTS} == set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_under_a_name_and_data(name: str):
    answers = {"name": "x", "data": [{"path": "photos"}]}
    config = validate(merge(read_recipe(name), answers), source=f"{name}.toml")
    assert (config.name, config.data[0].path) == ("x", "photos")


@pytest.mark.parametrize("name", recipe_names())
def test_the_header_of_every_recipe_says_hardware_and_what_to_expect(name: str):
    header = [line for line in recipe_text(name).splitlines() if line.startswith("#")]
    assert any("Hardware:" in line for line in header)
    assert any("Minutes:" in line for line in header)
    assert any("Expected:" in line for line in header)


@pytest.mark.parametrize("name", ["style-sd2", *SUBJECTS])
def test_what_a_recipe_sets_other_than_the_default_has_its_reason_beside_it(name: str):
    defaults, reasons = validate({"name": "x", "data": [{"path": "photos"}]}), {}
    for section, table in tomlkit.parse(recipe_text(name)).items():
        for key, value in table.items():
            if value != getattr(getattr(defaults, section), key):
                reasons[f"{section}.{key}"] = table.item(key).trivia.comment
    assert [setting for setting, reason in reasons.items() if not reason] == []


@pytest.mark.parametrize("subject", ["style", "character", "object"])
def test_recipes_for_models_that_predict_v_keep_the_last_time_step_and_differ_in_nothing_else(subject: str):
    """Where noise ends in zero SNR, min-snr gives the last time-step no weight at all."""
    of_v, of_epsilon = read_recipe(f"{subject}-sdxl-v"), read_recipe(f"{subject}-sdxl")
    assert of_v.pop("objective") == {"prediction": "v_prediction", "weighting": "none"}
    assert of_v["sample"].pop("guidance") < of_epsilon["sample"].pop("guidance")
    assert of_v == of_epsilon


@pytest.mark.parametrize("name", ["style-sd2", *SUBJECTS])
def test_each_checkpoint_of_a_recipe_has_a_preview_and_there_are_ten(name: str):
    config = validate({"name": "x", "data": [{"path": "photos"}], "recipe": name})
    steps = config.budget.images / (config.budget.batch * config.budget.accumulate)
    assert config.save.every == config.sample.every == steps / 10
