"""Any LoRA file is held against a base: what it does there, as this project reads it and as diffusers loads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.trainer.adapter import deltas
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.config import AdapterSection
from lorasmith.trainer.diagnosis.examination import Examination, examine_file, report, verdict
from lorasmith.trainer.errors import BaseModelError, UserError
from lorasmith.trainer.export import write
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.sharing.metadata import Facts

from .tiny import MAKERS

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    return {name: make(place / name) for name, make in MAKERS.items()}


def trained(folder: Path, **settings: Any) -> Base:
    """A base with an adapter whose weights are not zero."""
    base = load_base(inspect_base(str(folder)))
    put_on(base, AdapterSection(**({"rank": 4, "alpha": 2.0} | settings)), seed=1)
    generator = torch.Generator().manual_seed(5)
    for component in base.components.values():
        for delta in deltas(component):
            for tensor in delta.tensors.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return base


def lora_of(folder: Path, place: Path, format: Any = "kohya", **settings: Any) -> Path:
    """A file of a trained base."""
    path = place / "lora.safetensors"
    path.write_bytes(written(folder, format, tuple(settings.items())))
    return path


@cache
def written(folder: Path, format: Any, settings: tuple[tuple[str, Any], ...]) -> bytes:
    path = folder.parent / "lora.safetensors"
    write(trained(folder, **dict(settings)), path, format, Facts("lora"))
    return path.read_bytes()


def changed(path: Path, change: Callable[[Weights], object]) -> Path:
    """The file after a change of its tensors; what it says of their hash is left out."""
    weights, metadata = load_file(path), LoraFile.open(path).metadata
    change(weights)
    save_file(weights, path, {key: value for key, value in metadata.items() if "hash" not in key})
    return path


def lines_of(examination: Examination) -> list[str]:
    """The report, after a look at the facts: both are whole, and without paths of this computer."""
    facts = json.dumps(examination.facts(), allow_nan=False)
    lines = report(examination)
    assert all(len(line.splitlines()) <= 1 for line in lines)
    for text in (facts, *lines):
        assert str(examination.file.path.parent) not in text
    return lines


def readings(examination: Examination) -> dict[str, str]:
    return {reading.client: reading.reading for reading in examination.readings}


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", MAKERS)
def test_a_good_file_works(folders: dict[str, Path], tmp_path: Path, family: str, format: Any):
    path, counts = lora_of(folders[family], tmp_path, format), []
    found = examine_file(path, str(folders[family]), lambda *n: counts.append(n))
    assert found.works
    assert [finding.severity for finding in found.findings] == ([] if format == "kohya" else ["warning"])
    components = {"unet", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert found.effects.keys() == found.sizes.keys() == components
    for name in components:
        off = found.effects[name].diffusers_error
        assert found.effects[name].share > 0.05
        assert off is not None
        assert off < 1e-3
        assert 0 < found.sizes[name].mean <= found.sizes[name].largest
        assert found.sizes[name].relative
    layers = sum(part["layers"] for part in found.facts()["components"].values())
    assert counts == [(number, layers) for number in range(1, layers + 1)]
    assert readings(found)["diffusers"] == "same"
    lines = lines_of(found)
    assert any(
        re.fullmatch(r"unet: at strength 1 it changes \d+\.\d\d% of the answer; .* off by 0\.0\d%.*", x) for x in lines
    )
    assert any(re.fullmatch(r"diffusers +same +(\d+) of \1 layers", line) for line in lines)
    assert lines[-1].startswith("verdict: it works")


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_kinds_that_diffusers_does_not_load_are_tried_all_the_same(folders: dict[str, Path], tmp_path: Path, kind: str):
    found = examine_file(lora_of(folders["sd1"], tmp_path, kind=kind), str(folders["sd1"]))
    assert found.works
    assert [(finding.severity, kind in finding.what) for finding in found.findings] == [("warning", True)]
    assert all(effect.share > 0.005 and effect.diffusers_error is None for effect in found.effects.values())
    assert lines_of(found)[-1] == "verdict: it works; 1 warning to look at."


def test_sizes_are_shares_of_the_weights(folders: dict[str, Path], tmp_path: Path):
    path = lora_of(folders["sd1"], tmp_path, text_encoder=False)
    found = examine_file(path, str(folders["sd1"]))
    base = load_base(inspect_base(str(folders["sd1"])))
    adapted = trained(folders["sd1"], text_encoder=False)
    shares = {
        delta.name: float(delta.of(weight).norm() / weight.norm())
        for delta in deltas(adapted.unet)
        for weight in [base.unet.get_submodule(delta.name).weight]
    }
    sizes = found.sizes["unet"]
    assert sizes.mean == pytest.approx(sum(shares.values()) / len(shares), rel=1e-2)
    assert sizes.largest == pytest.approx(max(shares.values()), rel=1e-2)
    assert shares[sizes.largest_in] == max(shares.values())


def still(weights: Weights) -> None:
    for key, tensor in weights.items():
        if key.endswith("lora_up.weight"):
            tensor.zero_()


def still_text(weights: Weights) -> None:
    for key, tensor in weights.items():
        if key.startswith("lora_te_") and key.endswith("lora_up.weight"):
            tensor.zero_()


def hardly_at_all(weights: Weights) -> None:
    for key, tensor in weights.items():
        if key.endswith("lora_up.weight"):
            tensor.mul_(1e-3)
        if key.endswith("alpha"):
            tensor.mul_(1e-6)


def mixed(weights: Weights) -> None:
    for key, tensor in weights.items():
        if "attn1_to_q.alpha" in key:
            tensor.mul_(4)


def another_te(weights: Weights) -> None:
    for key in [key for key in weights if key.startswith("lora_te_")]:
        weights[key.replace("text_model_", "")] = weights.pop(key)


def huge(weights: Weights) -> None:
    for key in [key for key in weights if key.startswith("lora_unet") and key.endswith("lora_up.weight")]:
        weights[key] = weights[key].float() * 1e30


def drop_an_up(weights: Weights) -> None:
    del weights[next(key for key in weights if key.endswith("lora_up.weight"))]


def add_a_norm(weights: Weights) -> None:
    weights["lora_unet_conv_norm_out.w_norm"] = torch.ones(8)


def fp8(weights: Weights) -> None:
    for key in [key for key in weights if "lora_" in key.partition(".")[2]]:
        weights[key] = weights[key].to(torch.float8_e4m3fn)


SPOILT: dict[str, tuple[Callable[[Weights], object], str, bool]] = {
    "still": (still, "error: the file: does nothing: all its changes are zero", False),
    "a still text encoder": (still_text, "error: text_encoder: does nothing: the changes of all its 18", False),
    "too weak": (hardly_at_all, "error: the file: does nothing: the base answers as without it", False),
    "mixed alphas": (mixed, r"error: unet: diffusers makes another change of it than the file holds: off by \d", False),
    "names of a wrong generation": (another_te, "error: 18 layers, such as lora_te_encoder.*lacks text_model_", False),
    "too strong": (huge, "error: unet: its answer holds NaN or infinity with the file at strength 1", False),
    "no up": (drop_an_up, "error: .*: lacks lora_up.weight", False),
    "a norm": (add_a_norm, "warning: the file: could not be tried: 1 of its .*biases and norms cannot be read", False),
    "fp8": (fp8, "warning: .* keys.*is of fp8", True),
    "nothing": (lambda weights: None, "", True),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_a_file_does_wrong_is_said(folders: dict[str, Path], tmp_path: Path, name: str):
    change, says, works = SPOILT[name]
    path = changed(lora_of(folders["sd1"], tmp_path, targets="attention+ff"), change)
    found = examine_file(path, str(folders["sd1"]))
    lines = lines_of(found)
    assert found.works == works
    assert sum(bool(re.match(says, line)) for line in lines) == 1 or not says, lines
    assert ("works" in lines[-1]) == works


def test_a_file_is_refused_on_a_base_of_another_family(folders: dict[str, Path], tmp_path: Path):
    found = examine_file(lora_of(folders["sd1"], tmp_path), str(folders["sdxl"]))
    assert not found.works
    assert not found.effects
    assert "is for Stable Diffusion 1 (its metadata says so), and the base is SDXL" in lines_of(found)[3]


def test_without_a_base_the_published_shapes_are_the_measure(tmp_path: Path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    weights = {f"{name}.lora_down.weight": torch.randn(4, 768), f"{name}.lora_up.weight": torch.randn(320, 4)}
    weights[f"{name}.alpha"] = torch.tensor(2.0)
    path = tmp_path / "lora.safetensors"
    save_file(weights, path)
    found = examine_file(path)
    assert found.works
    assert not found.effects
    assert not found.is_named
    change = 0.5 * weights[f"{name}.lora_up.weight"] @ weights[f"{name}.lora_down.weight"]
    assert found.sizes["unet"].mean == pytest.approx(float(change.norm()), rel=1e-4)
    lines = lines_of(found)
    assert (
        "without --base: held against the shapes of a published Stable Diffusion 1; what it does was not tried" in lines
    )
    assert lines[-1] == "verdict: nothing speaks against it."
    halved = 2 * 4 * (768 + 320) - 2  # alpha is a number of fp32 as well
    assert found.bytes - found.bytes_as_fp16 == 2 * 4 * (768 + 320) + 2 > halved
    assert re.search(r"as fp16 it would have [\d,]+ bytes, with changes off by 0\.0\d% at most", "\n".join(lines))


def test_a_dora_without_its_base_is_not_measured(tmp_path: Path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    weights = {f"{name}.lora_down.weight": torch.randn(4, 768), f"{name}.lora_up.weight": torch.randn(320, 4)}
    weights |= {f"{name}.dora_scale": torch.ones(320, 1), f"{name}.alpha": torch.tensor(2.0)}
    save_file(weights, tmp_path / "lora.safetensors")
    found = examine_file(tmp_path / "lora.safetensors")
    assert not found.sizes
    assert re.search(r"unet +1 +dora +4 +2$", "\n".join(lines_of(found)), re.MULTILINE)


def test_a_file_for_no_known_base_needs_its_name(tmp_path: Path, folders: dict[str, Path]):
    path = changed(lora_of(folders["sd1"], tmp_path), lambda weights: None)
    save_file(load_file(path), path)
    found = examine_file(path)
    assert str(found.findings[0]).startswith("error: the file: is for a base that cannot be told")
    assert not found.works
    assert lines_of(found)[0].startswith("lora.safetensors: for a base that is not known")
    assert examine_file(path, str(folders["sd1"])).works


def test_what_cannot_be_examined_is_an_error(tmp_path: Path, folders: dict[str, Path]):
    path = lora_of(folders["sd1"], tmp_path)
    with pytest.raises(BaseModelError, match="does not exist"):
        examine_file(path, str(tmp_path / "no base"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="the last 100 bytes of it are missing"):
        examine_file(path, str(folders["sd1"]))


def test_the_verdict_counts(folders: dict[str, Path], tmp_path: Path):
    found = examine_file(changed(lora_of(folders["sd1"], tmp_path), still), str(folders["sd1"]))
    assert verdict(found) == "verdict: it does not work as it should: 1 error, 0 warnings."
