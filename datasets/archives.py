"""A zip file to a folder: every entry is looked at before the first is written, and none can land anywhere else.

An archive may come from anybody. What is refused stands in `_of_the_whole` and in `_Entry`; all of it is told at once.
"""

from __future__ import annotations

import io
import re
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..trainer.errors import DataError, LorasmithError, Problem, first_line
from ..trainer.files import sha256_of
from .images import IMAGE_SUFFIXES
from .workers import Progress

MOST_ENTRIES = 100_000
LARGEST_LIST = 24 * 2**20
"""Bytes of the list at an archive's end; an entry has 46, its name, and some that its program adds."""
MOST_BYTES = 20 * 2**30
MOST_RATIO = 200
"""Text and flat graphics are packed a hundredfold at the most; bombs a thousandfold."""
RATIO_COUNTS_FROM = 16 * 2**20
"""Bytes. A small entry may be as well packed as it likes; it does no harm."""
MOST_TOLD = 100

_MISTRUST = "Trust it in nothing; if the images are yours, pack their folder again."
_PACK_AGAIN = "Pack its folder again, as an ordinary zip file."
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(ValueError, OverflowError, IndexError, NotImplementedError, RuntimeError, MemoryError),  # by damaged headers
)
_METHODS_READ = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_OTHER_METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstandard", 98: "ppmd"}
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_ARCHIVES = {".zip", ".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".cbz", ".cbr", ".parquet"}
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*\x00-\x1f]')
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE)
_DEEPEST = 50
_LONGEST_NAME = 255  # bytes, on Linux; characters, on Windows and macOS


