"""The trainer itself, with the very loop that `lorasmith train` runs, and with its log."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..config import RunConfig
from ..events import Event, EventLog
from ..jobs import create_run
from ..loop import Emit, Trainer
from ..plan import make_plan
from ..precision import DTYPES, mixed_precision


class Ours:
    """A run of the configuration, as it is carried out up to its last step."""

    def __init__(self, config: RunConfig, emit: Emit) -> None:
        plan = make_plan(config)
        run = create_run(plan.config)
        log = EventLog(run.events)

        def tell(event: Event) -> None:
            log.append(event)
            emit(event)

        self.trainer = Trainer(plan, run, tell)
        self.device: torch.device = self.trainer.accelerator.device
        self.dtype = DTYPES[mixed_precision(config.runtime.precision)]

    def train(self, should_stop: Callable[[], bool]) -> None:
        self.trainer.train(should_stop)
