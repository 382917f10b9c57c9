"""Publishing on the Hugging Face Hub: first it is shown what would be uploaded; nothing is sent until a person says so.

The token that is typed goes to the one process that uploads, in its environment, and nowhere else.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from ...trainer.errors import UserError
from ...trainer.jobs import RunFolder
from ..html import esc, notice, table
from .errand import Errand, Stand, why_it_failed
from .exported import size_in_words


def uploads_of(run: RunFolder) -> Errand:
    """The uploads of a run that were started from a page, one at a time."""
    return Errand(run.path / ".publish", "an upload of this run")


def publish(run: RunFolder, bundle: Path, repo: str, private: bool, overwrite: bool, token: str) -> None:
    """Start the upload.

    Raises:
        UserError: if the name of the repository or the token is missing.
        RunError: if an upload of this run is under way.
    """
    if not repo.strip():
        raise UserError(
            "no repository was named", "Repository", "Name it as owner/name; it is made if it is not there."
        )
    if not token.strip():
        fix = "Paste one that may write, from huggingface.co/settings/tokens. It is not kept."
        raise UserError("no token was given", "Token", fix)
    arguments = ["publish", str(bundle), "--repo", repo.strip()]
    arguments += ["--private"] if private else []
    arguments += ["--overwrite"] if overwrite else []
    uploads_of(run).start(arguments, {"HF_TOKEN": token.strip()})


def contents_html(bundle: Path | None) -> str:
    """Exactly what would be uploaded."""
    if bundle is None:
        return notice("There is no bundle yet.", "Export with the bundle ticked: it is what is uploaded.", "note")
    with zipfile.ZipFile(bundle) as archive:
        entries = archive.infolist()
    rows = [(esc(entry.filename), esc(size_in_words(entry.file_size))) for entry in entries]
    total = size_in_words(sum(entry.file_size for entry in entries))
    return table(["File", "Size"], rows, f"What is uploaded: {len(entries)} files, {total}, and nothing else")


def upload_html(stand: Stand) -> str:
    """How the last upload stands."""
    if stand.state == "none":
        return ""
    if stand.state == "running":
        return '<p role="status">Uploading. It goes on if you close this page.</p>'
    url = stand.answer.strip()
    if not url.startswith(("https://", "http://")):
        return notice("the upload failed", why_it_failed(stand), where="the Hub")
    return f'<p role="status">Published: <a href="{esc(url)}" target="_blank" rel="noreferrer">{esc(url)}</a></p>'
