"""SECURITY.md tells the truth: the files and tests it names are there, and nothing that is read is ever run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ["trainer", "ui", "datasets", "configs"]

pytestmark = pytest.mark.skipif(not (ROOT / "SECURITY.md").is_file(), reason="the source tree is not here")


def test_every_file_that_it_names_is_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    assert len(linked) > 15
    assert [file for file in linked if not (ROOT / file).exists()] == []


def test_every_test_that_it_names_is_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    missing = [
        (file, test)
        for file, test in named
        if not (ROOT / file).is_file() or (test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert missing == []


def test_its_limits_are_those_of_the_code():
    from PIL import Image

    from lorasmith.datasets.archives import MOST_BYTES, MOST_ENTRIES, MOST_RATIO
    from lorasmith.datasets.images import FORMATS
    from lorasmith.ui.server import LARGEST_UPLOAD

    assert (MOST_ENTRIES, MOST_BYTES, MOST_RATIO) == (100_000, 20 * 2**30, 200)
    assert len(FORMATS) == 7
    assert 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6 == 178
    assert LARGEST_UPLOAD == "2gb"


def calls(folder: str) -> Iterator[tuple[str, str, ast.Call]]:
    """Every call in the sources: where, of what, and the call."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


RUNS_WHAT_IT_READS = re.compile(
    r"(eval|exec|compile|__import__|os\.(system|popen|exec\w+|spawn\w+)|subprocess\.(getoutput|getstatusoutput))"
    r"|(pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)\.(load|loads|open|Unpickler)|yaml\.(load|unsafe_load)"
)


@pytest.mark.parametrize("folder", PRODUCT)
def test_nothing_that_is_read_is_ever_run(folder: str):
    """No pickle but by torch's reader of plain weights, no shell, no code of a model's repository."""
    bad = []
    for where, name, call in calls(folder):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if RUNS_WHAT_IT_READS.fullmatch(name) or given.get("shell", "False") != "False":
            bad.append(f"{where}: {name}")
        if name in ("torch.load", "np.load", "numpy.load") and given.get("weights_only") != "True":
            bad.append(f"{where}: {name}")
        if given.get("trust_remote_code", "False") != "False" or given.get("allow_pickle", "False") != "False":
            bad.append(f"{where}: {name}")
    assert bad == []
