"""Tools for LoRA files: what they write does what its sources do, in names that every client reads."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.bases import FamilyName, inspect_base
from lorasmith.trainer.config import AdapterSection
from lorasmith.trainer.delta import Delta
from lorasmith.trainer.diagnosis.inspection import inspect
from lorasmith.trainer.errors import ConfigError, ExportError, UserError
from lorasmith.trainer.export import Precision, write
from lorasmith.trainer.filetools import sources, writing
from lorasmith.trainer.filetools.convert import convert_lora
from lorasmith.trainer.filetools.merging import merge_loras
from lorasmith.trainer.filetools.resizing import resize
from lorasmith.trainer.filetools.writing import ALPHAS
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.full import trained_weights
from lorasmith.trainer.keys import Format, grammar, kohya_name
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.loraread import read_lora
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.sharing.facts import Facts
from lorasmith.trainer.strengths import Strengths

from .test_loraread import WITHOUT_ALPHAS, is_attention, some_changes, with_alphas, written
from .tiny import MAKERS

FAMILIES: list[FamilyName] = ["sd1", "sd2", "sdxl"]
FORMATS: list[Format] = ["kohya", "diffusers"]
ONE = Strengths()
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"targets": "all"},
    "dora": {"kind": "dora", "targets": "all"},
    "loha": {"kind": "loha", "targets": "all"},
    "lokr": {"kind": "lokr", "targets": "all"},
    "lokr of two whole factors": {"kind": "lokr", "rank": 512, "alpha": 256.0},
    "oft": {"kind": "oft", "block_size": 4, "targets": "all-linear"},
    "pissa": {"init": "pissa", "targets": "all"},
}
Deltas = dict[tuple[str, str], Delta]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    return {name: make(place / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module", autouse=True)
def outlines_once() -> Iterator[None]:
    """The outline of a base takes longer than a tool's work on a tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "skeleton", lru_cache(skeleton))
        yield


@pytest.fixture(scope="module")
def bases(folders: dict[str, Path]) -> dict[str, Base]:
    return {name: load_base(inspect_base(str(folder))) for name, folder in folders.items()}


def read(path: Path, base: Base) -> Deltas:
    changes = read_lora(path, base.components, base.info.family)
    return {(component, delta.name): delta for component, own in changes.items() for delta in own}


def change_of(delta: Delta, base: Base, component: str) -> Tensor:
    weight: Any = base.components[component].get_submodule(delta.name).weight
    return delta.of(weight, torch.float64)


def require_same(found: Deltas, expected: Mapping[tuple[str, str], Tensor], base: Base, tolerance: float) -> None:
    """All layers of both, and |found - expected| / |expected| of each within the tolerance."""
    assert found.keys() == expected.keys()
    for (component, name), delta in found.items():
        change = expected[component, name]
        difference = change_of(delta, base, component) - change
        assert float(difference.norm()) <= tolerance * float(change.norm()), name


def changes_of(path: Path, base: Base) -> dict[tuple[str, str], Tensor]:
    return {place: change_of(delta, base, place[0]) for place, delta in read(path, base).items()}


def require_readable(path: Path, family: FamilyName) -> None:
    """The one grammar, one alpha a component, a true hash, and a header that no client stumbles over."""
    file = LoraFile.open(path)
    assert file.format is not None
    assert all(grammar(family, file.format).fullmatch(key) for key in file.shapes)
    alphas: dict[str, set[float]] = {}
    for key, alpha in file.tensors(".alpha").items():
        assert alpha.dtype == torch.float32
        if f"{key.removesuffix('alpha')}lora_up.weight" in file.shapes:
            alphas.setdefault(key[:9], set()).add(float(alpha))
    assert all(len(values) == 1 for values in alphas.values())
    said = file.metadata
    assert "lora_adapter_metadata" not in said
    assert said["sshs_model_hash"] == file.hashes.tensors
    assert said["ss_output_name"] == path.stem
    assert said["ss_base_model_version"].startswith({"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_"}[family])
    assert said["ss_v2"] == str(family == "sd2")


