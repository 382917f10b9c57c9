"""Frozen weights that rest on the disk, and come back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorasmith.trainer import shelf
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.errors import TrainingError
from lorasmith.trainer.events import Event, Sampled, Warned
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.shelf import Shelf


def module() -> nn.Module:
    one = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2).bfloat16())
    one.register_buffer("places", torch.arange(7), persistent=False)
    one.register_buffer("number", torch.tensor(4.0))
    return one.requires_grad_(False)


def copies(of: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in (*of.parameters(), *of.buffers())]


def test_weights_are_given_up_and_come_back(tmp_path: Path):
    resting = module()
    before, shelved = copies(resting), Shelf([resting], tmp_path)
    for _ in range(2):
        shelved.put_away()
        shelved.put_away()
        assert not any(tensor.numel() for tensor in copies(resting))
        shelved.take_back()
        shelved.take_back()
        torch.testing.assert_close(copies(resting), before, rtol=0, atol=0)


def test_what_the_disk_gives_back_is_checked(tmp_path: Path):
    shelved = Shelf([module()], tmp_path)
    shelved.put_away()
    shelved.file.seek(0)
    shelved.file.write(b"\xff\x00\xff\x00")
    with pytest.raises(TrainingError, match="did not give back"):
        shelved.take_back()


def test_small_modules_stay_where_they_are(monkeypatch: pytest.MonkeyPatch):
    assert not Shelf.pays([module()])
    monkeypatch.setattr(shelf, "LEAST", 0)
    assert Shelf.pays([module()])
    assert not Shelf.pays([module().to("meta")])


def run(config: RunConfig) -> tuple[list[Event], Trainer]:
    events: list[Event] = []
    plan = make_plan(config)
    trainer = Trainer(plan, create_run(plan.config), events.append)
    assert trainer.train(lambda: False) == "finished"
    return events, trainer


def test_a_run_draws_although_its_encoders_rest(
    short_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    over = {
        "adapter": {"rank": 4, "alpha": 4.0, "text_encoder": False},
        "optimizer": {"text_encoder_lr": 0.0},
        "sample": {"every": 2, "steps": 1, "prompts": ["emoji of owl"]},
    }
    monkeypatch.setattr(shelf, "LEAST", 0)
    resting_at: list[bool] = []
    usual = Trainer.train_step

    def watched(self: Trainer, batches: list) -> None:
        resting_at.append(self.base.vae.encoder.conv_in.weight.numel() == 0)
        usual(self, batches)

    monkeypatch.setattr(Trainer, "train_step", watched)
    events, trainer = run(short_run(name="resting", **over))
    assert resting_at
    assert all(resting_at)
    assert not [event for event in events if isinstance(event, Warned)]
    assert [event.step for event in events if isinstance(event, Sampled)] == [0, 2, 4, 5]
    assert trainer.base.vae.encoder.conv_in.weight.numel()
    assert not list((tmp_path / "cache").rglob(".resting-*"))


def test_a_full_disk_leaves_them_in_memory(short_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch):
    def full(_: Shelf) -> list[int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shelf, "LEAST", 0)
    monkeypatch.setattr(Shelf, "_write", full)
    events, _ = run(short_run())
    [told] = [event.message for event in events if isinstance(event, Warned)]
    assert "stay in memory" in told
    assert "No space left on device" in told
