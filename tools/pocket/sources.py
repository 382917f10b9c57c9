"""The pictures and words that the pocket base is made from: npm packages, fetched once and checked."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from lorasmith.trainer.encoder import to_tensor
from lorasmith.trainer.files import atomic_file

SIDE = 64
"""Pixels of the pocket base's pictures."""


@dataclass(frozen=True)
class Package:
    """One npm package at one version."""

    name: str
    version: str
    sha512: str
    """Base64, as the registry states it."""
    licence: str

    @property
    def file(self) -> str:
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"


NOTO = Package(
    "emoji-datasource-google",
    "16.0.0",
    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "pictures: Google's Noto Emoji, Apache License 2.0; names and numbers: MIT",
)
FLUENT = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    "Microsoft's Fluent Emoji, MIT",
)
KEYWORDS = Package(
    "emojilib",
    "4.0.2",
    "8sP3sfAi861cNaFFp7RmyKi4S26K34ZKy4si75ojUW627AIVBHhMSu2SFJo3YRoK66YWnbysIbOk/d48uEqtKQ==",
    "MIT",
)
PACKAGES = (NOTO, FLUENT, KEYWORDS)


@dataclass(frozen=True)
class Emoji:
    """One concept of Unicode, drawn by Noto."""

    name: str
    """Its Unicode name, lower case."""
    short_name: str
    """What chat programs call it, with spaces: `car` for `automobile`."""
    keywords: tuple[str, ...]
    category: str
    subcategory: str
    file: str
    """The picture's file name, the same in every package."""
    since: float
    """The emoji version that brought it; the oldest are the commonest."""
    order: int


class Sources:
    """The unpacked packages in one folder; what is not there yet is fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for package in PACKAGES:
            _fetch(package, folder)
        self._noto, self._fluent = _archive(folder, NOTO), _archive(folder, FLUENT)

    def emoji(self) -> list[Emoji]:
        """All concepts with a name and a Noto picture, apart from flags and skin tones, in Unicode's order."""
        words = json.loads(_archive(self.folder, KEYWORDS)["package/dist/emoji-en-US.json"])
        rows = json.loads(self._noto["package/emoji.json"])
        found = [
            Emoji(
                name=row["name"].lower(),
                short_name=row["short_name"].replace("_", " ").replace("-", " "),
                keywords=tuple(word.replace("_", " ") for word in words.get(_character(row["unified"]), [])[1:]),
                category=row["category"],
                subcategory=row["subcategory"],
                file=row["image"],
                since=float(row["added_in"] or 99),
                order=row["sort_order"],
            )
            for row in rows
            if row["name"] and row["category"] not in ("Flags", "Component") and _noto_file(row["image"]) in self._noto
        ]
        return sorted(found, key=lambda emoji: emoji.order)

    def noto(self, file: str) -> Image.Image:
        """A Noto picture on white, RGB, SIDE x SIDE."""
        return _on_white(self._noto[_noto_file(file)])

    def all_pictures(self) -> Tensor:
        """Noto's and Fluent's pictures of all concepts, (N, 3, SIDE, SIDE) in -1 to 1: what the VAE learns from."""
        files = [emoji.file for emoji in self.emoji()]
        fluent = (self._fluent.get(f"package/assets/{Path(file).stem}.webp") for file in files)
        pictures = [*map(self.noto, files), *(_on_white(data) for data in fluent if data)]
        return to_tensor(pictures)


def _noto_file(file: str) -> str:
    return f"package/img/google/{SIDE}/{file}"


def _character(unified: str) -> str:
    return "".join(chr(int(code, 16)) for code in unified.split("-"))


def _on_white(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def _fetch(package: Package, folder: Path) -> None:
    file = folder / package.file
    if not file.exists():
        registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org/").rstrip("/")
        url = f"{registry}/{package.name}/-/{package.file}"
        print(f"fetching {url}")
        with urllib.request.urlopen(url, timeout=60) as reply, atomic_file(file) as temporary:
            temporary.write_bytes(reply.read())
    found = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise SystemExit(f"{file}: is not {package.name} {package.version} (its SHA-512 differs). Remove it and retry.")


def _archive(folder: Path, package: Package) -> dict[str, bytes]:
    """The package's files by their path, pictures of other sizes left out."""
    with tarfile.open(folder / package.file) as archive:
        return {member.name: _read(archive, member) for member in _wanted(archive)}


def _wanted(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        path = member.name
        if member.isfile() and (f"/img/google/{SIDE}/" in path or path.endswith((".json", ".webp"))):
            yield member


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    assert content is not None
    return content.read()
