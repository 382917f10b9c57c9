"""The golden curve: a change that is meant to change no result leaves it as it is.

The losses of eight fixed steps of the example style on the embedded base, in fp32 on a CPU. If a change is meant to
change them, print them with `python -m tests.test_golden` and say in the commit why they changed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from lorasmith.trainer.configfile import validate
from lorasmith.trainer.events import Event, Step
from lorasmith.trainer.example import EXAMPLES, STYLE
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan

GOLDEN = [0.134074, 0.251352, 0.168521, 0.186106, 0.262865, 0.114227, 0.182189, 0.054043]


def losses(folder: Path) -> list[float]:
    """Losses of eight steps of four images, with the default settings."""
    config = validate(
        {
            "name": "golden",
            "runs": str(folder / "runs"),
            "data": [{"path": str(EXAMPLES / STYLE), "trigger": "ink"}],
            "budget": {"images": 32},
            "optimizer": {"lr": 1e-3, "text_encoder_lr": 1e-3},
            "sample": {"every": 0},
            "save": {"every": 0},
            "runtime": {"precision": "fp32", "cache": str(folder / "cache")},
        }
    )
    events: list[Event] = []
    plan = make_plan(config)
    Trainer(plan, create_run(plan.config), events.append).train(lambda: False)
    return [event.loss for event in events if isinstance(event, Step)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the curve was taken on a CPU")
def test_the_golden_curve_holds(tmp_path: Path):
    assert losses(tmp_path) == pytest.approx(GOLDEN, rel=2e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(losses(Path(temporary)))