@dataclass(frozen=True)
class Archive:
    """A zip file, and what the person who named it wrote."""

    path: Path
    written: str

    def identity(self) -> list[str]:
        return ["zip", sha256_of(self.path)]

    def write(self, folder: Path, progress: Progress) -> None:
        """Extract it into an empty folder.

        Raises:
            DataError: with every entry that is damaged or refused.
        """
        with _Bounded(self.path.open("rb", buffering=0)) as file:
            try:
                archive = zipfile.ZipFile(file)
            except _DAMAGE as error:
                raise self._unreadable(error) from error
            entries = [_Entry(info) for info in archive.infolist()]
            problems = [*self._of_the_whole(entries), *self._of_entries(entries)]
            if problems:
                raise _told(problems, self.written)
            wanted = [entry for entry in entries if not entry.is_folder and not entry.is_left_out]
            problems += self._room(wanted, folder)
            problems = problems or list(self._extract(archive, wanted, folder, progress))
            if problems:
                raise _told(problems, self.written)

    def _unreadable(self, error: BaseException) -> DataError:
        with self.path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        if not is_zip:
            return DataError("is not a zip file, whatever its name says", self.written, "Give a zip file or a folder.")
        what = f"is cut off or damaged ({first_line(error)})"
        return DataError(what, self.written, "Download or copy it again.")

    # -- what is wrong with all of it ---------------------------------------------------------------------------------

    def _of_the_whole(self, entries: Sequence[_Entry]) -> Iterator[Problem]:
        if len(entries) > MOST_ENTRIES:
            yield self._problem(f"has {len(entries)} entries; {MOST_ENTRIES} is the most", "Unpack it to a folder.")
        if (size := sum(entry.info.file_size for entry in entries)) > MOST_BYTES:
            what = f"would be {_gib(size)} when unpacked; {_gib(MOST_BYTES)} is the most"
            yield self._problem(what, "If the images are yours, unpack it to a folder.")
        if sum(entry.info.compress_size for entry in entries) > self.path.stat().st_size:
            yield self._problem("has entries that lie on top of one another, as only a zip bomb has", _MISTRUST)
        if encrypted := [entry for entry in entries if entry.info.flag_bits & _ENCRYPTED]:
            what = f"is encrypted ({len(encrypted)} of its {len(entries)} entries)"
            yield self._problem(what, "Unpack it to a folder, with its password.")
        suffixes = Counter(entry.path.suffix.lower() for entry in entries if not entry.is_left_out)
        if not any(suffix in IMAGE_SUFFIXES for suffix in suffixes):
            seen = ", ".join(f"{count} x {suffix or 'no suffix'}" for suffix, count in suffixes.most_common(5))
            yield self._problem(
                f"holds no images ({seen or 'it is empty'})", f"Known are {', '.join(sorted(IMAGE_SUFFIXES))}."
            )

    def _room(self, entries: Sequence[_Entry], folder: Path) -> Iterator[Problem]:
        needed, free = sum(entry.info.file_size for entry in entries), shutil.disk_usage(folder).free
        if needed > free:
            what = f"needs {_gib(needed)} when unpacked, and {folder.parent} has {_gib(free)}"
            yield self._problem(what, "Make room, or set runtime.cache to another disk.")

    # -- what is wrong with single entries ----------------------------------------------------------------------------

    def _of_entries(self, entries: Sequence[_Entry]) -> Iterator[Problem]:
        names = _Names()
        for entry in entries:
            flaws = list(entry.harm())
            if not flaws and not entry.is_left_out:
                flaws = list(entry.flaws()) or list(names.collisions(entry))
            for what, fix in flaws:
                yield self._problem(what, fix, entry)

    def _extract(
        self, archive: zipfile.ZipFile, entries: Sequence[_Entry], folder: Path, progress: Progress
    ) -> Iterator[Problem]:
        """Write the entries; yield a problem for each that is damaged, after which the folder is of no use."""
        for done, entry in enumerate(entries):
            progress(done, len(entries))
            target = folder.joinpath(*entry.path.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                try:
                    for block in _blocks(archive, entry.info):
                        file.write(block)
                except zipfile.BadZipFile as error:
                    yield self._problem(
                        f"is damaged ({first_line(error)})", "Download or copy the archive again.", entry
                    )
        progress(len(entries), len(entries))

    def _problem(self, what: str, fix: str, entry: _Entry | None = None) -> Problem:
        where = f"{self.written} entry {entry.info.orig_filename!r}" if entry else self.written
        return Problem(where, what, fix)


class _Bounded(io.BufferedReader):
    """An archive's file. zipfile reads the list of all entries in one piece, and makes of it many times its size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST_LIST:
            raise zipfile.BadZipFile(f"the list of its entries has {size:,} bytes; {LARGEST_LIST:,} is the most")
        return super().read(size)


class _Entry:
    """One entry of an archive: where it would lie below the folder, and what speaks against it."""

    def __init__(self, info: zipfile.ZipInfo) -> None:
        self.info = info
        self.written = info.orig_filename.replace("\\", "/")  # as some programs on Windows write it
        self.path = PurePosixPath(self.written)
        self.is_folder = self.written.endswith("/")

    @property
    def is_left_out(self) -> bool:
        """Hidden, or left behind by a system: the same files that `folder.py` passes over."""
        *folders, name = self.path.parts or ("",)
        outer = [*folders, name] if self.is_folder else folders
        return (
            any(folder.startswith((".", "@")) or folder == "__MACOSX" for folder in outer)
            or name.startswith(".")
            or name == "Thumbs.db"
        )

    def harm(self) -> Iterator[tuple[str, str]]:
        """What no archive of images has: paths that lead out of the folder."""
        if self.written.startswith("/") or re.match("[A-Za-z]:", self.written):
            yield "has an absolute path", _MISTRUST
        if ".." in self.path.parts:
            yield "leads out of the folder it is unpacked to", _MISTRUST

    def flaws(self) -> Iterator[tuple[str, str]]:
        """What cannot be unpacked as it is, on this system or on another."""
        yield from self._flaws_of_the_name()
        kind = stat.S_IFMT(self.info.external_attr >> 16)
        if kind == stat.S_IFLNK:
            yield "is a link, which may lead anywhere", "Pack the file itself in its place."
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            yield "is no ordinary file, but a device or the like", _MISTRUST
        if self.info.compress_type not in _METHODS_READ:
            method = _OTHER_METHODS.get(self.info.compress_type, f"method {self.info.compress_type}")
            yield f"is packed by {method}, which is not read here", _PACK_AGAIN
        if not self.is_folder and self.path.suffix.lower() in _ARCHIVES:
            yield "is itself an archive, which would be ignored", "Unpack it first, and pack what is in it."
        if self.info.file_size > max(RATIO_COUNTS_FROM, MOST_RATIO * self.info.compress_size):
            ratio = self.info.file_size // max(self.info.compress_size, 1)
            yield f"is packed {ratio} times smaller than it is, as only a zip bomb is", _MISTRUST

    def _flaws_of_the_name(self) -> Iterator[tuple[str, str]]:
        rename = "Rename it, and pack its folder again."
        if not self.path.parts:
            yield "has no name", _PACK_AGAIN
        if len(self.path.parts) > _DEEPEST:
            yield f"lies {len(self.path.parts) - 1} folders deep; {_DEEPEST} is the most", _PACK_AGAIN
        for part in self.path.parts:
            if bad := _NOT_ON_WINDOWS.search(part):
                yield f"has {bad[0]!r} in its name, which Windows cannot hold", rename
            if part.endswith((".", " ")):
                yield f"has a name, {part!r}, that ends as no name does on Windows", rename
            if _DEVICES.fullmatch(part):
                yield f"has a name, {part!r}, that means a device on Windows", rename
            if len(part.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
                yield f"has a name of more than {_LONGEST_NAME} bytes, which no disk holds", rename


class _Names:
    """The names seen so far, as a disk sees them that tells neither upper from lower case nor é from e and accent."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.folders: dict[str, str] = {}

    def collisions(self, entry: _Entry) -> Iterator[tuple[str, str]]:
        """The earlier entry whose place this one would take."""
        folders = [entry.path, *entry.path.parents] if entry.is_folder else list(entry.path.parents)
        for folder in folders[:-1]:  # the last is the top
            self.folders.setdefault(_key(folder), entry.info.orig_filename)
        taken = [self.files.get(_key(folder)) for folder in folders]
        if not entry.is_folder:
            taken += [self.files.get(_key(entry.path)), self.folders.get(_key(entry.path))]
            self.files.setdefault(_key(entry.path), entry.info.orig_filename)
        for other in filter(None, taken):
            yield f"has the place of {other!r} on a disk that does not tell case", "Rename one of the two."


def _key(path: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", str(path)).casefold()


def _blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """An entry's bytes, counted, since its header may lie; the checksum is compared after the last.

    Raises:
        BadZipFile: whatever is wrong with it.
    """
    size = 0
    try:
        with archive.open(info) as packed:
            while block := packed.read(1 << 20):
                size += len(block)
                if size > info.file_size:
                    break
                yield block
    except _DAMAGE as error:
        raise zipfile.BadZipFile(first_line(error)) from error
    if size != info.file_size:
        raise zipfile.BadZipFile(f"it has not the {info.file_size} bytes that its header says")


def _told(problems: Sequence[Problem], written: str) -> LorasmithError:
    told, more = list(problems[:MOST_TOLD]), len(problems) - MOST_TOLD
    if more > 0:
        told.append(Problem(written, f"has {more} more problems of these kinds", "Mend these first."))
    return DataError.of(told)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
