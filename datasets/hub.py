"""A dataset of the Hugging Face Hub, or a local folder in one of its layouts, to a folder: `hf:owner/name`.

It is read row by row through Hugging Face's `datasets`, which knows the layouts; images stay as they are, to the byte.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..trainer.errors import DataError, first_line
from ..trainer.files import sha256_of, write_text
from .tables import Columns, Row, UnusableCell, choose_columns, library, write_rows
from .workers import Progress

COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_TIMEOUT = 10  # seconds
_LOGIN = "Check the name; for a private or gated dataset run: hf auth login"


@dataclass(frozen=True)
class HubDataset:
    """`owner/name` or a local folder, and what the person who named it wrote."""

    place: str
    written: str
    asked: Mapping[str, str]
    cache: Path
    """Which commit a name stood for is kept here, so that what was unpacked before is found without a connection."""

    def identity(self) -> list[Any]:
        asked = {key: self.asked[key] for key in ("config", "split", "image", "text") if key in self.asked}
        return ["hf", self.content if self.folder else [self.place, self.commit], asked]

    @property
    def folder(self) -> Path | None:
        """The local folder, if it is one."""
        path = Path(self.place).expanduser()
        return path.absolute() if path.is_dir() else None

    @property
    def content(self) -> str:
        """A hash of all names and bytes in the local folder."""
        assert self.folder
        digest = hashlib.sha256()
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                digest.update(os.fsencode(name.as_posix()) + b"\0" + sha256_of(file).encode() + b"\0")
        return digest.hexdigest()

    @cached_property
    def commit(self) -> str:
        """What the name and the revision stand for now; without a connection, what they stood for the last time.

        Raises:
            DataError: if there is no such dataset, or the Hub cannot be reached and never was for this one.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            HTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            commit = HfApi().dataset_info(self.place, revision=self.revision, timeout=_HUB_TIMEOUT).sha
        except HFValidationError as error:
            raise self._error("is neither a folder here nor a name on the Hub", "Write hf:owner/name.") from error
        except RepositoryNotFoundError as error:
            raise self._error("is not on the Hub, or not open to everyone", _LOGIN) from error
        except RevisionNotFoundError as error:
            raise self._error(f"has no revision {self.revision!r}", "Give a branch, a tag or a commit.") from error
        except HfHubHTTPError as error:
            raise self._error(f"is refused by the Hub: {first_line(error)}", _LOGIN) from error
        except (OSError, HTTPError) as error:
            if self.commit_before:
                return self.commit_before
            what = "is no folder here, was never unpacked here, and the Hugging Face Hub cannot be reached"
            raise self._error(what, "Check the name and the connection, or give a folder.") from error
        assert commit
        write_text(self._known, commit)
        return commit

    @property
    def commit_before(self) -> str:
        """What they stood for the last time, as it was noted; empty if they were never looked up here."""
        if COMMIT.fullmatch(self.revision):
            return self.revision
        return self._known.read_text(encoding="utf-8") if self._known.is_file() else ""

    @property
    def revision(self) -> str:
        return self.asked.get("revision", "main")

    @property
    def _known(self) -> Path:
        name = hashlib.sha256(f"{self.place}@{self.revision}".encode()).hexdigest()[:32]
        return self.cache / "commits" / name

    def write(self, folder: Path, progress: Progress) -> None:
        """Write its images and captions into an empty folder.

        Raises:
            DataError: if it cannot be reached or read, split or columns cannot be told, or rows cannot be used.
        """
        split, table = self._table(library("datasets", self.written))
        if table.features is None:  # of CSV and JSON
            raise self._error("does not say what its columns hold, so none holds images", "Give another dataset.")
        columns = choose_columns(table.features.arrow_schema, self.asked, self.written)
        table = table.decode(False).select_columns(columns.names)  # in this order: what is selected decodes already
        sizes = table.info.splits or {}
        total = sizes[split].num_examples if split in sizes else 0
        write_rows(self._rows(table, columns), columns, folder, self.written, total, progress)

    def _table(self, hugging_face: Any) -> tuple[str, Any]:
        """The name of the split that was asked for, or of the only one, and the split."""
        try:
            splits = self._splits(hugging_face)
        except _errors() as error:
            raise self._error(f"cannot be loaded ({_in_a_line(error)})", "Look at it on the Hub.") from error
        split = self.asked.get("split") or (next(iter(splits)) if len(splits) == 1 else "")
        if split not in splits:
            what = f"has no split {split!r}" if split else f"has {len(splits)} splits"
            raise self._error(what, f"Put ?split=NAME after the path; here are: {', '.join(splits)}.")
        return split, splits[split]

    def _splits(self, hugging_face: Any) -> Mapping[str, Any]:
        if self.folder and any((self.folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            saved = hugging_face.load_from_disk(str(self.folder))
            splits = saved if isinstance(saved, Mapping) else {str(saved.split or "all"): saved}
            return {split: table.to_iterable_dataset() for split, table in splits.items()}
        return hugging_face.load_dataset(
            str(self.folder or self.place),
            self.asked.get("config"),
            revision=None if self.folder else self.commit,
            streaming=True,
            cache_dir=str(self.cache / "hf"),  # of locks only, since nothing is prepared
        )

    def _rows(self, table: Any, columns: Columns) -> Iterator[Row]:
        number = 0
        try:
            for number, row in enumerate(table):
                image, text = row[columns.image], row[columns.text] if columns.text else None
                yield Row(f"{self.written} row {number}", self._with_bytes(image), text)
        except _errors() as error:
            what = f"cannot be read near row {number} ({_in_a_line(error)})"
            raise self._error(what, "Check the connection, and start again.") from error

    def _with_bytes(self, image: Any) -> Any:
        """An image of which only the path is given, as in folders of images, is read; from this dataset alone."""
        if not isinstance(image, Mapping) or image.get("bytes") or not image.get("path"):
            return image
        path = str(image["path"])
        if not self._is_inside(path):
            return UnusableCell(f"is only a path, {path!r}, that leads out of the dataset")
        try:
            with library("fsspec").open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return UnusableCell(f"is only a path, {path!r}, where nothing is")

    def _is_inside(self, path: str) -> bool:
        """Whether a path such as `/folder/a.png` or `zip://a.png::/folder/images.zip` is of this dataset.

        What opens it takes addresses of any kind, and a table may hold any path.
        """
        inner, _, container = path.rpartition("::")
        if inner and (not inner.startswith("zip://") or "::" in inner):
            return False
        if not self.folder:
            return container.startswith(f"hf://datasets/{self.place}@{self.commit}/") and ".." not in container
        file = Path(container)
        return "://" not in container and file.is_absolute() and file.resolve().is_relative_to(self.folder.resolve())

    def _error(self, what: str, fix: str) -> DataError:
        return DataError(what, self.written, fix)


def _errors() -> tuple[type[Exception], ...]:
    """What Hugging Face's `datasets` and the libraries below it raise for data they cannot reach or read."""
    from huggingface_hub.errors import HTTPError

    hugging_face, arrow = library("datasets"), library("pyarrow")
    return (
        *(hugging_face.exceptions.DatasetsError, arrow.ArrowException, HTTPError),
        *(OSError, ValueError, TypeError, LookupError, RuntimeError, NotImplementedError, ImportError),
    )


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
