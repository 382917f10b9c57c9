"""The example that is shipped: emoji as blueprints, to be trained on the embedded base in minutes."""

from __future__ import annotations

from pathlib import Path

from ..configs import read_recipe
from .config import RunConfig
from .configfile import merge, validate
from .jobs import free_name

EXAMPLES = Path(__file__).parent.parent / "datasets" / "examples"
STYLE = "blueprint"
TRIGGER = "blueprint"


def example_config(runs: Path) -> RunConfig:
    """The run that trains the example, under a name that is free in a folder of runs."""
    answers = {
        "name": free_name(runs, STYLE),
        "runs": str(runs),
        "data": [{"path": str(EXAMPLES / STYLE), "trigger": TRIGGER, "caption_dropout": 0.1}],
    }
    return validate(merge(read_recipe("demo"), answers), source="demo")
