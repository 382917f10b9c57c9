"""A bundle to share: one zip with the files of an export, pictures, a model card, the configuration, and a license.

It is the folder of a repository on the Hub (`hub.py` uploads it as it is), and the same files give the same bytes.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ..bases import BaseInfo
from ..config import RunConfig
from ..configfile import to_toml
from ..files import atomic_file, sha256_of
from ..lorafile import LoraFile
from .card import NO_PROMPT, model_card, prompt_of
from .facts import HUB_ID, Facts, base_name, last_part
from .licenses import license_note
from .pictures import png, preview_text
from .usage import is_whole_model

CARD, CONFIG, LICENSE, CHECKSUMS = "README.md", "config.toml", "LICENSE.md", "SHA256SUMS"
_PICTURES = "images"
_BEGINNING = (1980, 1, 1, 0, 0, 0)
"""The time of every entry: the earliest that a zip knows, so that it says nothing of when it was made."""


def bundle(files: Sequence[Path], facts: Facts, info: BaseInfo, target: Path) -> Path:
    """Write the zip, whole or not at all, of exported files, and return its path.

    The first of `files` is the one that clients read; the others lie in the same folder or in one below it. Their own
    card, `<name>.md`, gives way to the README.
    """
    first, folder = files[0], files[0].parent
    card = folder / f"{first.name.removesuffix('.safetensors')}.md"
    inside = {
        file.relative_to(folder).as_posix(): file
        for path in files
        if path != card
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file()
    }
    return write_zip(target, {**inside, **dict(_made(first, inside, facts, info))})


def write_zip(target: Path, contents: Mapping[str, Path | bytes]) -> Path:
    """A zip of files and of bytes by their names in it, the README first, then by name.

    It has the checksums of all but the README, which may be edited before it is shared.
    """
    names = sorted(contents.keys() - {CARD})
    sums = "".join(f"{_digest(contents[name])}  {name}\n" for name in names)
    with atomic_file(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        entries: dict[str, Path | bytes] = {**contents, CHECKSUMS: sums.encode()}
        for name in sorted(entries, key=lambda name: (name != CARD, name)):
            entry, content = zipfile.ZipInfo(_safe(name), _BEGINNING), entries[name]
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same on every system
            if isinstance(content, bytes):
                archive.writestr(entry, content)
                continue
            entry.file_size = content.stat().st_size
            with content.open("rb") as source, archive.open(entry, "w") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    return target


def _safe(name: str) -> str:
    """A name that stays below the folder where the zip is unpacked, on every system."""
    parts = PurePosixPath(name).parts
    assert not {"/", ".."} & set(parts), name
    assert not re.search(r"[\\:]", name), name
    return name


def _digest(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)


# ---------------------------------------------------------------------------------------------------------------------
# what is made for it


def _made(first: Path, inside: Mapping[str, Path], facts: Facts, info: BaseInfo) -> Iterator[tuple[str, bytes]]:
    autov3 = "" if is_whole_model(facts) else LoraFile.open(first).hashes.autov3
    thumbnail = f"{first.name.removesuffix('.safetensors')}.png"
    is_beside = thumbnail in inside and not facts.pictured
    pictures = {thumbnail: facts.picture_prompt or NO_PROMPT} if is_beside else {}
    for preview in sorted(facts.previews, key=lambda preview: preview is not facts.pictured):  # the Hub shows the first
        name = f"{_PICTURES}/{preview.number:02d}.png"
        pictures[name] = prompt_of(facts, preview)
        yield name, png(preview.picture, preview_text(facts, [preview], autov3))
    grid = f"{facts.name}-grid.png"
    card = model_card(facts, info, first.name, pictures, grid if grid in inside else "")
    yield CARD, card.encode()
    if facts.config and facts.tells_training:
        yield CONFIG, shared_config(facts).encode()
    if note := license_note(facts, info, base_name(info)):
        yield LICENSE, note.encode()


def shared_config(facts: Facts) -> str:
    """The TOML of the configuration that gives the same again, once `data.path` is filled in.

    Without paths of this computer, unless all is to be told: what is named by a path is named by its last part, and
    prompts that must not be told are left out; where none is left, captions are taken, as the default has it.
    """
    assert facts.config is not None
    if facts.tells_all:
        return to_toml(facts.config, comments=False)
    return _FILL_IN + to_toml(without_paths(facts.config, facts), comments=False)


_FILL_IN = """\
# What this was trained with. Fill in data.path, and what base and adapter name by a file, with places on your computer.
"""


def _model(name: str) -> str:
    """A base or VAE: a name that means the same anywhere stays."""
    means_the_same = not name or name.startswith("random:") or HUB_ID.fullmatch(name)
    return name if means_the_same else last_part(name, "base")


def without_paths(config: RunConfig, facts: Facts) -> RunConfig:
    """A copy that names nothing of this computer."""
    shared = config.model_copy(deep=True)
    defaults = RunConfig(name="x", data=shared.data[:1])
    shared.runs, shared.runtime.cache = defaults.runs, defaults.runtime.cache
    for data in shared.data:
        data.path = last_part(data.path)
    shared.base.model, shared.base.vae = map(_model, (shared.base.model, shared.base.vae))
    shared.base.merge = [last_part(file) for file in shared.base.merge]
    shared.adapter.start_from = last_part(shared.adapter.start_from) if shared.adapter.start_from else ""
    shared.preference.start = last_part(shared.preference.start) if shared.preference.start else ""
    shared.sample.prompts = list(filter(facts.told_prompt, shared.sample.prompts))
    return shared
