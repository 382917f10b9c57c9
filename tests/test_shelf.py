"""Frozen weights that rest on the disk, and come back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lorasmith.trainer import shelf
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.encoder import to_tensor
from lorasmith.trainer.errors import TrainingError
from lorasmith.trainer.events import Event, Sampled, Warned
from lorasmith.trainer.jobs import create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.models import Base
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.shelf import Resting, Shelf


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


def test_within_a_block_at_work_another_one_lets_nothing_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shelf, "LEAST", 0)
    one = module()
    before, resting = copies(one), Resting("it", [one], torch.device("cpu"), tmp_path, pytest.fail)
    resting.let_rest()
    with resting.at_work():
        with resting.at_work():
            pass
        torch.testing.assert_close(copies(one), before, rtol=0, atol=0)
    assert not any(tensor.numel() for tensor in copies(one))
    with pytest.raises(RuntimeError), resting.at_work():
        raise RuntimeError
    assert not any(tensor.numel() for tensor in copies(one))
    with resting.resting():
        assert not any(tensor.numel() for tensor in copies(one))
    torch.testing.assert_close(copies(one), before, rtol=0, atol=0)


def run(config: RunConfig) -> tuple[list[Event], Trainer]:
    events: list[Event] = []
    plan = make_plan(config)
    trainer = Trainer(plan, create_run(plan.config), events.append)
    assert trainer.train(lambda: False) == "finished"
    return events, trainer


def watched(
    monkeypatch: pytest.MonkeyPatch, tell: Callable[[Base], tuple[Any, ...]]
) -> dict[str, set[tuple[Any, ...]]]:
    """What can be told of a base whenever a part of it is called, by what is called."""
    seen: dict[str, set[tuple[Any, ...]]] = {}

    def watch(owner: Any, name: str) -> None:
        usual = getattr(owner, name)

        def called(self: Any, *args: Any) -> Any:
            seen.setdefault(name, set()).add(tell(self if isinstance(self, Base) else self.base))
            return usual(self, *args)

        monkeypatch.setattr(owner, name, called)

    for name in ("posterior", "encode", "denoising", "decode"):
        watch(Base, name)
    watch(Trainer, "loss")
    return seen


def have_weights(base: Base) -> tuple[bool, bool]:
    """The VAE, and the text encoder."""
    vae, text = (next(module.parameters()).numel() > 0 for module in (base.vae, base.text_encoders["text_encoder"]))
    return vae, text


def test_a_run_draws_although_its_encoders_rest(
    short_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    over = {
        "adapter": {"rank": 4, "alpha": 4.0, "text_encoder": False},
        "optimizer": {"text_encoder_lr": 0.0},
        "sample": {"every": 2, "steps": 1, "prompts": ["emoji of owl"]},
    }
    run(short_run(name="usual", **over))
    monkeypatch.setattr(shelf, "LEAST", 0)
    seen = watched(monkeypatch, have_weights)
    events, trainer = run(short_run(name="resting", runtime={"cache": str(tmp_path / "another")}, **over))
    assert seen.pop("encode") <= {(True, True), (False, True)}
    assert seen == {
        "posterior": {(True, True)},  # the first to come, when nothing has gone to rest yet
        "denoising": {(False, False)},
        "decode": {(True, False)},
        "loss": {(False, False)},
    }
    drawn = [
        [to_tensor([Image.open(file)]) for file in sorted((tmp_path / "runs" / name / "samples").rglob("*.png"))]
        for name in ("usual", "resting")
    ]
    assert len(drawn[0]) == 4
    torch.testing.assert_close(*drawn, rtol=0, atol=0)
    assert not [event for event in events if isinstance(event, Warned)]
    assert [event.step for event in events if isinstance(event, Sampled)] == [0, 2, 4, 5]
    assert trainer.base.vae.encoder.conv_in.weight.numel()
    trainer.base.encode(["an owl"])
    assert have_weights(trainer.base) == (True, True)  # who exports reads them all
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
