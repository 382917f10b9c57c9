"""What the dataset doctor has found, in lines for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from .checks import Examination, Finding, TokenCounts
from .tokens import CHUNK

_SHOWN = 5
"""Findings of one kind; the others are counted, and `--json` has them all."""


def report(examination: Examination) -> Iterator[str]:
    """How long the captions are, and the findings by severity and kind."""
    yield f"{examination.folder}: {_many(len(examination.items), 'image')}"
    yield from _token_lines(examination.tokens)
    for (severity, check), group in groupby(
        examination.findings, key=lambda finding: (finding.severity, finding.check)
    ):
        findings = list(group)
        yield ""
        yield f"{severity}: {check} ({len(findings)})"
        yield from _finding_lines(findings)
    yield ""


def verdict(examination: Examination) -> str:
    """One sentence: whether training can start, and whether it should."""
    errors, warnings = examination.count("error"), examination.count("warning")
    if errors:
        also = f", and {_many(warnings, 'warning')}" if warnings else ""
        blocked = "Training does not start with them; --fix OUT writes a copy without."
        return f"verdict: {_many(errors, 'error')}{also}. {blocked}"
    if warnings:
        return f"verdict: nothing stops training; {_many(warnings, 'warning')} to look at first."
    return "verdict: nothing to mend."


def _finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Place, what, and fix; a fix that all share is said once."""
    shared = len(findings) > 1 and len({finding.fix for finding in findings}) == 1
    for finding in findings[:_SHOWN]:
        yield f"  {finding.where}: {finding.what}" + ("" if shared else f". {finding.fix}")
    if len(findings) > _SHOWN:
        yield f"  and {len(findings) - _SHOWN} more"
    if shared:
        yield f"  {findings[0].fix}"


def _token_lines(tokens: TokenCounts) -> Iterator[str]:
    """A histogram: how many captions take how many chunks."""
    if not tokens.captions:
        return
    yield f"captions: {tokens.captions}, of up to {_many(tokens.longest, 'token')} ({tokens.longest_in})"
    for chunks, count in tokens.chunks.items():
        first = (chunks - 1) * CHUNK + 1 if chunks > 1 else 0
        yield f"  {first} to {chunks * CHUNK} tokens, {_many(chunks, 'chunk')}: {_many(count, 'caption')}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
