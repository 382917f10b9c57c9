"""Interpolation in weight space: files at other strengths, and means of checkpoints, against weights made by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.trainer.adapter import base_weight, strength
from lorasmith.trainer.baking import bake
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.checkpoint import load_checkpoint, save_checkpoint
from lorasmith.trainer.config import AdapterSection
from lorasmith.trainer.configfile import merge as merge_settings
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.errors import ConfigError, ExportError, RunError, UserError
from lorasmith.trainer.export import export, trained_changes
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.full import trained_weights
from lorasmith.trainer.interpolation import scaled
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.loraread import merge, read_lora
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.pivotal import token_embeddings
from lorasmith.trainer.release import release
from lorasmith.trainer.run import export_run, load_run
from lorasmith.trainer.sharing.facts import Facts
from lorasmith.trainer.soups import interpolate_run
from lorasmith.trainer.strengths import Strengths

from . import tiny
from .conftest import draw_picture, trained_run

ROUNDING = 2e-5  # of fp32, as a share of the answer
BY_BLOCK = Strengths(0.8, (("unet.up_blocks", 0.0), ("unet.*.attn2", -0.5), ("text_encoder", 1.0)))
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"targets": "all", "conv_rank": 2},
    "pissa": {"init": "pissa"},
    "loha": {"kind": "loha"},
    "lokr": {"kind": "lokr"},
    "oft": {"kind": "oft", "rank": 16, "alpha": 16.0, "block_size": 4},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    made = {name: tiny.MAKERS[name](place / name) for name in ("sd1", "sdxl")}
    return made | {"small": tiny.make_sd1(place / "small", layers_per_block=1)}


def adapted(folder: Path, **settings: Any) -> Base:
    """A base with an adapter that changes it."""
    base = load_base(inspect_base(str(folder)))
    put_on(base, AdapterSection(**({"rank": 4, "alpha": 2.0} | settings)), seed=1)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained_weights(base).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base


@torch.no_grad()
def answer(base: Base) -> Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])
    return base.family.predict(base.unet, noise, torch.tensor([500]), base.encode(["a trg house"]), sizes)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def by_name(base: Base, changes: Any) -> dict[str, Tensor]:
    """The change of every layer's weight."""
    return {
        f"{component}.{delta.name}": delta.of(torch.empty(weight_of(base, component, delta.name).shape))
        for component, deltas in changes.items()
        for delta in deltas
    }


def weight_of(base: Base, component: str, name: str) -> Tensor:
    layer: Any = base.components[component].get_submodule(name)
    return base_weight(base.components[component], name) if hasattr(layer, "base_layer") else layer.weight


# ---------------------------------------------------------------------------------------------------------------------
# strengths in a file


@pytest.mark.parametrize(
    ("family", "kind"), [*(("sd1", kind) for kind in KINDS), ("sdxl", "lora")], ids=lambda value: value
)
def test_a_file_at_strengths_does_at_1_what_the_live_model_does_at_them(
    family: str, kind: str, folders: dict[str, Path], tmp_path: Path
):
    base = adapted(folders[family], **KINDS[kind])
    with strength(base, BY_BLOCK):
        live = answer(base)
    changes = scaled(base, BY_BLOCK)
    export(base, tmp_path / "s.safetensors", Facts("s"), lambda: load_base(base.info), "kohya", "fp32", changes)

    fresh = load_base(base.info)
    plain = answer(fresh)
    if kind in ("lora", "pissa"):  # as any user of diffusers loads it, at scale 1
        fresh.pipeline().load_lora_weights(str(tmp_path), weight_name="s.safetensors")
    else:
        merge(fresh.components, read_lora(tmp_path / "s.safetensors", fresh.components, fresh.info.family))
    assert distance(answer(fresh), live) < ROUNDING
    assert distance(plain, live) > 100 * ROUNDING


def test_only_the_layers_of_a_block_have_its_strength_and_those_at_0_are_left_out(folders: dict[str, Path]):
    base = adapted(folders["sd1"])
    before = by_name(base, trained_changes(base))
    after = by_name(base, scaled(base, Strengths(1.0, (("unet.down_blocks", 0.25), ("text_encoder", 0.0)))))
    assert {name for name in before if name not in after} == {name for name in before if name.startswith("text_")}
    for name, change in after.items():
        torch.testing.assert_close(change, before[name] * (0.25 if ".down_blocks." in name else 1.0))
    assert any(".down_blocks." in name for name in after)


