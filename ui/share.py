"""The files that a run has written to share, and what each client makes of them, as the export found it."""

from __future__ import annotations

import json
import re

import pandas as pd

from ..trainer.jobs import VERIFIED, RunFolder

_SAID = {
    "same": "does what was trained",
    "part": "does a part of it",
    "other": "does something else",
    "none": "does not read it",
}


def files_of(run: RunFolder) -> list[str]:
    """All files that were exported, but for those that are being written, and those that were rejected."""
    files = (path for path in sorted(run.exports.rglob("*")) if path.is_file())
    return [str(path) for path in files if not _NOT_TO_SHARE.search(path.relative_to(run.exports).as_posix())]


_NOT_TO_SHARE = re.compile(r"(^|/)\.|\.unverified\.|\.rejected$")


def clients_of(run: RunFolder) -> pd.DataFrame:
    """One line for each file and client."""
    rows = [
        (file["file"], client["client"], _SAID[client["reading"]], client["why"])
        for path in sorted(run.exports.glob(f"*{VERIFIED}"))
        for file in json.loads(path.read_text(encoding="utf-8"))["files"]
        for client in file["clients"]
    ]
    return pd.DataFrame(rows, columns=["file", "client", "what it does", "because"])
