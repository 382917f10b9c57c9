"""Publishing on the Hugging Face Hub: a bundle becomes a repository, when a person says so and under their name.

The token comes from the caller, from the environment, or from `hf auth login`. It goes into the requests and nowhere
else: no file, no log, and no error holds it.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Problem, UserError, first_line
from ..files import sha256_of
from .bundle import CARD, CHECKSUMS
from .facts import HUB_ID

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LOG_IN = "Run: hf auth login; or set HF_TOKEN to a token that may write."
_MAKE_ONE = "Make one with: lorasmith export RUN --bundle"
_REFUSED = re.compile(r"\.rejected$|\.unverified\.|\.tmp$")
_PLACEHOLDERS = {".gitattributes", CARD}
"""What a repository holds that nothing was uploaded to yet."""


@dataclass(frozen=True)
class Published:
    """Where it is now."""

    url: str
    """Of the repository."""
    commit: str
    """Of the commit; the newest one if all files were there already."""
    files: tuple[str, ...]
    """Their names in the repository."""


def publish(
    source: Path, repo: str, private: bool = False, token: str | None = None, overwrite: bool = False
) -> Published:
    """Upload a bundle, a zip or the folder it was unpacked to, to `owner/name`, which is made if it is not there yet.

    A repository that holds something else than an earlier version of these files is left alone, unless `overwrite` is
    given; files of it that have other names stay in any case.

    Raises:
        UserError: if it is no whole bundle, if nobody is logged in, if the repository holds something else, or if the
            Hub cannot be reached or refuses.
    """
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"{repo!r} is no name of a repository", "--repo", "Give it as owner/name.")
    with _unpacked(source) as folder:
        names = _files_of(folder, source)
        token = _usable(token)
        return _told(lambda: _upload(folder, names, repo, private, token, overwrite), repo, token)


# ---------------------------------------------------------------------------------------------------------------------
# the bundle


@contextmanager
def _unpacked(source: Path) -> Iterator[Path]:
    """The folder of a bundle, within the block."""
    if source.is_dir():
        yield source
        return
    if not zipfile.is_zipfile(source):
        what = "is neither a folder nor a zip" if source.exists() else "no such file or folder"
        raise UserError(what, str(source), _MAKE_ONE)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(source) as archive:
                archive.extractall(folder)  # which leaves nothing outside of the folder
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"is no whole zip ({first_line(error)})", str(source), _MAKE_ONE) from error
        yield Path(folder)


def _files_of(folder: Path, source: Path) -> list[str]:
    """The names of what is uploaded: what the checksums name, and the card, which may have been edited.

    Raises:
        UserError: if something is missing, was changed, or was found to be no true export.
    """
    if not (folder / CARD).is_file() or not (folder / CHECKSUMS).is_file():
        raise UserError(f"has no {CARD} or no {CHECKSUMS}, so it is no bundle", str(source), _MAKE_ONE)
    problems: list[Problem] = []
    names = [CARD, CHECKSUMS]
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = (folder / name).resolve()
        if not file.is_relative_to(folder.resolve()) or not file.is_file():
            problems.append(Problem(name, f"is missing in {source}", _MAKE_ONE))
        elif _REFUSED.search(name):
            problems.append(Problem(name, "was not found to be what was trained", "Export it again."))
        elif sha256_of(file) != digest:
            problems.append(Problem(name, f"is not as it was exported: {CHECKSUMS} names another hash", _MAKE_ONE))
        names.append(name)
    aside = [path.name for path in folder.rglob("*") if _REFUSED.search(path.name)]
    problems += [Problem(name, "was set aside as no true export", "Remove it, or export again.") for name in aside]
    if problems:
        raise UserError.of(problems)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# the Hub


def _usable(token: str | None) -> str:
    """The token given, or that of this computer.

    Raises:
        UserError: if there is none, or if it cannot be one; it is not shown.
    """
    from huggingface_hub import get_token

    token = (token or get_token() or "").strip()
    if not token:
        raise UserError("nobody is logged in on this computer", "the Hub", _LOG_IN)
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("has letters that no token has", "the token", "Copy it again, from its page on the Hub.")
    return token


def _upload(folder: Path, names: Sequence[str], repo: str, private: bool, token: str, overwrite: bool) -> Published:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="lorasmith")
    _require_ours(api, repo, names, private, overwrite)
    api.create_repo(repo, private=private, exist_ok=True)
    operations = [CommitOperationAdd(name, folder / name) for name in names]
    title = next((name for name in names if name.endswith(".safetensors")), names[0])
    commit = api.create_commit(repo, operations, commit_message=f"Upload {title.removesuffix('.safetensors')}")
    return Published(f"{api.endpoint}/{repo}", commit.oid, tuple(names))


def _require_ours(api: HfApi, repo: str, names: Sequence[str], private: bool, overwrite: bool) -> None:
    """What is there already is an earlier version of these files, or nothing.

    Raises:
        UserError: if it is something else, or open to all when it was to be private.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(repo)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:  # the token is none; the Hub says the same of a missing repository
            api.whoami()
        return
    there = {file.rfilename for file in found.siblings or []}
    weights = {name for name in names if name.endswith(".safetensors")}
    if not overwrite and there - _PLACEHOLDERS and not there & weights:
        shown = ", ".join(sorted(there - _PLACEHOLDERS)[:3])
        what = f"exists and holds something else ({shown})"
        fix = "Choose another name, or add --overwrite to put these files beside it."
        raise UserError(what, f"{repo} on the Hub", fix)
    if private and not found.private:
        what = "exists and is open to all, so --private has no effect"
        raise UserError(what, f"{repo} on the Hub", "Make it private on its page, or leave --private out.")


def _told(ask: Callable[[], Published], repo: str, token: str) -> Published:
    """What the Hub says against it, as an error with its fix.

    The library's own errors hold the request, token and all; so the error has none of them for its cause or context.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
    )

    where = f"{repo} on the Hub"
    try:
        return ask()
    except OfflineModeIsEnabled:
        problem = Problem("the Hub", "is not asked: HF_HUB_OFFLINE is set", "Unset it, and publish again.")
    except HFValidationError:
        problem = Problem("--repo", f"{repo!r} is no name that the Hub allows", "Give it as owner/name.")
    except HfHubHTTPError as error:
        problem = _refusal(error.response.status_code, where, _said(error, token))
    except (HTTPError, OSError, RuntimeError) as error:
        what = f"cannot be reached, or the upload broke off ({_said(error, token)})"
        problem = Problem("the Hub", what, "Check the connection, and publish again: what is there already is kept.")
    except ValueError as error:  # of the card, which the Hub checks before anything is uploaded
        problem = Problem(where, f"the Hub refuses the card: {_said(error, token)}", f"Mend {CARD}, and publish again.")
    raise UserError.of([problem])


def _refusal(status: int, where: str, said: str) -> Problem:
    """By the status of an answer."""
    if status == 401:
        return Problem("the Hub", "does not know the token", _LOG_IN)
    if status == 403:
        return Problem(where, "this token may not write there", "Take a token that may write, of an owner's account.")
    return Problem(where, f"the Hub answers {status}: {said}", "Look at its page, and publish again.")


def _said(error: Exception, token: str) -> str:
    """An error's first words, without the token even where a server sends it back."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines[:2]) or type(error).__name__).replace(token, "***")