def test_a_dora_has_no_half_but_a_plain_lora_of_it_has(folders: dict[str, Path]):
    base = adapted(folders["sd1"], kind="dora")
    with pytest.raises(UserError, match=r"unet\..*: a DoRA has no half: .* 0\.8, 0 in .*--bake RANK") as caught:
        scaled(base, BY_BLOCK)
    assert len(caught.value.problems) == 3
    whole = scaled(base, Strengths(1.0, (("unet.up_blocks", 0.0),)))
    assert {delta.form for deltas in whole.values() for delta in deltas} == {"dora"}
    assert not any(delta.name.startswith("up_blocks") for delta in whole["unet"])

    plain, _ = bake(base, trained_changes(base), 64)
    fresh = load_base(base.info)
    merge(fresh.components, scaled(base, BY_BLOCK, plain))
    with strength(base, BY_BLOCK):
        assert distance(answer(fresh), answer(base)) < ROUNDING


def test_strengths_that_leave_nothing_or_name_nothing_are_refused(folders: dict[str, Path]):
    base = adapted(folders["sd1"])
    with pytest.raises(UserError, match="--strength: at strength 0 nothing is left"):
        scaled(base, Strengths(0.0))
    with pytest.raises(ConfigError, match=r"--block: unet\.sides is no block"):
        scaled(base, Strengths(1.0, (("unet.sides", 0.5),)))
    with strength(base, 0.5), pytest.raises(ExportError, match=r"acts at strength 0\.5"):
        scaled(base, Strengths(0.5))


# ---------------------------------------------------------------------------------------------------------------------
# means of checkpoints


Make = Callable[..., RunFolder]
WHOLE = {"kind": "full", "rank": 16, "alpha": 16.0}


@pytest.fixture(scope="module")
def make(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A function that gives the folder of a run with checkpoints of steps 1 and 2; the same for the same settings."""
    place = tmp_path_factory.mktemp("runs")
    (place / "pictures").mkdir()
    draw_picture(1, (64, 64)).save(place / "pictures" / "picture.png")
    (place / "pictures" / "picture.txt").write_text("a trg house", encoding="utf-8")
    made: dict[str, RunFolder] = {}

    def train(name: str = "style", **over: Any) -> RunFolder:
        values = {
            "name": name,
            "base": {"model": str(folders["sd1"])},
            "runs": str(place / "runs" / str(len(made))),
            "data": [{"path": str(place / "pictures"), "trigger": "trg"}],
            "adapter": {"rank": 4, "alpha": 2.0},
            "budget": {"images": 2, "batch": 1, "accumulate": 1},
            "optimizer": {"lr": 1e-2, "text_encoder_lr": 1e-2},
            "save": {"every": 1},
            "sample": {"every": 0},
            "runtime": {"cache": str(place / "cache")},
        }
        key = f"{name} {json.dumps(over, sort_keys=True)}"
        if key not in made:
            made[key] = trained_run(validate(merge_settings(values, over))).run
            assert made[key].saved_steps() == [1, 2]
        return made[key]

    return train


def copied(run: RunFolder, place: Path) -> RunFolder:
    """For what changes its files."""
    shutil.copytree(run.path, place / run.name)
    return RunFolder(place / run.name)


def test_a_run_is_exported_at_strengths(make: Make, tmp_path: Path):
    run, strengths = make(), Strengths(0.5, (("unet.mid_block", 1.5),))
    base = load_run(run.path, 2).base
    with strength(base, strengths):
        live = answer(base)
    file, *_ = export_run(run.path, 2, ["kohya"], tmp_path, "fp32", 0, strengths, overrides=["export.author=me"])
    assert LoraFile.open(file).metadata["modelspec.author"] == "me"
    fresh = load_base(base.info)
    fresh.pipeline().load_lora_weights(str(tmp_path), weight_name=file.name)
    assert distance(answer(fresh), live) < ROUNDING
    with pytest.raises(RunError, match=r"seed cannot change within a run\. Only export can"):
        export_run(run.path, 2, ["kohya"], tmp_path, overrides=["seed=7", "export.author=me"])
    for path in (run.path, make("full", adapter=WHOLE).path):
        with pytest.raises(UserError, match="--strength: at strength 0 nothing is left"):
            export_run(path, None, (), tmp_path, strengths=Strengths(0.0))


def by_hand(run: RunFolder, shares: dict[int, float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weighted sum of what the checkpoints change in each layer, and of their new tokens."""
    total: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    for step, share in shares.items():
        base = load_run(run.path, step).base
        for component, deltas in trained_changes(base).items():
            for delta in deltas:
                name, weight = f"{component}.{delta.name}", weight_of(base, component, delta.name)
                total[name] = total.get(name, 0) + share * delta.of(weight)
        for name, vectors in token_embeddings(base).items():
            tokens[name] = tokens.get(name, 0) + share * vectors
    return total, tokens


def changed_by_hand(run: RunFolder, total: dict[str, Tensor]) -> Base:
    base = load_base(load_run(run.path, None).base.info)
    for name, change in total.items():
        component, _, layer = name.partition(".")
        base.components[component].get_submodule(layer).weight.add_(change)
    return base


def nearest(change: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]).view(change.shape).float()


