"""What is wrong with a LoRA file, whoever made it: each kind of problem in one sentence, the worst first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lorafile import LoraFile
from .finding import SEVERITIES, Case, Finding, Severity
from .metadata import metadata_findings
from .names import name_findings
from .tensors import tensor_findings

if TYPE_CHECKING:
    from ..models import Base

__all__ = ["SEVERITIES", "Finding", "Severity", "findings"]


def findings(file: LoraFile, base: Base | None = None) -> list[Finding]:
    """All that can be told of a file that can be opened, by its names, its tensors and its metadata.

    With a base, whose shapes are enough, its layers are held against that one's; without, against the names that there
    are in any model of these families. Tensors are read one layer at a time, and only those of LoRA layers.
    """
    case = Case(file, base)
    told = [*name_findings(case), *tensor_findings(case), *metadata_findings(case)]
    return sorted(told, key=lambda finding: SEVERITIES.index(finding.severity))
