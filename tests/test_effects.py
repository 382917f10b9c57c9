"""Every option of adapter, block, objective and optimizer has an effect: runs that differ in it end differently.

An option that was parsed and not applied would show here. The list is complete: a new setting has to be put in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.trainer.adapter import adapter_state
from lorasmith.trainer.config import settings
from lorasmith.trainer.configfile import merge, validate
from lorasmith.trainer.delta import lora
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.loop import Trainer
from lorasmith.trainer.plan import make_plan

from . import tiny
from .conftest import draw_picture

Values = dict[str, Any]
State = dict[str, Tensor]

V = {"objective.prediction": "v_prediction"}
LOHA, LOKR = {"adapter.kind": "loha"}, {"adapter.kind": "lokr"}
OFT: Values = {"adapter.kind": "oft", "adapter.block_size": 4, "adapter.rank": 16, "adapter.alpha": 16.0}
ALL = {"adapter.targets": "all"}
BLOCK = {"block.0.path": "unet.mid_block", "block.0.rank": 2}
TOKENS = {"adapter.new_tokens": 2}
HUBER = {"objective.loss": "huber"}
LOGIT = {"objective.timesteps": "logit-normal"}

CASES: dict[str, tuple[Values, Any]] = {
    "adapter.kind": ({}, "dora"),
    "adapter.rank": ({}, 2),
    "adapter.alpha": ({}, 2.0),
    "adapter.conv_rank": (ALL, 2),
    "adapter.conv_alpha": (ALL, 1.0),
    "adapter.rslora": ({}, True),
    "adapter.init": ({}, "gaussian"),
    "adapter.dropout": ({}, 0.5),
    "adapter.rank_dropout": (LOHA, 0.5),
    "adapter.module_dropout": (LOHA, 0.5),
    "adapter.decompose_factor": (LOKR, 2),
    "adapter.block_size": (OFT, 2),
    "adapter.targets": ({}, "attention+ff"),
    "adapter.unet": ({}, False),
    "adapter.text_encoder": ({}, False),
    "adapter.train_only": ({}, ["unet.mid_block", "text_encoder"]),
    "adapter.start_from": ({}, "start.safetensors"),
    "adapter.new_tokens": ({}, 1),
    "adapter.token_init": (TOKENS, "red"),
    "block.path": (BLOCK, "unet.up_blocks"),
    "block.rank": (BLOCK, 3),
    "block.alpha": (BLOCK, 1.0),
    "block.lr": (BLOCK, 1e-2),
    "objective.prediction": ({}, "v_prediction"),
    "objective.zero_terminal_snr": (V, "on"),
    "objective.weighting": ({}, "debiased"),
    "objective.min_snr_gamma": ({}, 1.0),
    "objective.loss": ({}, "l1"),
    "objective.huber_c": (HUBER, 0.9),
    "objective.huber_schedule": (HUBER, "constant"),
    "objective.noise_offset": ({}, 0.1),
    "objective.multires_noise_iterations": ({}, 4),
    "objective.multires_noise_discount": ({"objective.multires_noise_iterations": 4}, 0.9),
    "objective.input_perturbation": ({}, 0.1),
    "objective.min_timestep": ({}, 500),
    "objective.max_timestep": ({}, 500),
    "objective.timesteps": ({}, "logit-normal"),
    "objective.timestep_mean": (LOGIT, 1.0),
    "objective.timestep_std": (LOGIT, 0.3),
    "preference.start": ({}, "pairs"),
    "preference.beta": ({"preference.start": "pairs"}, 50.0),
    "optimizer.kind": ({}, "lion"),
    "optimizer.lr": ({}, 2e-3),
    "optimizer.text_encoder_lr": ({}, 2e-3),
    "optimizer.token_lr": (TOKENS, 5e-3),
    "optimizer.loraplus_ratio": ({}, 4.0),
    "optimizer.schedule": ({}, "linear"),
    "optimizer.warmup": ({}, 0.5),
    "optimizer.schedule_cycles": ({"optimizer.schedule": "cosine-restarts"}, 2),
    "optimizer.schedule_power": ({"optimizer.schedule": "polynomial"}, 3.0),
    "optimizer.schedule_decay": ({"optimizer.schedule": "wsd"}, 0.9),
    "optimizer.schedule_floor": ({}, 0.5),
    "optimizer.beta1": ({}, 0.5),
    "optimizer.beta2": ({}, 0.9),
    "optimizer.weight_decay": ({}, 0.5),
    "optimizer.max_grad_norm": ({}, 1e-3),
    "optimizer.ema_decay": ({}, 0.9),
    "optimizer.options": ({}, {"amsgrad": True}),
}
"""By setting: other settings without which it has no effect, and a value that is not its default."""

CHOICES: dict[str, tuple[Values, list[Any]]] = {
    "adapter.kind": ({"adapter.rank": 16, "adapter.alpha": 16.0}, ["loha", "lokr"]),
    "adapter.init": ({}, ["pissa", "olora", "eva"]),
    "adapter.targets": ({}, ["all-linear", "all"]),
    "objective.weighting": ({}, ["none", "soft-min-snr"]),
    "objective.loss": ({}, ["huber"]),
    "objective.huber_schedule": (HUBER, ["exponential"]),
    "optimizer.kind": ({}, ["adamw-schedulefree", "prodigy", "adafactor", "came"]),
    "optimizer.schedule": ({}, ["constant", "cosine-restarts", "polynomial", "rex"]),
}
"""Further values of settings that choose among several ways."""


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., State]:
    """A function that trains four steps of a tiny base with the given settings, and gives what was trained."""
    folder = tmp_path_factory.mktemp("effects")
    base, images = tiny.make_sd1(folder / "base"), folder / "images"
    images.mkdir()
    for number in range(4):
        draw_picture(number, (32, 32)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"thing {number}", encoding="utf-8")
    common = {
        "runs": str(folder / "runs"),
        "base": {"model": str(base)},
        "data": [{"path": str(images), "trigger": "trg", "caption_dropout": 0.0}],
        "adapter": {"rank": 4, "alpha": 4.0},
        "budget": {"images": 16, "batch": 4},
        "optimizer": {"lr": 1e-3, "text_encoder_lr": 1e-3, "warmup": 0.0},
        "sample": {"every": 0},
        "save": {"every": 0},
        "runtime": {"precision": "fp32", "cache": str(folder / "cache")},
    }

    places: dict[str, RunFolder] = {}

    @cache
    def trained(given: str) -> State:
        values = merge(common, {"name": f"run{len(list((folder / 'runs').glob('*')))}"})
        for dotted, value in json.loads(given).items():
            _set(values, dotted, value)
        plan = make_plan(validate(values))
        trainer = Trainer(plan, create_run(plan.config), lambda event: None)
        places[given] = trainer.run
        assert trainer.train(lambda: False) == "finished"
        with trainer.as_it_is_used():
            return adapter_state(trainer.base)

    def train(given: Values) -> State:
        if start := given.get("adapter.start_from"):
            given = given | {"adapter.start_from": str(_a_lora(folder / start, trained("{}")))}
        if pairs := given.get("preference.start"):
            trained("{}")
            start = places["{}"].checkpoint(places["{}"].saved_steps()[-1])
            given = given | {"preference.start": str(start), "data.0.path": str(_pairs(folder / pairs, images))}
        return trained(json.dumps(given, sort_keys=True))

    return train


def _set(values: Values, dotted: str, value: Any) -> None:
    section, *number, key = dotted.split(".")
    table = values.setdefault(section, [{}] if number else {})
    (table[int(number[0])] if number else table)[key] = value


def _a_lora(path: Path, like: State) -> Path:
    """A kohya file with a change of one layer that a run trains as well."""
    from safetensors.torch import save_file

    name = next(n for n in like if n.startswith("unet.") and n.endswith("attn1.to_q.lora_A.default.weight"))
    width = like[name].shape[1]
    delta = lora("", torch.full((2, width), 0.1), torch.full((width, 2), 0.1), 2.0)
    layer = "lora_unet_" + name.removeprefix("unet.").removesuffix(".lora_A.default.weight").replace(".", "_")
    save_file({f"{layer}.{leaf}": t for leaf, t in delta.tensors.items()} | {f"{layer}.alpha": torch.tensor(2.0)}, path)
    return path


def _pairs(folder: Path, images: Path) -> Path:
    """Each image is better than the one before it, which has its caption."""
    for number in range(1, 4):
        for place, image in (("better", number), ("worse", number - 1)):
            (folder / place).mkdir(parents=True, exist_ok=True)
            shutil.copy(images / f"{image}.png", folder / place / f"{number}.png")
            shutil.copy(images / f"{number}.txt", folder / place / f"{number}.txt")
    return folder


def test_the_list_is_complete():
    sections = ("adapter", "block", "objective", "optimizer", "preference")
    assert set(CASES) == {dotted for dotted, _ in settings() if dotted.partition(".")[0] in sections}


@pytest.mark.parametrize("setting", CASES)
def test_an_option_changes_the_trained_weights(setting: str, train: Callable[..., State]):
    needed, value = CASES[setting]
    assert differ(train(needed), train(needed | with_rates(setting, value)))


@pytest.mark.parametrize(
    ("setting", "value"), [(setting, value) for setting, (_, values) in CHOICES.items() for value in values]
)
def test_each_choice_is_another_training(setting: str, value: Any, train: Callable[..., State]):
    needed, values = CHOICES[setting]
    results = [train(needed | {setting: other}) for other in values] + [train(needed), train(CASES[setting][0])]
    mine = results[values.index(value)]
    assert all(differ(mine, other) for other in results if other is not mine)


def with_rates(setting: str, value: Any) -> Values:
    """A part that is not trained has no learning rate; a block's settings stand in its table."""
    off = {"adapter.unet": "optimizer.lr", "adapter.text_encoder": "optimizer.text_encoder_lr"}
    return {setting.replace("block.", "block.0."): value} | ({off[setting]: 0.0} if setting in off else {})


def differ(one: State, other: State) -> bool:
    return one.keys() != other.keys() or any(
        one[name].shape != other[name].shape or not torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-9)
        for name in one
    )


def test_the_same_settings_train_the_same_weights(train: Callable[..., State]):
    again = train({"optimizer.beta1": 0.9})  # the default, spelled out
    assert not differ(train({}), again)