def kohya_file(
    path: Path,
    base: Base,
    rank: int = 4,
    alpha: float = 2.0,
    dtype: torch.dtype = torch.float32,
    wanted: Callable[[str], bool] = is_attention,
    seed: int = 1,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A plain LoRA as sd-scripts writes it."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for component, module in base.components.items():
        for name, layer in module.named_modules():
            weight: Any = getattr(layer, "weight", None)
            if weight is None or weight.dim() not in (2, 4) or "embedding" in name or not wanted(name):
                continue
            key, ones = kohya_name(base.info.family, component, name), [1] * (weight.dim() - 2)
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            weights[f"{key}.lora_down.weight"] = down.to(dtype)
            weights[f"{key}.lora_up.weight"] = torch.randn(len(weight), rank, *ones, generator=generator).to(dtype)
            weights[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(weights, path, metadata)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# convert


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("naming", "format"),
    [
        *((naming, "kohya") for naming in [*with_alphas("sd1"), *WITHOUT_ALPHAS]),
        ("kohya", "diffusers"),
        ("PEFT", "diffusers"),
    ],
)
def test_the_names_of_every_trainer_become_those_of_a_format(
    bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path, family: FamilyName, naming: str, format: Format
):
    base, alphas = bases[family], with_alphas(family)
    source, target = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file(written(some_changes(base), (alphas | WITHOUT_ALPHAS)[naming]), source)
    made = convert_lora(source, target, format, str(folders[family]))
    require_readable(target, family)
    require_same(read(target, base), changes_of(source, base), base, 1e-6)
    assert (made.format, made.precision, made.ranks, made.lost) == (format, "fp32", (3,), {})
    assert LoraFile.open(target).format == format
    assert made.layers == dict(Counter(component for component, _ in read(source, base)))
    assert (made.bytes, made.hashes) == (target.stat().st_size, LoraFile.open(target).hashes)
    assert {path.name for path in tmp_path.iterdir()} == {"old.safetensors", "new.safetensors"}


def there_and_back(source: Path, base: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor], Path]:
    """The tensors of a file, and of what it is after it was in diffusers' names."""
    between, back = source.with_name("between.safetensors"), source.with_name("back.safetensors")
    convert_lora(source, between, "diffusers", base)
    convert_lora(between, back, "kohya", base)
    before, after = load_file(source), load_file(back)
    assert before.keys() == after.keys()
    assert {key: t.dtype for key, t in before.items()} == {key: t.dtype for key, t in after.items()}
    assert {key: t.shape for key, t in before.items()} == {key: t.shape for key, t in after.items()}
    alphas = {key: float(t) for key, t in before.items() if key.endswith(".alpha")}
    assert alphas == {key: float(after[key]) for key in alphas}
    return before, after, back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 1.0), (4, 4.0), (2, 16.0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_to_diffusers_and_back_is_the_identity_where_the_scale_is_a_power_of_two(
    bases: dict[str, Base],
    folders: dict[str, Path],
    tmp_path: Path,
    family: FamilyName,
    rank: int,
    alpha: float,
    dtype: torch.dtype,
):
    source = kohya_file(tmp_path / "old.safetensors", bases[family], rank, alpha, dtype)
    before, after, back = there_and_back(source, str(folders[family]))
    normal = 2.0**-14 * max(1.0, rank / alpha)  # smaller numbers are rounded when they are scaled in fp16
    for key, tensor in before.items():
        kept = torch.ones_like(tensor, dtype=torch.bool) if dtype != torch.float16 else tensor.abs() >= normal
        assert torch.equal(tensor[kept], after[key][kept]), key
    assert ALPHAS not in LoraFile.open(back).metadata
    assert json.loads(LoraFile.open(tmp_path / "between.safetensors").metadata[ALPHAS]) == dict.fromkeys(
        bases[family].components, alpha
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_to_diffusers_and_back_is_the_identity_but_for_rounding_at_other_scales(
    bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype, scale: float
):
    source = kohya_file(tmp_path / "old.safetensors", bases["sdxl"], 3, 1.0)
    weights = {key: tensor * scale if "lora_up" in key else tensor for key, tensor in load_file(source).items()}
    save_file({key: tensor.to(dtype) if tensor.dim() else tensor for key, tensor in weights.items()}, source)
    before, after, _ = there_and_back(source, str(folders["sdxl"]))
    bits = torch.finfo(dtype).eps
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=1.01 * bits, atol=2.0**-23)


@pytest.mark.parametrize(("model", "family"), [("random:sd15", "sd1"), ("random:sd21", "sd2"), ("random:sdxl", "sdxl")])
def test_a_full_size_file_goes_there_and_back_without_a_base(tmp_path: Path, model: str, family: FamilyName):
    base = skeleton(inspect_base(model))
    outside = r"conv_in|conv_out|embed|time_emb|text_projection"
    source = kohya_file(tmp_path / "old.safetensors", base, 1, 0.5, torch.bfloat16, lambda n: not re.search(outside, n))
    before, after, back = there_and_back(source)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert inspect(back)["family"] == inspect(tmp_path / "between.safetensors")["family"] == family
    require_readable(back, family)


@pytest.fixture(scope="module")
def of_kind(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The file of a kind, by family, in fp32; made once."""
    place = tmp_path_factory.mktemp("kinds")

    def file(family: str, kind: str) -> Path:
        path = place / family / f"{kind}.safetensors"
        if not path.exists():
            of_a_kind(folders[family], kind, path)
        return path

    return file


def of_a_kind(folder: Path, kind: str, path: Path, **settings: Any) -> None:
    """The file, in fp32, of an adapter none of whose weights is where it began."""
    base = load_base(inspect_base(str(folder)))
    put_on(base, AdapterSection(**({"rank": 4, "alpha": 6.0} | KINDS[kind] | settings)), seed=1)
    torch.manual_seed(8)
    for parameter in trained_weights(base).values():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    write(base, path, "kohya", Facts(path.stem), "fp32")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_its_form_in_kohya_names(
    folders: dict[str, Path], of_kind: Callable[[str, str], Path], tmp_path: Path, kind: str
):
    source, target = of_kind("sdxl", kind), tmp_path / "new.safetensors"
    convert_lora(source, target, base=str(folders["sdxl"]))
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    require_readable(target, "sdxl")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("dora", "DoRAs of text encoders"),
        ("loha", "LoHa"),
        ("lokr", "LoKr"),
        ("oft", "full changes"),
    ],
)
def test_what_diffusers_does_not_read_is_refused_with_a_way_out(
    bases: dict[str, Base], of_kind: Callable[[str, str], Path], tmp_path: Path, kind: str, says: str
):
    source, target, base = of_kind("sd1", kind), tmp_path / "new.safetensors", bases["sd1"].info.model
    with pytest.raises(UserError, match=f"diffusers, which does not read {says}.*lorasmith resize .*{kind}") as refused:
        convert_lora(source, target, "diffusers", base)
    assert len(refused.value.problems) == 1
    assert not target.exists()
    resize(source, target, rank=512, base=base, format="diffusers", precision="fp32")
    require_same(read(target, bases["sd1"]), changes_of(source, bases["sd1"]), bases["sd1"], 1e-6)


def test_the_dora_of_a_unet_goes_to_diffusers_and_back(folders: dict[str, Path], tmp_path: Path):
    source = tmp_path / "old.safetensors"
    of_a_kind(folders["sd1"], "dora", source, text_encoder=False, alpha=8.0, targets="all")
    before, after, _ = there_and_back(source, str(folders["sd1"]))
    assert any(key.endswith("dora_scale") and tensor.dim() == 4 for key, tensor in before.items())
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_the_lengths_of_columns_are_not_given_to_diffusers(folders: dict[str, Path], tmp_path: Path):
    source = tmp_path / "old.safetensors"
    of_a_kind(folders["sd1"], "dora", source, text_encoder=False)
    weights = load_file(source)
    for key in [key for key in weights if key.endswith("dora_scale")]:
        down = weights[key.replace("dora_scale", "lora_down.weight")]
        weights[key] = torch.ones(1, down.shape[1], *(1 for _ in down.shape[2:]))
    save_file(weights, source)
    with pytest.raises(UserError, match="DoRAs of other kinds than its own"):
        convert_lora(source, tmp_path / "new.safetensors", "diffusers", str(folders["sd1"]))


def locon_with_core(path: Path) -> Path:
    """A convolution of a published SD 1 as LyCORIS decomposes it."""
    name, random = "lora_unet_down_blocks_0_resnets_0_conv1", torch.Generator().manual_seed(3)
    sizes = {"down": (4, 320, 1, 1), "mid": (4, 4, 3, 3), "up": (320, 4, 1, 1)}
    weights = {f"{name}.lora_{leaf}.weight": torch.randn(size, generator=random) for leaf, size in sizes.items()}
    save_file(weights | {f"{name}.alpha": torch.tensor(2.0)}, path, {"ss_base_model_version": "sd_v1"})
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_the_core_of_a_locon_becomes_a_part_of_down_where_clients_do_not_read_it(tmp_path: Path, format: Format):
    source, target = locon_with_core(tmp_path / "old.safetensors"), tmp_path / "new.safetensors"
    convert_lora(source, target, format)
    assert any(".lora_mid." in key for key in LoraFile.open(target).shapes) == (format == "kohya")
    delta, made = (next(iter(read(path, skeleton(inspect_base("random:sd15"))).values())) for path in (source, target))
    weight = torch.empty(320, 320, 3, 3)
    torch.testing.assert_close(made.of(weight), delta.of(weight), rtol=1e-4, atol=1e-4)


def test_mixed_alphas_and_ranks_become_one_alpha(bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path):
    base, source, target = bases["sd1"], tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    weights = load_file(kohya_file(source, base, 4, 2.0))
    names = sorted({key.partition(".")[0] for key in weights})
    for name in names[::3]:
        weights[f"{name}.alpha"] = torch.tensor(7.0)
        weights[f"{name}.lora_down.weight"] = weights[f"{name}.lora_down.weight"][:2].clone()
        weights[f"{name}.lora_up.weight"] = weights[f"{name}.lora_up.weight"][:, :2].clone()
    save_file(weights, source)
    made = convert_lora(source, target, base=str(folders["sd1"]))
    require_readable(target, "sd1")
    assert {float(alpha) for alpha in LoraFile.open(target).tensors(".alpha").values()} == {2.0}
    assert made.ranks == (2, 4)
    require_same(read(target, base), changes_of(source, base), base, 1e-6)


def test_factors_get_the_dimensions_of_their_layer(bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path):
    """Some trainers write convolutions of 1 x 1 as matrices."""
    base, source, target = bases["sd1"], tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    kohya_file(source, base, wanted=lambda name: "proj_in" in name)
    weights = load_file(source)
    save_file({key: t.flatten(1) if t.dim() else t for key, t in weights.items()}, source)
    convert_lora(source, target, base=str(folders["sd1"]))
    assert {key: t.shape for key, t in load_file(target).items()} == {key: t.shape for key, t in weights.items()}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_each_precision_keeps_its_promise(
    bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path, precision: Any
):
    base, source, target = bases["sd2"], tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    kohya_file(source, base, 3, 1.0)
    made = convert_lora(source, target, base=str(folders["sd2"]), precision=precision)
    assert made.precision == precision
    tolerance = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}[precision]
    require_same(read(target, base), changes_of(source, base), base, tolerance)
    stored = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[precision]
    file = LoraFile.open(target)
    assert {dtype for key, dtype in file.dtypes.items() if not key.endswith(".alpha")} == {stored}


def test_without_a_precision_every_layer_keeps_its_own(
    bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path
):
    source, target = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    weights = load_file(kohya_file(source, bases["sd1"], dtype=torch.float16))
    fine = {key: t.float() if key.startswith("lora_te_") else t for key, t in weights.items()}
    save_file(fine, source)
    convert_lora(source, target, base=str(folders["sd1"]))
    assert LoraFile.open(target).dtypes == LoraFile.open(source).dtypes


def test_numbers_beyond_fp16_are_refused(bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path):
    source, target = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    weights = load_file(kohya_file(source, bases["sd1"]))
    save_file({key: t * 1e5 if "lora_" in key.partition(".")[2] else t for key, t in weights.items()}, source)
    with pytest.raises(UserError, match=r"is beyond the range of fp16.*bf16"):
        convert_lora(source, target, base=str(folders["sd1"]), precision="fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"old.safetensors"}


def test_a_converted_file_says_what_its_source_said(bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path):
    said = {
        "ss_base_model_version": "sd_v1",
        "ss_output_name": "old",
        "ss_network_dim": "64",
        "ss_tag_frequency": '{"photos": {"house": 3}}',
        "modelspec.title": "old",
        "modelspec.trigger_phrase": "my style",
        "lorasmith_baked_lost": '{"unet": 0.1}',
        "lora_adapter_metadata": "{}",
    }
    source, target = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    kohya_file(source, bases["sdxl"], metadata=said)
    convert_lora(source, target, "diffusers", str(folders["sdxl"]))
    header = LoraFile.open(target).metadata
    require_readable(target, "sdxl")  # the family is the one that it is
    assert header["ss_network_dim"] == "4"
    assert header["modelspec.title"] == "new"
    for key in ("ss_tag_frequency", "modelspec.trigger_phrase", "lorasmith_baked_lost"):
        assert header[key] == said[key]
    raw = target.read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert header["modelspec.hash_sha256"] == f"0x{digest}"


def one_layer(path: Path, name: str, shape: tuple[int, int], rank: int = 2, **metadata: str) -> Path:
    down, up = torch.ones(rank, shape[1]), torch.ones(shape[0], rank)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path, metadata or None)
    return path


TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def test_the_original_names_of_the_first_two_families_are_read(tmp_path: Path):
    """Some clients write SD 1's layers as SDXL's are written; the first upsampler has another number there."""
    names = {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k": (320, 768),
        "lora_unet__orig_mod_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (1280, 768),
    }
    weights = {}
    for name, (out, width) in names.items():
        weights |= {f"{name}.lora_down.weight": torch.randn(2, width), f"{name}.lora_up.weight": torch.randn(out, 2)}
    up = "lora_unet_output_blocks_2_1_conv"
    weights |= {f"{up}.lora_down.weight": torch.randn(2, 1280, 3, 3)}
    weights |= {f"{up}.lora_up.weight": torch.randn(1280, 2, 1, 1)}
    save_file(weights, tmp_path / "old.safetensors")
    convert_lora(tmp_path / "old.safetensors", tmp_path / "new.safetensors", base="random:sd15")
    assert {key.partition(".")[0] for key in load_file(tmp_path / "new.safetensors")} == {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
    }


def test_a_small_strength_of_a_young_file_is_kept_in_half_precision(
    bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path
):
    """A tenth of numbers near the least that fp16 has."""
    source = tmp_path / "young.safetensors"
    content = load_file(kohya_file(source, bases["sd1"], 2, 2.0, torch.float16, lambda name: "attn1" in name))
    for key in content:
        if key.endswith("lora_up.weight"):
            content[key] = (2e-6 * torch.randn(content[key].shape)).half()
    save_file(content, source)
    expected = {place: 0.1 * change for place, change in changes_of(source, bases["sd1"]).items()}
    merge_loras([(source, Strengths(0.1))], tmp_path / "x.safetensors", base=str(folders["sd1"]))
    require_same(read(tmp_path / "x.safetensors", bases["sd1"]), expected, bases["sd1"], 2e-3)


def test_files_that_cannot_be_read_are_refused_with_what_is_missing(tmp_path: Path):
    source, target = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    for name, shape, says in [
        ("lora_unet_mid_block_attentions_0_proj_in", (8, 8), "is for a base that cannot be told: .*--base"),
        (TO_K, (8, 768), "does not change.*--base: not given, so the file was taken to be for a published"),
    ]:
        one_layer(source, name, shape)
        for tool in (lambda: convert_lora(source, target), lambda: resize(source, target, 2)):
            with pytest.raises(UserError, match=re.compile(says, re.DOTALL)):
                tool()
    with pytest.raises(UserError, match=r"does not end in \.safetensors"):
        convert_lora(one_layer(source, TO_K, (320, 768)), tmp_path / "new.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"old.safetensors"}


def test_layers_that_some_clients_drop_are_left_out_only_by_name(tmp_path: Path):
    source, target = one_layer(tmp_path / "old.safetensors", TO_K, (320, 768)), tmp_path / "new.safetensors"
    odd = {f"lora_unet_time_embedding_linear_1.lora_{side}.weight": torch.ones(size) for side, size in
           (("down", (2, 320)), ("up", (1280, 2)))}  # fmt: skip
    save_file(load_file(source) | odd, source)
    with pytest.raises(UserError, match=r"1 layers that some clients drop.*--block unet.time_embedding.linear_1=0"):
        convert_lora(source, target)
    merge_loras([(source, Strengths.parse(1.0, ["unet.time_embedding.linear_1=0"]))], target)
    assert {key.partition(".")[0] for key in LoraFile.open(target).shapes} == {TO_K}


def test_a_file_that_changes_nothing_is_refused(tmp_path: Path):
    source = one_layer(tmp_path / "old.safetensors", TO_K, (320, 768))
    weights = load_file(source)
    save_file(weights | {f"{TO_K}.lora_up.weight": torch.zeros(320, 2)}, source)
    for tool in (convert_lora, lambda a, b: resize(a, b, 2), lambda a, b: merge_loras([(a, ONE)], b)):
        with pytest.raises(UserError, match="would change nothing"):
            tool(source, tmp_path / "new.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# merge


def total(sources: list[tuple[Path, Strengths]], base: Base) -> dict[tuple[str, str], Tensor]:
    """The sum of all changes, by hand."""
    sums: dict[tuple[str, str], Tensor] = {}
    for path, strengths in sources:
        for (component, name), change in changes_of(path, base).items():
            if strength := strengths.of(component, name):
                sums[component, name] = sums.get((component, name), torch.zeros(())) + strength * change
    return sums


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_is_the_sum_of_all_changes(
    bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path, family: FamilyName, format: Format
):
    base, target = bases[family], tmp_path / "new.safetensors"
    one = kohya_file(tmp_path / "one.safetensors", base, 2, 1.0)
    few = kohya_file(tmp_path / "two.safetensors", base, 3, 6.0, torch.float16, lambda n: "attn1" in n, seed=2)
    sources = [(one, Strengths.parse(0.5, ["unet.mid_block=-1", "text_encoder=0"])), (few, Strengths(0.25))]
    seen: list[tuple[int, int]] = []
    made = merge_loras(sources, target, 0, 0.0, format, str(folders[family]), "fp32", lambda *n: seen.append(n))
    require_readable(target, family)
    expected = total(sources, base)
    require_same(read(target, base), expected, base, 1e-6)
    assert "text_encoder" not in made.layers
    assert (made.ranks, made.lost) == ((2, 5), {})
    assert seen == [(number, len(expected)) for number in range(1, len(expected) + 1)]

    ways: list[tuple[float, dict[str, Any]]] = [
        (2e-3, {"precision": "fp16"}),
        (1e-6, {"rank": 5, "precision": "fp32"}),
        (1e-6, {"energy": 1.0, "precision": "fp32"}),
    ]
    for tolerance, how in ways:
        made = merge_loras(sources, target, format=format, base=str(folders[family]), **how)
        require_readable(target, family)
        require_same(read(target, base), expected, base, tolerance)
        assert all(share < 1e-6 for share in made.lost.values())


@pytest.mark.parametrize("kind", KINDS)
def test_strengths_become_a_part_of_one_file_of_any_kind(
    bases: dict[str, Base], of_kind: Callable[[str, str], Path], tmp_path: Path, kind: str
):
    source, target, fresh = of_kind("sd1", kind), tmp_path / "new.safetensors", bases["sd1"]
    folder, strengths = fresh.info.model, Strengths.parse(0.5, ["unet.up_blocks=2", "unet.mid_block=0"])
    expected = total([(source, strengths)], fresh)
    if "dora" in kind:
        with pytest.raises(UserError, match=r"is a DoRA, which at another strength is none.*--rank.*--base"):
            merge_loras([(source, strengths)], target, base=folder, precision="fp32")
        at_one = Strengths.parse(1.0, ["unet.mid_block=0"])
        expected = total([(source, at_one)], fresh)
        merge_loras([(source, at_one)], target, base=folder, precision="fp32")
    else:
        merge_loras([(source, strengths)], target, base=folder, precision="fp32")
    require_readable(target, "sd1")
    found = read(target, fresh)
    require_same(found, expected, fresh, 1e-5)
    assert {delta.form for delta in found.values()} == {delta.form for delta in read(source, fresh).values()}

    expected = total([(source, strengths)], fresh)
    merge_loras([(source, strengths)], target, rank=512, base=folder, precision="fp32")
    require_same(read(target, fresh), expected, fresh, 1e-6)
    assert all(delta.is_plain for delta in read(target, fresh).values())


def test_kinds_are_added_at_a_rank(bases: dict[str, Base], of_kind: Callable[[str, str], Path], tmp_path: Path):
    target, fresh, folder = tmp_path / "new.safetensors", bases["sd1"], bases["sd1"].info.model
    sources = [(of_kind("sd1", kind), Strengths(0.5)) for kind in ("dora", "loha", "oft", "lora")]
    with pytest.raises(UserError, match=r"dora.safetensors: holds what is a dora, which cannot be added.*--rank"):
        merge_loras(sources, target, base=folder)
    made = merge_loras(sources, target, 64, base=folder, precision="fp32")
    require_same(read(target, fresh), total(sources, fresh), fresh, 1e-6)
    assert max(made.ranks) <= 64
    assert max(made.lost.values()) < 1e-6
    made = merge_loras(sources, target, 2, base=folder)
    assert set(made.ranks) == {2}
    assert 0.1 < made.lost["unet"] < 1
    header = LoraFile.open(target).metadata
    assert header["lorasmith_baked_rank"] == "2"
    assert json.loads(header["lorasmith_baked_lost"])["unet"] == pytest.approx(made.lost["unet"], abs=1e-6)


def test_a_merged_file_says_what_it_was_made_of(bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path):
    shared = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_sd_model_name": "/home/me/base.safetensors"}
    house = {"ss_tag_frequency": '{"10_photos": {"house": 3}}', "modelspec.trigger_phrase": "aa, bb", "ss_seed": "1"}
    sea = {"ss_tag_frequency": '{"10_photos": {"sea": 4}}', "modelspec.trigger_phrase": "bb, cc", "ss_seed": "1"}
    broken = {"ss_tag_frequency": '{"10_photos": {"tree": 0.5}, "b": []}', "ss_learning_rate": "1"}
    sources = []
    for number, said in enumerate([house, sea, broken]):
        path = kohya_file(tmp_path / f"{number}.safetensors", bases["sd1"], seed=number, metadata=shared | said)
        sources.append((path, Strengths.parse(0.5, ["unet=1"] if number else [])))
    merge_loras(sources, target := tmp_path / "new.safetensors", base=str(folders["sd1"]))
    header = LoraFile.open(target).metadata
    require_readable(target, "sd1")
    assert not {"ss_seed", "ss_learning_rate"} & header.keys()
    assert json.loads(header["ss_tag_frequency"]) == {"10_photos": {"house": 3}, "10_photos_2": {"sea": 4}}
    assert header["ss_network_dim"] == "12"
    assert header["ss_network_module"] == "networks.lora"
    assert header["ss_sd_model_name"] == "base.safetensors"
    assert header["modelspec.title"] == "new"
    assert header["modelspec.trigger_phrase"] == "aa, bb, cc"
    assert header["modelspec.merged_from"] == "0, 1, 2"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    merged = json.loads(header["lorasmith_merged"])
    assert [(m["name"], m["strength"], m.get("blocks")) for m in merged] == [
        ("0", 0.5, None), ("1", 0.5, {"unet": 1.0}), ("2", 0.5, {"unet": 1.0})]  # fmt: skip
    assert [m["hash"] for m in merged] == [LoraFile.open(path).hashes.autov3 for path, _ in sources]
    assert str(tmp_path) not in json.dumps(header)


def test_one_file_at_another_strength_is_still_that_file(
    bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path
):
    said = {"ss_base_model_version": "sd_v1", "ss_seed": "1", "modelspec.title": "old", "modelspec.usage_hint": "0.8"}
    source = kohya_file(tmp_path / "old.safetensors", bases["sd1"], metadata=said)
    merge_loras([(source, Strengths(0.8))], target := tmp_path / "new.safetensors", base=str(folders["sd1"]))
    header = LoraFile.open(target).metadata
    assert (header["ss_seed"], header["modelspec.merged_from"]) == ("1", "old")
    assert json.loads(header["lorasmith_merged"])[0]["strength"] == 0.8
    assert "modelspec.usage_hint" not in header


def test_what_cannot_be_merged_is_refused(bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path):
    target = tmp_path / "new.safetensors"
    sd1 = one_layer(tmp_path / "a.safetensors", TO_K, (320, 768))
    sd2 = one_layer(tmp_path / "b.safetensors", TO_K, (320, 1024))
    with pytest.raises(UserError, match=r"a.safetensors is for .*1.*; b.safetensors is for .*2"):
        merge_loras([(sd1, ONE), (sd2, ONE)], target)
    with pytest.raises(ConfigError, match=r"unet\.up_blocks is no block of what is trained"):
        merge_loras([(sd1, Strengths.parse(1.0, ["unet.up_blocks=0.5"]))], target)
    with pytest.raises(UserError, match="at strength 0 nothing is left"):
        merge_loras([(sd1, Strengths(0.0))], target)
    with pytest.raises(UserError, match="give one of the two"):
        merge_loras([(sd1, ONE)], target, rank=4, energy=0.5)
    assert not target.exists()


# ---------------------------------------------------------------------------------------------------------------------
# resize


@pytest.mark.parametrize(
    ("kind", "family"), [*((kind, "sdxl") for kind in KINDS), ("lora", "sd1"), ("dora", "sd1"), ("loha", "sd2")]
)
def test_a_plain_lora_of_full_rank_is_the_same_change(
    bases: dict[str, Base], of_kind: Callable[[str, str], Path], tmp_path: Path, kind: str, family: FamilyName
):
    source, target, base = of_kind(family, kind), tmp_path / "new.safetensors", bases[family]
    expected = changes_of(source, base)
    tolerances: dict[Precision, float] = {"fp32": 1e-6, "fp16": 2e-3}
    for precision, tolerance in tolerances.items():
        made = resize(source, target, 512, base=base.info.model, precision=precision)
        assert made.lost.keys() == made.layers.keys()
        assert all(lost < 1e-6 for lost in made.lost.values())
        require_readable(target, family)
        found = read(target, base)
        require_same(found, expected, base, tolerance)
        assert all(delta.is_plain for delta in found.values())


def values_of(path: Path, base: Base) -> Iterator[tuple[str, str, Tensor]]:
    """The singular values of every change."""
    for (component, name), change in changes_of(path, base).items():
        yield component, name, torch.linalg.svdvals(change.flatten(1))


@pytest.mark.parametrize("format", FORMATS)
def test_a_low_rank_loses_what_the_singular_values_say(
    bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path, format: Format
):
    base, source, target = bases["sdxl"], tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    kohya_file(source, base, 6, 3.0)
    made = resize(source, target, 2, base=str(folders["sdxl"]), format=format)
    whole, rest = Counter(), Counter()
    for component, _, values in values_of(source, base):
        whole[component] += float((values**2).sum())  # pyright: ignore
        rest[component] += float((values[2:] ** 2).sum())  # pyright: ignore
    assert made.lost == pytest.approx({name: (rest[name] / whole[name]) ** 0.5 for name in whole}, rel=1e-5)
    assert made.ranks == (2,)
    assert LoraFile.open(target).format == format
    require_readable(target, "sdxl")


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_an_energy_takes_the_least_rank_that_keeps_it(
    bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path, energy: float
):
    base, source, target = bases["sd1"], tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    kohya_file(source, base, 6, 3.0)
    made = resize(source, target, energy=energy, base=str(folders["sd1"]), precision="fp32")
    found = read(target, base)
    for component, name, values in values_of(source, base):
        shares = (values**2).cumsum(0) / (values**2).sum()
        needed = 6 if energy == 1 else int((shares < energy).sum()) + 1
        assert found[component, name].rank == needed
    assert all(lost**2 <= 1 - energy + 1e-9 for lost in made.lost.values())
    assert (len(made.ranks) > 1) == (energy < 1)
    require_readable(target, "sd1")


def test_a_file_for_a_published_model_is_resized_without_a_base(tmp_path: Path):
    random = torch.Generator().manual_seed(1)
    sizes = {"w1_a": (320, 2), "w1_b": (2, 768), "w2_a": (320, 2), "w2_b": (2, 768)}
    weights = {f"{TO_K}.hada_{leaf}": torch.randn(size, generator=random) for leaf, size in sizes.items()}
    save_file(weights, tmp_path / "old.safetensors")
    seen: list[tuple[int, int]] = []
    made = resize(tmp_path / "old.safetensors", tmp_path / "new.safetensors", 4, progress=lambda *n: seen.append(n))
    assert made.lost["unet"] < 1e-5  # the product of two matrices of rank 2 has rank 4
    assert seen == [(1, 1)]
    assert inspect(tmp_path / "new.safetensors")["family"] == "sd1"
    require_readable(tmp_path / "new.safetensors", "sd1")


@pytest.mark.parametrize(("rank", "energy"), [(0, 0.0), (4, 0.5), (-1, 0.0), (0, 1.5), (0, -0.5)])
def test_one_goal_is_given(tmp_path: Path, rank: int, energy: float):
    with pytest.raises(UserError, match=r"one of the two|is no rank|is no share"):
        resize(one_layer(tmp_path / "a.safetensors", TO_K, (320, 768)), tmp_path / "b.safetensors", rank, energy)


def test_a_dora_without_its_base_is_refused(tmp_path: Path):
    source = one_layer(tmp_path / "old.safetensors", TO_K, (320, 768))
    save_file(load_file(source) | {f"{TO_K}.dora_scale": torch.ones(320, 1)}, source)
    for tool in (lambda: resize(source, tmp_path / "new.safetensors", 4),
                 lambda: merge_loras([(source, ONE)], tmp_path / "new.safetensors", energy=0.9)):  # fmt: skip
        with pytest.raises(UserError, match=r"is a DoRA, whose change depends on the base's own weights.*--base"):
            tool()


# ---------------------------------------------------------------------------------------------------------------------
# memory, and files that are not what was meant


def test_memory_does_not_grow_with_the_number_of_layers(
    bases: dict[str, Base], folders: dict[str, Path], tmp_path: Path
):
    base, folder, target = bases["sdxl"], str(folders["sdxl"]), tmp_path / "new.safetensors"
    one = kohya_file(tmp_path / "one.safetensors", base, 4, 2.0)
    two = kohya_file(tmp_path / "two.safetensors", base, 4, 2.0, seed=2)
    largest = max(tensor.nbytes for tensor in load_file(one).values())
    held: list[int] = []

    def look(done: int, total: int) -> None:
        """Bytes of all tensors there are now; those that were read are there from the first layer on."""
        if done % 40 != 1 and done < total:
            return
        tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.device.type == "cpu"]
        held.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))

    for tool in (
        lambda: convert_lora(one, target, "diffusers", folder, "fp16", look),
        lambda: resize(one, target, 2, base=folder, progress=look),
        lambda: merge_loras([(one, ONE), (two, ONE)], target, base=folder, progress=look),
        lambda: merge_loras([(one, ONE), (two, ONE)], target, rank=2, base=folder, progress=look),
    ):
        held.clear()
        tool()
        assert len(held) > 3
        assert max(held) - held[0] < 20 * largest < target.stat().st_size / 2


def test_a_layer_that_is_not_what_was_meant_fails(
    bases: dict[str, Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right = writing.cast
    monkeypatch.setattr(writing, "cast", lambda delta, *how: right(delta.times(1.1), *how))
    source = kohya_file(tmp_path / "old.safetensors", bases["sd1"])
    with pytest.raises(ExportError, match="its change is off by"):
        convert_lora(source, tmp_path / "new.safetensors", base=bases["sd1"].info.model)
