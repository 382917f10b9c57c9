"""requirements/ is in step with constraints.txt and pyproject.toml, and whatever is installed here has a hash there."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "requirements").is_dir(), reason="the source tree is not here")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins(name: str) -> list[Any]:
    from tools.lock.pins import pins_of

    return pins_of(text_of(name))


def project() -> dict[str, Any]:
    return tomlkit.parse(text_of("pyproject.toml")).unwrap()


def asked_for() -> list[str]:
    table = project()
    extras = table["project"]["optional-dependencies"].values()
    return [
        *table["build-system"]["requires"],
        *table["project"]["dependencies"],
        *(requirement for extra in extras for requirement in extra),
        *table["dependency-groups"]["supply"],
    ]


def test_each_version_of_constraints_has_hashes_and_no_other_has():
    locked = pins("requirements/hashes.txt")
    assert {(pin.name, pin.version) for pin in locked} == {(pin.name, pin.version) for pin in pins("constraints.txt")}
    assert len({pin.name for pin in locked}) == len(locked)
    digests = [digest for pin in locked for digest in pin.hashes]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert [pin.line for pin in locked if not pin.hashes] == []


def test_what_pyproject_asks_for_is_pinned_within_its_range():
    pinned = {pin.name: pin.version for pin in pins("constraints.txt")}
    asked = [Requirement(requirement) for requirement in asked_for()]
    assert len(asked) > 40
    wrong = [str(one) for one in asked if not one.specifier.contains(pinned.get(canonicalize_name(one.name), ""))]
    assert wrong == []


def test_the_files_are_those_that_the_tool_makes():
    from tools.lock.files import texts_of
    from tools.lock.pins import merged

    locked, elsewhere = pins("requirements/hashes.txt"), merged(pins("tools/lock/elsewhere.txt"))
    texts = texts_of(project(), locked, pins("requirements/over.txt"), elsewhere)
    stale = [name for name, text in texts.items() if text_of(f"requirements/{name}.txt") != text]
    assert stale == [], "make them anew with: make lock"
    assert {digest for pin in elsewhere for digest in pin.hashes} < {digest for pin in locked for digest in pin.hashes}


def test_what_is_newer_than_another_package_admits_is_pinned_by_pyproject():
    over = pins("requirements/over.txt")
    assert [f"{pin.name}=={pin.version}" for pin in over] == project()["dependency-groups"]["over"]
    assert all(pin.hashes for pin in over)


def test_all_that_lorasmith_needs_on_this_computer_has_a_hash():
    """pip would stop at the first that has none; `make demo` would fail at users'."""
    locked = {pin.name for pin in pins("requirements/hashes.txt")}
    todo, seen = [("lorasmith", frozenset({"", "dev"}))], set()
    while todo:
        name, extras = todo.pop()
        seen.add((name, extras))
        todo += [needed for needed in needs(name, extras) if needed not in seen]
    reached = {name for name, _ in seen} - {"lorasmith"}
    assert {"torch", "gradio", "pytest"} <= reached
    assert reached - locked == set()


def needs(name: str, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    try:
        requirements = map(Requirement, distribution(name).requires or [])
    except PackageNotFoundError:  # of an extra that nothing here has asked for
        return []
    here = [{**default_environment(), "extra": extra} for extra in extras]
    return [
        (canonicalize_name(needed.name), frozenset({"", *needed.extras}))
        for needed in requirements
        if needed.marker is None or any(needed.marker.evaluate(environment) for environment in here)
    ]


def test_every_install_of_ours_is_by_hash():
    """From files that require hashes, or the project alone, with what is there."""
    for file in ("Makefile", ".ci/run", "tools/install.py"):
        for line in text_of(file).splitlines():
            if re.search(r"pip\b.*\binstall\b|^ +pip\(", line) and not line.startswith("def"):
                assert "-r" in line or "--no-build-isolation" in line or "*arguments" in line, f"{file}: {line}"
    for name in ("pip", "run", "over", "cpu", "supply"):
        assert "--require-hashes\n--only-binary :all:\n" in text_of(f"requirements/{name}.txt")
    assert text_of("requirements/dev.txt").splitlines()[1] == "-r run.txt"


def test_the_lock_says_what_is_missing_in_constraints_and_what_is_there_in_vain():
    from tools.lock.pins import Pin, require_same

    with pytest.raises(ValueError, match=r"lacks b==2, and has in vain c==3\."):
        require_same([Pin("a", "1"), Pin("c", "3")], [Pin("a", "1", "os_name == 'nt'"), Pin("b", "2")])


def test_files_that_pypi_does_not_have_must_be_of_a_version_that_is_pinned():
    from tools.lock.pins import Pin, merged, with_further

    assert merged([Pin("a", "1", hashes=("0",)), Pin("a", "1", hashes=("1",))]) == [Pin("a", "1", hashes=("0", "1"))]
    further = [Pin("torch", "1+cpu", hashes=("f" * 64,))]
    assert with_further([Pin("torch", "1", hashes=("0" * 64,))], further)[0].hashes == ("0" * 64, "f" * 64)
    with pytest.raises(ValueError, match="torch==1 is not pinned any more"):
        with_further([Pin("torch", "2")], further)
