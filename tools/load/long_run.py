"""A run of 200,000 steps: what its story takes, and how the page bears it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ..measured import Measured
from ..pages.site import chromium, page, served
from ..pages.watching import answers, count_answers
from .simulated import EVERY, simulate

STEPS = 200_000
_SECONDS = 15


def long_run(folder: Path) -> Iterator[Measured]:
    run = simulate(folder / "long", STEPS)
    command = [sys.executable, "-m", "tools.load.reading", str(run.path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    what = f"a log of {STEPS:,} steps"
    yield Measured(f"{what}: memory of its story", found["story"], 40, "MiB")
    yield Measured(f"{what}: reading it first", found["first"], 20, "s")
    yield Measured(f"{what}: its curves", found["curve"], 0.05, "s")
    yield Measured(f"{what}: one more step, and the status", found["tick"], 0.05, "s")
    yield Measured(f"{what}: memory that 1,000 further looks take", found["growth"], 1, "MiB")
    run.take_ownership()
    try:
        with served(folder) as server, chromium() as browser, page(browser) as shown:
            count_answers(shown.context)
            shown.goto(server.url)
            shown.get_by_role("tab", name="2 Train").click()
            shown.get_by_role("img", name=f"step {STEPS}").first.wait_for()
            shown.wait_for_timeout(5_000)  # for the plots
            took = sorted(answers(shown, _SECONDS))
            yield Measured(f"{what}: a look of the page, half of all", took[len(took) // 2], 0.1, "s")
            rows = shown.locator("table.grid tbody tr").count()
            yield Measured(f"{STEPS // EVERY:,} rounds of previews: rows that the page shows", rows, 32, "rows")
    finally:
        run.give_up_ownership()