def side_by_side(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum, where a layer that one of them has not is unchanged there."""
    both = {name: one[name] + other[name] for name in one.keys() & other.keys()}
    return one | other | both


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    size = max(float(change.abs().max()) for change in other.values())
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], atol=1e-5 * size) for name in one)


@pytest.mark.parametrize("kind", ["lora", "pissa", "oft", "dora"])
def test_the_mean_of_checkpoints_is_that_of_their_changes(kind: str, make: Make):
    run = make(adapter=KINDS.get(kind, {"kind": kind}))
    found = interpolate_run(run.path, [1, 2], [1, 3], rank=99)  # more than there is
    total, _ = by_hand(run, {1: 0.25, 2: 0.75})
    assert found.changes is not None
    assert all(delta.is_plain for deltas in found.changes.values() for delta in deltas)
    assert same(by_name(found.trained.base, found.changes), total)
    assert max(found.lost.values()) < 1e-5
    live = answer(found.trained.base)
    assert distance(live, answer(changed_by_hand(run, total))) < ROUNDING
    assert distance(live, answer(load_run(run.path, 2).base)) > 10 * ROUNDING
    with pytest.raises(ExportError, match="switched off"):
        trained_changes(found.trained.base)


def test_the_rank_of_the_runs_is_kept_and_what_that_cuts_off_is_told(make: Make):
    run = make(adapter={"targets": "all", "conv_rank": 2}, block=[{"path": "unet.mid_block", "rank": 3}])
    before = {f"{c}.{d.name}": d for c, ds in trained_changes(load_run(run.path, 1).base).items() for d in ds}
    told: list[tuple[int, int]] = []
    found = interpolate_run(run.path, [2, 1], progress=lambda *counts: told.append(counts))
    assert found.changes is not None
    after = {f"{c}.{d.name}": d for c, ds in found.changes.items() for d in ds}
    assert {name: delta.rank for name, delta in after.items()} == {n: delta.rank for n, delta in before.items()}
    assert {2, 3, 4} == {delta.rank for delta in after.values()}

    total, _ = by_hand(run, {1: 0.5, 2: 0.5})
    best = {name: nearest(change, after[name].rank) for name, change in total.items()}
    assert same(by_name(found.trained.base, found.changes), best)
    for component in ("unet", "text_encoder"):
        own = [name for name in total if name.startswith(f"{component}.")]
        rest = sum(float((total[name] - best[name]).norm() ** 2) for name in own) ** 0.5
        change = sum(float(total[name].norm() ** 2) for name in own) ** 0.5
        assert found.lost[component] == pytest.approx(rest / change, rel=1e-3)
        assert found.lost[component] > 1e-3
    assert told == [(number, len(total)) for number in range(1, len(total) + 1)]


def same_again(run: RunFolder, step: int, copy: int) -> None:
    """Another checkpoint that holds the same."""
    checkpoint = load_checkpoint(run.checkpoint(step))
    save_checkpoint(run.checkpoint(copy), replace(checkpoint, state=replace(checkpoint.state, step=copy)))


@pytest.mark.parametrize("adapter", [{}, WHOLE], ids=["lora", "full"])
def test_the_ends_are_the_checkpoints_and_the_mean_of_equal_ones_is_each(
    adapter: dict[str, Any], make: Make, tmp_path: Path
):
    run = copied(make(adapter=adapter), tmp_path)
    same_again(run, 2, 3)
    for steps, weights, step in [([1, 2], [1, 0], 1), ([1, 2], [0, 5], 2), ([2, 3], [1, 2], 2)]:
        found = interpolate_run(run.path, steps, weights)
        live, meant = answer(found.trained.base), answer(load_run(run.path, step).base)
        assert torch.equal(live, meant) if adapter else distance(live, meant) < ROUNDING
        assert all(share < 1e-6 for share in found.lost.values())


@pytest.mark.parametrize("adapter", [{}, WHOLE], ids=["lora", "full"])
def test_a_negative_share_leads_beyond_a_checkpoint(adapter: dict[str, Any], make: Make):
    run, shares = make(adapter=adapter), {1: -1.0, 2: 2.0}
    base = interpolate_run(run.path, [1, 2], [-2, 4], rank=None if adapter else 8, extrapolate=True).trained.base
    meant = mean_by_hand(run, shares) if adapter else changed_by_hand(run, by_hand(run, shares)[0])
    assert distance(answer(base), answer(meant)) < ROUNDING


def mean_by_hand(run: RunFolder, shares: dict[int, float]) -> Base:
    """A whole model whose weights are the weighted sum of those of checkpoints."""
    states = {step: dict(trained_weights(load_run(run.path, step).base)) for step in shares}
    base = load_run(run.path, None).base
    with torch.no_grad():
        for name, parameter in trained_weights(base).items():
            parameter.copy_(sum((share * states[step][name] for step, share in shares.items()), torch.zeros(())))
    return base


def test_the_mean_of_whole_models_is_that_of_their_weights_and_is_exported(make: Make, tmp_path: Path):
    only = ["unet.up_blocks", "unet.mid_block", "text_encoder"]
    run = make(adapter=WHOLE | {"train_only": only})
    found = interpolate_run(run.path, [1, 2], [3, 1])
    assert (found.changes, dict(found.lost), found.trained.step) == (None, {}, 2)
    assert found.name == "style-mean-1-75pct-2-25pct"
    meant, live = mean_by_hand(run, {1: 0.75, 2: 0.25}), trained_weights(found.trained.base)
    for name, parameter in trained_weights(meant).items():
        torch.testing.assert_close(live[name], parameter)

    release(found.trained, found.name, tmp_path / "out", ["ldm"], "fp32", merged_from=found.merged_from)
    again = load_base(inspect_base(str(tmp_path / "out" / f"{found.name}.safetensors")))
    assert torch.equal(answer(again), answer(found.trained.base))

    half = Strengths(0.5, (("unet.mid_block", 0.0),))
    with strength(found.trained.base, half):
        expected = answer(found.trained.base)
    files = release(found.trained, found.name, tmp_path / "half", ["ldm"], "fp32", 0, half)
    assert torch.equal(answer(load_base(inspect_base(str(files[0])))), expected)


def test_two_runs_may_differ_in_rank_reach_and_kind(make: Make, tmp_path: Path):
    one = make("one", adapter={"rank": 2, "train_only": ["unet.up_blocks", "text_encoder"]})
    two = make("two", adapter={"targets": "attention+ff"}, optimizer={"lr": 1e-2, "text_encoder_lr": 2e-2})
    loha = make("loha", adapter={"kind": "loha"})
    total, _ = by_hand(one, {2: 0.5})
    total = side_by_side(total, by_hand(two, {2: 0.5})[0])

    found = interpolate_run(one.path, (), other=two.path, rank=99)
    assert (found.name, found.trained.run) == ("one-mean-2-two-2", one)
    assert found.merged_from == ["one step 2 (0.5)", "two step 2 (0.5)"]
    assert found.changes is not None
    assert same(by_name(found.trained.base, found.changes), total)
    live = answer(found.trained.base)
    assert distance(live, answer(changed_by_hand(one, total))) < ROUNDING

    files = release(found.trained, found.name, tmp_path, (), "fp32", changes=found.changes)
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 2
    for file in weights:
        fresh = load_base(found.trained.base.info)
        fresh.pipeline().load_lora_weights(str(file.parent), weight_name=file.name)
        assert distance(answer(fresh), live) < ROUNDING

    own = interpolate_run(one.path, (), other=two.path).changes
    assert own is not None
    assert {delta.rank for delta in own["unet"]} == {4}  # the larger one
    with pytest.raises(UserError, match=r"--rank: the mean of changes by loha is no such change.*as 16"):
        interpolate_run(one.path, (), other=loha.path)
    mixed = interpolate_run(one.path, [1, 2], [1, 3], other=loha.path, rank=99).changes
    parts = by_hand(one, {1: 0.25})[0], by_hand(loha, {2: 0.75})[0]
    assert mixed is not None
    assert same(by_name(found.trained.base, mixed), side_by_side(*parts))


def test_the_mean_of_new_tokens_is_that_of_their_vectors(make: Make):
    adapter = {"new_tokens": 2}
    run = make(adapter=adapter, optimizer={"lr": 1e-2, "text_encoder_lr": 1e-2, "token_lr": 1e-1})
    _, tokens = by_hand(run, {1: 0.5, 2: 0.5})
    found = interpolate_run(run.path, [1, 2], rank=8)
    for name, vectors in token_embeddings(found.trained.base).items():
        torch.testing.assert_close(vectors, tokens[name])
    words = make("words")
    with pytest.raises(RunError, match=r"words.*step-000002: has other new tokens than .*style"):
        interpolate_run(run.path, (), other=words.path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": [2]}, r"--steps: a mean is of two different checkpoints at least\. .* Checkpoints: 1, 2"),
        ({"steps": [2, 2]}, r"--steps: a mean is of two different checkpoints"),
        ({"steps": [1, 5]}, r"has no checkpoint of step 5\. Checkpoints: 1, 2"),
        ({"steps": [1, 2], "weights": [1]}, r"--weights: 1 weights for 2 checkpoints"),
        ({"steps": [1, 2], "weights": [1, float("nan")]}, r"--weights: a weight is no number"),
        ({"steps": [1, 2], "weights": [2, -1]}, r"--weights: -1 leads away from a checkpoint.*--extrapolate"),
        ({"steps": [1, 2], "weights": [1, -1], "extrapolate": True}, r"--weights: the weights sum to 0"),
        ({"steps": [], "other": "itself"}, r"is the same run"),
        ({"steps": [1], "other": "full"}, r"--steps: 1 steps are named, for two runs"),
        ({"steps": [], "other": "full"}, r"full.*step-000002: holds a full, and .*style.*step-000002 a lora"),
        ({"steps": [], "other": "elsewhere"}, r"elsewhere.*: was trained on another base than .*same base"),
        ({"steps": [], "other": "noise"}, r"noise.*: was trained with another objective\.prediction"),
        ({"steps": [1, 2], "rank": 4, "path": "full"}, r"--rank: has no effect"),
        ({"steps": [], "path": "full", "other": "part"}, r"part.*: trains other weights than .*full.*train_only"),
    ],
)
def test_what_has_no_mean_is_refused(arguments: dict[str, Any], message: str, runs: dict[str, Path]):
    places: dict[str, Any] = {
        key: runs[arguments.get(key, "itself")] for key in ("path", "other") if key == "path" or key in arguments
    }
    with pytest.raises(UserError, match=message):
        interpolate_run(**(arguments | places))


@pytest.fixture(scope="module")
def runs(make: Make, folders: dict[str, Path]) -> dict[str, Path]:
    made = {
        "itself": make(),
        "full": make("full", adapter=WHOLE),
        "part": make("part", adapter=WHOLE | {"train_only": ["unet.up_blocks", "text_encoder"]}),
        "elsewhere": make("elsewhere", base={"model": str(folders["small"])}),
        "noise": make("noise", objective={"prediction": "v_prediction"}),
    }
    return {name: run.path for name, run in made.items()}


@pytest.mark.parametrize("file", ["state.json", "adapter.safetensors"])
def test_a_damaged_checkpoint_is_named(file: str, make: Make, tmp_path: Path):
    run = copied(make(), tmp_path)
    path = run.checkpoint(1) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RunError, match=r"step-000001: cannot be read"):
        interpolate_run(run.path, [1, 2])
