"""Files that are whole or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_WAITS_FOR_READERS = (0.01, 0.04, 0.15, 0.3, 0.5)  # seconds


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _finish(temporary)
        rename(temporary.replace, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def until_verified(target: Path) -> Iterator[Path]:
    """Yield the name that a LoRA file or model has until it was found to be what was meant; it gets the target's when
    the block succeeds, and is gone if not."""
    unverified = target.with_name(f"{target.stem}.unverified.safetensors")
    try:
        yield unverified
        rename(unverified.replace, target)
    finally:
        unverified.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `path` when the block succeeds.

    Raises:
        OSError: if `path` is there by then, with anything in it, and is not to be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _finish(file)
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        rename(temporary.rename, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(file: Path) -> None:
    """On disk, and with the permissions of any new file: safetensors lets nobody but its writer read what it writes."""
    file.chmod(0o666 & ~_UMASK)
    flush_to_disk(file)


_UMASK = os.umask(0)  # it can be read only by setting it
os.umask(_UMASK)


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
    attempt = there / f".{uuid.uuid4().hex}.tmp"
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
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


def rename(move: Callable[[Path], Path], path: Path) -> None:
    """Windows moves nothing that another process has open; those who read here are quick, so wait for them."""
    for seconds in _WAITS_FOR_READERS if sys.platform == "win32" else ():
        with suppress(PermissionError):
            move(path)
            return
        time.sleep(seconds)
    move(path)


def flush_to_disk(path: Path) -> None:
    """Ask the operating system to put the file's bytes on the disk (Windows needs a writable handle)."""
    with path.open("r+b") as handle:
        os.fsync(handle.fileno())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
