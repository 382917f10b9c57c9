"""What is saved in a run folder, and whether it is whole."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tomlkit
from PIL import Image
from safetensors.numpy import load_file

from lorasmith.trainer.files import sha256_of
from lorasmith.trainer.jobs import RunFolder

_SAVED = re.compile(r"(checkpoints|samples)/step-\d+/|exports/")


@dataclass(frozen=True)
class Saved:
    """The checkpoints, previews and exports that were complete at a moment: the hash of each file."""

    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunFolder) -> Saved:
        return cls({name: sha256_of(run.path / name) for name in public(run) if _SAVED.match(name)})

    def lost(self, now: Saved, spoiled: tuple[str, ...] = ()) -> set[str]:
        """What is gone or damaged since, apart from what was spoiled on purpose."""
        changed = {name for name, digest in self.files.items() if now.files.get(name) != digest}
        return {thing(name) for name in changed if not name.startswith(spoiled)}

    def without_exports(self) -> Saved:
        """A file that is exported anew says of itself that it was made later."""
        return Saved({name: digest for name, digest in self.files.items() if not name.startswith("exports/")})


def damaged(run: RunFolder, spoiled: tuple[str, ...] = ()) -> dict[str, str]:
    """Files under public names that are not whole, each with what its reader says."""
    found = {}
    for name in public(run):
        try:
            _READERS.get(Path(name).suffix, Path.read_bytes)(run.path / name)
        except Exception as error:  # each reader has words of its own
            if not name.startswith(spoiled):
                found[name] = f"{type(error).__name__}: {error}"
    return found


def public(run: RunFolder) -> Iterator[str]:
    """The names of files that are not hidden, set aside or yet to be verified."""
    for file in sorted(run.path.rglob("*")) if run.path.is_dir() else []:
        name = file.relative_to(run.path).as_posix()
        is_private = any(part.startswith(".") or part.endswith(".set-aside") for part in name.split("/"))
        if file.is_file() and not is_private and ".unverified." not in name:
            yield name


def thing(name: str) -> str:
    """The checkpoint, the previews or the export that a file belongs to."""
    return "/".join(name.split("/")[:2])


def _look_at(file: Path) -> None:
    with Image.open(file) as picture:
        picture.load()


def _test(file: Path) -> None:
    """Also of torch's own format, which is a zip: each part has its checksum."""
    with zipfile.ZipFile(file) as archive:
        if broken := archive.testzip():
            raise ValueError(f"{broken} is damaged")


_READERS: Mapping[str, Callable[[Path], object]] = {
    ".safetensors": load_file,
    ".png": _look_at,
    ".webp": _look_at,
    ".zip": _test,
    ".pt": _test,
    ".json": lambda file: json.loads(file.read_text(encoding="utf-8")),
    ".toml": lambda file: tomlkit.parse(file.read_text(encoding="utf-8")),
}
