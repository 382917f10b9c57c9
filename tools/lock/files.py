"""The texts of requirements/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .pins import Pin

_MADE = "# Made by `make lock`: "
_NOTHING_ELSE = "--require-hashes\n--only-binary :all:\n"


def texts_of(
    project: Mapping[str, Any], pins: Iterable[Pin], over: Iterable[Pin], elsewhere: Iterable[Pin]
) -> dict[str, str]:
    """By name. `project` is what pyproject.toml says; `over` are pins that are newer than another package admits, and
    `elsewhere` builds that PyPI does not have."""
    pins = sorted(pins)
    run = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    dev, supply = project["project"]["optional-dependencies"]["dev"], project["dependency-groups"]["supply"]
    return {
        "hashes": f"{_MADE}each version of constraints.txt with all its files.\n" + _blocks(pins),
        "pip": f"{_MADE}the pip that reads the other files; older ones do not find the hashes.\n{_NOTHING_ELSE}"
        + _blocks(pin for pin in pins if pin.name == "pip"),
        "run": f"{_MADE}what runs Lorasmith and what builds it.\n{_NOTHING_ELSE}-c hashes.txt\n" + _lines(run),
        "dev": f"{_MADE}what its tests need as well.\n-r run.txt\n" + _lines(dev),
        "over": f"{_MADE}newer than another package admits; pyproject.toml says why.\n{_NOTHING_ELSE}" + _blocks(over),
        "cpu": f"{_MADE}PyTorch without CUDA, from tools/lock/elsewhere.txt.\n{_NOTHING_ELSE}" + _blocks(elsewhere),
        "supply": f"{_MADE}what `make lock` and `make audit` need.\n{_NOTHING_ELSE}-c hashes.txt\n" + _lines(supply),
    }


def _blocks(pins: Iterable[Pin]) -> str:
    return "".join(pin.block for pin in pins)


def _lines(requirements: Iterable[str]) -> str:
    return "".join(f"{requirement}\n" for requirement in sorted(requirements))
