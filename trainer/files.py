"""Files that are whole or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

import psutil

T = TypeVar("T")

_WAITS_FOR_READERS = (0.01, 0.04, 0.15, 0.3, 0.5)  # seconds


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block succeeds."""
    make_folder(path.parent)
    with _unfinished(_temporary(path)) as temporary:
        yield temporary
        _finish(temporary)
        rename(temporary.replace, path)


@contextmanager
def quick_file(path: Path) -> Iterator[Path]:
    """Likewise, but without waiting for the disk: a power cut may leave the file empty, torn or absent. For files that
    hold a checksum and can be made anew, and of which thousands are written in a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(_temporary(path)) as temporary:
        yield temporary
        patiently(lambda: temporary.replace(path))


@contextmanager
def until_verified(target: Path) -> Iterator[Path]:
    """Yield the name that a LoRA file or model has until it was found to be what was meant; it gets the target's when
    the block succeeds, and is gone if not."""
    with _unfinished(target.with_name(f"{target.stem}.{_mark()}.unverified.safetensors")) as unverified:
        yield unverified
        rename(unverified.replace, target)


@contextmanager
def atomic_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `path` when the block succeeds.

    Raises:
        OSError: if `path` is there by then, with anything in it, and is not to be replaced.
    """
    make_folder(path.parent)
    with _unfinished(_temporary(path)) as temporary:
        temporary.mkdir()
        yield temporary
        for inner in temporary.rglob("*"):
            if inner.is_dir():
                flush_folder(inner)
            elif inner.is_file():
                _finish(inner)
        flush_folder(temporary)
        with _unfinished(_temporary(path)) as earlier:
            if replace and path.is_dir():
                rename(path.rename, earlier)
            rename(temporary.rename, path)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there; at no moment a part of it is left under its name."""
    with _unfinished(_temporary(path)) as going, suppress(FileNotFoundError):
        rename(path.rename, going)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there, so that a power cut takes none of them away again."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush_folder(path.parent)


def _finish(file: Path) -> None:
    """On disk, and with the permissions of any new file: safetensors lets nobody but its writer read what it writes."""
    file.chmod(0o666 & ~_UMASK)
    flush_to_disk(file)


_UMASK = os.umask(0)  # it can be read only by setting it
os.umask(_UMASK)


# ---------------------------------------------------------------------------------------------------------------------
# what a process left that died

_MARK = r"\.(\d{1,9})-[0-9a-f]{8}\."
_TEMPORARY = re.compile(rf"\..+{_MARK}tmp|.+{_MARK}unverified\.safetensors")
_UNFINISHED: set[str] = set()
"""The names that this process has not finished with."""


def remove_leftovers(folder: Path, below: bool = False) -> None:
    """Remove what processes of this computer that live no more had not finished in a folder, and in those `below` it.

    On a drive that several computers share, what another one writes at this very moment is taken for such too; it then
    fails there, and nothing that was finished is lost.
    """
    for parent, folders, files in os.walk(folder):
        left = [name for name in (*folders, *files) if _is_left(name)]
        for name in left:
            _remove(Path(parent, name))
        folders[:] = set(folders) - set(left) if below else ()


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Whatever has this name at the end of the block is removed."""
    _UNFINISHED.add(path.name)
    try:
        yield path
    finally:
        _remove(path)
        _UNFINISHED.discard(path.name)


def _temporary(path: Path) -> Path:
    """A name in the same folder that no other process or thread has."""
    return path.with_name(f".{path.name}.{_mark()}.tmp")


def _mark() -> str:
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _is_left(name: str) -> bool:
    """Whether a name is that of something unfinished, and nobody works on it any more. In a container a process often
    has the number of the one before it."""
    found = _TEMPORARY.fullmatch(name)
    if not found or name in _UNFINISHED:
        return False
    pid = int(found[1] or found[2])
    return pid == os.getpid() or not psutil.pid_exists(pid)


def _remove(path: Path) -> None:
    with suppress(OSError):  # it may be gone already; what stays is removed another time
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def writable(path: Path) -> str:
    """Why no file can be created in a folder, which need not be there yet; empty if one can.

    It tries: what `os.access` says does not hold for root, for network drives, and on Windows.
    """
    try:
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    except OSError as error:  # a name too long, or a folder that may not be looked into
        return f"{path} cannot be written ({error.strerror})"
    if not there.is_dir():
        return f"{there} is a file, not a folder"
    attempt = _temporary(there / "attempt")
    try:
        attempt.touch(exist_ok=False)
        attempt.unlink()
    except OSError as error:
        return f"{there} cannot be written ({error.strerror})"
    return ""


def user_cache() -> Path:
    """Where latents and text embeddings are kept if no other folder was named."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("lorasmith", appauthor=False))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within the block no other process is in a block on the same file.

    The lock ends with its process, however that ends. A file system without locks, as some network drives are, lets
    every process in.
    """
    with path.open("ab") as file:
        with suppress(OSError):
            _lock(file)
        yield


def _lock(file: IO[bytes]) -> None:
    """Wait for the file's lock, which closing the file gives back."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                return
            except OSError as error:
                if error.errno != errno.EDEADLK:  # it gives up after ten seconds
                    raise
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


def rename(move: Callable[[Path], Path], path: Path) -> None:
    """Let something be `path` from now on, also after a power cut. Windows moves nothing that another process has open;
    those who read here are quick, so wait for them."""
    patiently(lambda: move(path))
    flush_folder(path.parent)


def remove(file: Path) -> bool:
    """Remove a file, waiting likewise; whether it was there."""
    try:
        patiently(file.unlink)
    except FileNotFoundError:
        return False
    return True


def patiently(act: Callable[[], T]) -> T:
    """What `act` returns; on Windows it may have to wait for others who have the file open."""
    for seconds in _WAITS_FOR_READERS if sys.platform == "win32" else ():
        with suppress(PermissionError):
            return act()
        time.sleep(seconds)
    return act()


def flush_to_disk(path: Path) -> None:
    """Ask the operating system to put the file's bytes on the disk (Windows needs a writable handle)."""
    with path.open("r+b") as handle:
        os.fsync(handle.fileno())


def flush_folder(path: Path) -> None:
    """Ask the operating system to put the names of a folder's files on the disk.

    Windows cannot be asked, and some file systems refuse: they keep names in their own way.
    """
    if sys.platform == "win32":
        return
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
