"""Which version of what, on which systems, and the hashes of its files: as in constraints.txt and requirements/."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


@dataclass(frozen=True, order=True)
class Pin:
    """One version of a package."""

    name: str
    version: str
    marker: str = ""
    """On which systems it is needed; empty: on all."""
    hashes: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        return f"{self.name}=={self.version}" + (f" ; {self.marker}" if self.marker else "")

    @property
    def block(self) -> str:
        return " \\\n".join([self.line, *(f"    --hash=sha256:{digest}" for digest in self.hashes)]) + "\n"


def pins_of(text: str) -> list[Pin]:
    """The pins of a file as pip reads it."""
    lines = text.replace("\\\n", " ").splitlines()
    return [_pin(line) for line in lines if line.strip() and not line.startswith(("#", "-"))]


def _pin(line: str) -> Pin:
    told, *hashes = line.split("--hash=sha256:")
    requirement = Requirement(told)
    [specifier] = requirement.specifier
    assert specifier.operator == "==", f"{line} is no pin"
    marker = str(requirement.marker or "")
    return Pin(canonicalize_name(requirement.name), specifier.version, marker, tuple(map(str.strip, hashes)))


def merged(pins: Iterable[Pin]) -> list[Pin]:
    """One pin of each version, with the hashes of all."""
    by_line: dict[str, Pin] = {}
    for pin in pins:
        known = by_line.get(pin.line, replace(pin, hashes=()))
        by_line[pin.line] = replace(known, hashes=(*known.hashes, *pin.hashes))
    return list(by_line.values())


def with_further(pins: Iterable[Pin], further: Iterable[Pin]) -> list[Pin]:
    """The same, with the hashes of further builds of them, such as 2.13.0+cpu of 2.13.0.

    Raises:
        ValueError: if there are further builds of a version that is not pinned.
    """
    left = {(pin.name, Version(pin.version).public): pin.hashes for pin in further}
    complete = [replace(pin, hashes=(*pin.hashes, *left.pop((pin.name, pin.version), ()))) for pin in pins]
    if left:
        stale = ", ".join(f"{name}=={version}" for name, version in left)
        raise ValueError(
            f"{stale} is not pinned any more: write the new version's files into tools/lock/elsewhere.txt."
        )
    return complete


def require_same(written: Iterable[Pin], needed: Iterable[Pin]) -> None:
    """
    Raises:
        ValueError: naming what is needed and not written in constraints.txt, and what is written there in vain.
    """
    have, need = ({f"{pin.name}=={pin.version}" for pin in pins} for pins in (written, needed))
    if have != need:
        missing, spare = ", ".join(sorted(need - have)) or "nothing", ", ".join(sorted(have - need)) or "nothing"
        raise ValueError(f"constraints.txt lacks {missing}, and has in vain {spare}.")
