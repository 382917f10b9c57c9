"""LoRA files that become part of the base: it then is what it would be with them on, and nothing goes in unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.trainer.adapter import strength
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.config import AdapterSection
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.export import export
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.full import trained_weights
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.run import load_run, train
from lorasmith.trainer.sharing.metadata import Facts

from . import tiny


@pytest.fixture(params=["sd1", "sdxl"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Base, Path]:
    """A base with an adapter, and the file of it."""
    base = load_base(inspect_base(str(tiny.MAKERS[request.param](tmp_path / "base"))))
    put_on(base, AdapterSection(rank=4, alpha=8.0, targets="all"), seed=1)
    torch.manual_seed(2)
    for parameter in trained_weights(base).values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    file = tmp_path / "detail.safetensors"
    export(base, file, Facts("detail"), lambda: load_base(base.info), precision="fp32")
    return base, file


@torch.no_grad()
def answer(base: Base) -> Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])
    return base.family.predict(base.unet, noise, torch.tensor([500]), base.encode(["a house"]), sizes)


@pytest.mark.parametrize("at", [1.0, 0.5, -1.0])
def test_a_merged_base_is_the_base_with_the_lora_on(at: float, trained: tuple[Base, Path]):
    base, file = trained
    info = inspect_base(base.info.model, merge=[f"{file}:{at}"])
    with strength(base, at):
        torch.testing.assert_close(answer(load_base(info)), answer(base), rtol=1e-4, atol=1e-4)


def test_a_merged_base_is_another_base(trained: tuple[Base, Path]):
    base, file = trained
    others = [inspect_base(base.info.model, merge=merge) for merge in ([], [str(file)], [f"{file}:0.5"])]
    assert len({info.identity for info in others}) == 3


def test_a_run_on_a_merged_base_goes_on_from_it(trained: tuple[Base, Path], short_run):
    base, file = trained
    config = short_run(base={"model": base.info.model, "merge": [str(file)]})
    finished = train(make_plan(config), lambda event: None)
    live = load_run(finished.run.path, None).base
    with strength(live, 0):
        torch.testing.assert_close(answer(live), answer(base), rtol=1e-4, atol=1e-4)
    assert live.info.merges == ((str(file), 1.0),)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("nowhere.safetensors", "no such file"),
        ("detail.safetensors:much", "is no strength"),
        ("detail.safetensors:0", "is no strength"),
        ("detail.ckpt", "is not a .safetensors file"),
    ],
)
def test_what_cannot_be_merged_fails_in_the_plan(entry: str, told: str, short_run):
    with pytest.raises(UserError, match=told) as caught:
        make_plan(short_run(base={"merge": [entry]}))
    assert all(problem.fix for problem in caught.value.problems)


def test_a_lora_of_another_family_is_not_merged(trained: tuple[Base, Path], tmp_path: Path, short_run):
    base, file = trained
    other = {"sd1": "sdxl", "sdxl": "sd1"}[base.info.family]
    model = str(tiny.MAKERS[other](tmp_path / "other"))
    with pytest.raises(UserError, match=r"detail\.safetensors"):
        make_plan(short_run(base={"model": model, "merge": [str(file)]}))
