"""The report of a run from the page: a process of its own writes it, whatever the run does, and then it is offered."""

from __future__ import annotations

import time
from typing import Any

from ...trainer.jobs import RunFolder
from ...trainer.report.page import FILE
from ..context import changed_at
from ..html import esc, notice
from ..share.errand import Errand, Stand, why_it_failed
from ..share.exported import size_of
from ..urls import report_url


def reports_of(run: RunFolder) -> Errand:
    """The reports of a run that were started from a page, one at a time."""
    return Errand(run.path / ".report", "a report of this run")


def save_report(run: RunFolder) -> str:
    """Start to write it, and say so.

    Raises:
        RunError: if one is being written.
    """
    reports_of(run).start(["report", str(run.path)])
    return f"A report of {run.name} was asked for."


def report_news(run: RunFolder) -> Any:
    """Changes when a report is begun, has ended, or is another one."""
    return reports_of(run).stand(), changed_at(run.path / FILE)


def report_html(run: RunFolder) -> str:
    """How the last report that was asked for stands, and the one that is there, to download."""
    stand = reports_of(run).stand()
    if stand.state == "running":
        since = time.strftime("%H:%M:%S", time.localtime(stand.started))
        return f'<p role="status">Writing the report since {since}. It goes on if you close this page.</p>'
    return (_failure(stand) if _has_failed(stand) else "") + _download(run)


def _has_failed(stand: Stand) -> bool:
    """The command answers with the file, and only when that is whole."""
    return stand.state == "ended" and not stand.answer.strip()


def _failure(stand: Stand) -> str:
    return notice("the report was not written", why_it_failed(stand), where="report")


def _download(run: RunFolder) -> str:
    file = run.path / FILE
    try:
        written, size = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(file.stat().st_mtime)), size_of(file)
    except FileNotFoundError:
        return ""
    link = f'<a href="{esc(report_url(run, file))}" download>Download the report</a>'
    told = f"of {run.name}: one page, {size}, written {written}. It holds captions and small copies of training images."
    return f'<p role="status">{link} {esc(told)}</p>'
