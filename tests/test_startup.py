"""A process of ours starts without what it may not need, and has it when it asks."""

from __future__ import annotations

import subprocess
import sys

import pytest

_QUICK = """
import gc, sys
from lorasmith.trainer import startup
usual = gc.get_threshold()
startup.start_quickly()
import lorasmith.trainer.loop
assert sys.modules["bitsandbytes"] is None, "it was imported on the way"
assert startup.is_installed("bitsandbytes") and not startup.is_installed("no_such_library")
assert gc.get_threshold()[0] > usual[0]
startup.started()
assert gc.get_threshold() == usual and gc.get_freeze_count()
assert startup.import_late("bitsandbytes.optim").AdamW8bit
"""


def test_bitsandbytes_comes_when_it_is_asked_for():
    pytest.importorskip("bitsandbytes")
    subprocess.run([sys.executable, "-c", _QUICK], check=True)
