"""LoRAs that become part of a base's file, and LoRAs that are taken out of one again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.baseweights import BaseWeights, rewrite
from lorasmith.trainer.config import AdapterSection, Kind
from lorasmith.trainer.delta import Changes, Delta, lora
from lorasmith.trainer.errors import ConfigError, UserError
from lorasmith.trainer.export import Precision, castable, layer_tensors, save
from lorasmith.trainer.filetools.extraction import extract, nearest
from lorasmith.trainer.filetools.intobase import merge_into_base
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.full import trained_weights
from lorasmith.trainer.keys import grammar
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.loraread import merge, read_lora
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.paths import path_of
from lorasmith.trainer.strengths import Strengths
from lorasmith.trainer.verify import live_changes

from .tiny import MAKERS

RANK = 4
Changed = dict[tuple[str, str], Tensor]
"""delta-W by component and path."""


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family; no test changes it."""
    return MAKERS[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def detail(folder: Path) -> Path:
    """A LoRA of all its layers that clients know."""
    return trained(load_base(inspect_base(str(folder))), folder.with_name("detail.safetensors"), "lora", seed=2)


ONE_FAMILY = pytest.mark.parametrize("folder", ["sdxl"], indirect=True)


def trained(base: Base, path: Path, kind: Kind, seed: int) -> Path:
    """The file of an adapter whose weights were set at random."""
    put_on(base, AdapterSection(kind=kind, rank=RANK, alpha=2.0 * RANK, targets="all"), seed=1)
    torch.manual_seed(seed)
    for parameter in trained_weights(base).values():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return write(base, live_changes(base), path)


def write(base: Base, changes: Changes, path: Path) -> Path:
    written = castable(base, changes, "kohya", torch.float32)
    own = {k: t for c, deltas in written.items() for d in deltas for k, t in layer_tensors(base, c, d, "kohya").items()}
    save(path, own, lambda _writer: {}, "kohya", "fp32")
    return path


def changes_of(file: Path, base: Base) -> Changed:
    """delta-W of each layer, fp64, by component and path."""
    return {
        (component, delta.name.removeprefix("text_model.")): delta.of(weight_of(base, component, delta), torch.float64)
        for component, own in read_lora(file, base.components, base.info.family).items()
        for delta in own
    }


def weight_of(base: Base, component: str, delta: Delta) -> Tensor:
    return torch.empty(base.components[component].get_submodule(delta.name).weight.shape)


def assert_near(found: Changed, expected: Changed, tolerance: float):
    assert found.keys() == expected.keys()
    off = {key: float((found[key] - change).norm() / change.norm()) for key, change in expected.items()}
    assert max(off.values()) <= tolerance, max(off.items(), key=lambda entry: entry[1])


@torch.no_grad()
def answer(base: Base) -> Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])
    return base.family.predict(base.unet, noise, torch.tensor([500]), base.encode(["a house"]), sizes)


# ---------------------------------------------------------------------------------------------------------------------
# into a base


def test_a_base_with_a_lora_in_it_answers_as_with_the_lora_on(folder: Path, detail: Path, tmp_path: Path):
    info, live = inspect_base(str(folder)), load_base(inspect_base(str(folder)))
    changes = read_lora(detail, live.components, info.family)
    made = merge_into_base(info, [(detail, Strengths(0.5))], tmp_path / "merged")
    assert made.weights == sum(len(own) for own in changes.values())
    merge(live.components, changes, 0.5)
    found = load_base(inspect_base(str(tmp_path / "merged")))
    torch.testing.assert_close(answer(found), answer(live), rtol=1e-5, atol=1e-5)


@ONE_FAMILY
def test_several_files_are_added_one_after_the_other(folder: Path, detail: Path, tmp_path: Path):
    """A DoRA changes what the LoRA before it made of the weight, at strengths by block."""
    info, live = inspect_base(str(folder)), load_base(inspect_base(str(folder)))
    other = trained(load_base(info), tmp_path / "other.safetensors", "dora", seed=5)
    strengths = Strengths.parse(0.5, ["unet.mid_block=-1", "text_encoder_2=0"])
    merge_into_base(info, [(detail, Strengths(0.7)), (other, strengths)], tmp_path / "merged.safetensors")
    plain = read_lora(detail, live.components, info.family)
    second = read_lora(other, live.components, info.family)
    for component, own in live.components.items():
        merge({component: own}, {component: plain[component]}, 0.7)
        for delta in second[component]:
            merge({component: own}, {component: [delta]}, strengths.of(component, delta.name))
    found = BaseWeights.open(inspect_base(str(tmp_path / "merged.safetensors")))
    for component, module in live.components.items():
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(found.tensor(component, name), parameter.detach(), rtol=1e-6, atol=1e-6)
    with safe_open(tmp_path / "merged.safetensors", framework="pt") as file:
        told = "sdxl, detail at 0.7, other at 0.5, -1 in unet.mid_block, 0 in text_encoder_2"
        assert file.metadata()["modelspec.merged_from"] == told


@ONE_FAMILY
def test_what_leaves_the_base_as_it_is_is_refused(folder: Path, detail: Path, tmp_path: Path):
    nothing = Strengths(1.0, (("unet", 0.0), ("text_encoder*", 0.0)))
    with pytest.raises(UserError, match="strength 0"):
        merge_into_base(inspect_base(str(folder)), [(detail, nothing)], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_the_base_is_refused(folder: Path, detail: Path, tmp_path: Path):
    info, target = inspect_base(str(folder)), tmp_path / "merged.safetensors"
    with pytest.raises(ConfigError, match=r"unet\.nowhere is no block"):
        merge_into_base(info, [(detail, Strengths.parse(1.0, ["unet.nowhere=2"]))], target)
    with pytest.raises(UserError, match="no part of a LoRA for this Stable Diffusion 1"):
        merge_into_base(inspect_base("pocket"), [(detail, Strengths())], target)
    with pytest.raises(UserError, match="is what is read"):
        merge_into_base(info, [(detail, Strengths())], detail)
    with pytest.raises(UserError, match="no LoRA file was given"):
        merge_into_base(info, [], target)
    assert not target.exists()


# ---------------------------------------------------------------------------------------------------------------------
# and out again


@pytest.fixture(scope="module")
def merged(folder: Path, detail: Path) -> Path:
    """The base with the LoRA in it, as one file in fp32."""
    path = folder.with_name("merged.safetensors")
    merge_into_base(inspect_base(str(folder)), [(detail, Strengths())], path)
    return path


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_what_was_merged_is_extracted_again(
    precision: Precision, tolerance: float, folder: Path, detail: Path, merged: Path, tmp_path: Path
):
    """From a single file against a folder, all layers that clients know, attention as well as convolutions."""
    base, target = skeleton(inspect_base(str(folder))), tmp_path / "extracted.safetensors"
    made = extract(str(merged), str(folder), target, rank=RANK, precision=precision)
    assert_near(changes_of(target, base), changes_of(detail, base), tolerance)
    assert max(made.lost.values()) <= tolerance
    assert made.ranks.keys() == base.components.keys()
    unread = 6 if base.info.family == "sdxl" else 0  # the last layer of its first text encoder, which is not trained
    assert made.unchanged == {component: unread * (component == "text_encoder") for component in base.components}
    assert not made.beyond
    assert not made.told
    file = LoraFile.open(target)
    pattern = grammar(base.info.family, "kohya")
    assert all(pattern.fullmatch(key) for key in file.shapes)
    assert set(file.dtypes.values()) == {"F32", {"fp32": "F32", "fp16": "F16"}[precision]}
    versions = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(float(RANK)),
        "ss_base_model_version": versions[base.info.family],
        "ss_v2": str(base.info.family == "sd2"),
        "modelspec.title": "extracted",
        "sshs_model_hash": file.hashes.tensors,
        "modelspec.hash_sha256": f"0x{file.hashes.tensors}",
        "lorasmith_extracted_from": "merged.safetensors",
    }
    assert {key: file.metadata.get(key) for key in expected} == expected
    assert "modelspec.license" not in file.metadata  # that of the tuned model is not known


@ONE_FAMILY
def test_two_merged_files_come_out_as_their_sum(folder: Path, detail: Path, tmp_path: Path):
    """From a folder in half precision against a file in half precision: what their rounding leaves of the change."""
    info, base = inspect_base(str(folder)), skeleton(inspect_base(str(folder)))
    other = trained(load_base(info), tmp_path / "other.safetensors", "lora", seed=5)
    rewrite(info, tmp_path / "base.safetensors", lambda _c, _n, tensor: tensor, "fp16")
    half = inspect_base(str(tmp_path / "base.safetensors"))
    merge_into_base(half, [(detail, Strengths(0.5)), (other, Strengths(2.0))], tmp_path / "tuned")
    target = tmp_path / "sum.safetensors"
    extract(str(tmp_path / "tuned"), half.model, target, rank=2 * RANK, format="diffusers")
    assert LoraFile.open(target).format == "diffusers"
    one, two = (changes_of(file, base) for file in (detail, other))
    assert_near(changes_of(target, base), {key: 0.5 * one[key] + 2 * two[key] for key in one}, 5e-3)
    load_base(info).pipeline().load_lora_weights(str(tmp_path), weight_name=target.name)


@pytest.fixture(scope="module")
def change(folder: Path) -> Changed:
    """The change of each weight in `tuned.safetensors` beside the base: some attention, norms and biases, the first
    layer, and the VAE."""
    torch.manual_seed(8)
    made: Changed = {}

    def tune(component: str, name: str, tensor: Tensor) -> Tensor:
        parts = ("down_blocks", "to_q", "to_out.0.bias", "norm1.weight", "conv_in.weight")
        if not any(part in name for part in parts) or component not in ("unet", "vae"):
            return tensor
        made[component, name] = 0.1 * torch.randn(tensor.shape)
        return tensor + made[component, name]

    rewrite(inspect_base(str(folder)), folder.with_name("tuned.safetensors"), tune, "fp32")
    return made


@ONE_FAMILY
def test_each_layer_keeps_the_most_that_its_rank_can(folder: Path, change: Changed, tmp_path: Path):
    model, target = str(folder.with_name("tuned.safetensors")), tmp_path / "made.safetensors"
    made = extract(model, str(folder), target, rank=3, conv_rank=2, precision="fp32")
    file, base = LoraFile.open(target), skeleton(inspect_base(str(folder)))
    found = changes_of(target, base)
    kept = {(c, f"{path}.weight"): tensor for (c, path), tensor in found.items()}
    whole = rest = 0.0
    for key, tensor in kept.items():
        values = torch.linalg.svdvals(change[key].flatten(1).double())
        rank = 2 if tensor.dim() == 4 and tensor[0, 0].numel() > 1 else 3
        least = float(values[rank:].square().sum())
        assert float((tensor - change[key]).norm()) ** 2 == pytest.approx(least, rel=1e-3, abs=1e-9)
        whole, rest = whole + float(values.square().sum()), rest + least
    assert made.lost["unet"] == pytest.approx((rest / whole) ** 0.5, rel=1e-3)
    assert sorted(set(made.ranks["unet"])) == [2, 3]
    alphas = {float(tensor) for tensor in file.tensors(".alpha").values()}
    assert alphas == {3.0}  # diffusers reads one of them only
    assert file.metadata["ss_network_dim"] == "Dynamic"


@ONE_FAMILY
def test_what_no_lora_holds_is_told_with_its_share(folder: Path, change: Changed, tmp_path: Path):
    model, target = str(folder.with_name("tuned.safetensors")), tmp_path / "made.safetensors"
    made = extract(model, str(folder), target, rank=4)
    layers = {path_of(*key).removesuffix(".weight") for key in changes_of(target, skeleton(inspect_base(str(folder))))}
    squares = {"norms": 0.0, "biases": 0.0, "layers outside of the blocks": 0.0, "held": 0.0}
    for (component, name), tensor in change.items():
        if component == "unet":
            held = path_of(component, name).removesuffix(".weight") in layers
            kind = "held" if held else "norms" if "norm" in name else "biases" if "bias" in name else ""
            squares[kind or "layers outside of the blocks"] += float(tensor.square().sum())
    shares = {kind: (square / sum(squares.values())) ** 0.5 for kind, square in squares.items() if kind != "held"}
    assert made.beyond == {"unet": pytest.approx(shares, rel=1e-3), "vae": {"the VAE": 1.0}}
    assert made.unchanged["text_encoder"] == 3 * 6
    assert 0 < made.unchanged["unet"] < len(layers) + made.unchanged["unet"]
    share = made.beyond["unet"]["norms"]
    assert (
        f"Norms changed too ({share:.1%} of the change of unet): no LoRA holds that, so the file lacks it." in made.told
    )
    assert "The VAE changed too: no LoRA holds that, so the file lacks it." in made.told


@ONE_FAMILY
def test_an_energy_is_kept_by_the_least_rank_of_each_layer(folder: Path, change: Changed, tmp_path: Path):
    model, target = str(folder.with_name("tuned.safetensors")), tmp_path / "made.safetensors"
    made = extract(model, str(folder), target, energy=0.8, precision="fp32")
    base = skeleton(inspect_base(str(folder)))
    found = read_lora(target, base.components, "sdxl")["unet"]
    for delta in found:
        squares = torch.linalg.svdvals(change["unet", f"{delta.name}.weight"].flatten(1).double()).square()
        kept = squares.cumsum(0) / squares.sum()
        assert kept[delta.rank - 1] >= 0.8 - 1e-6
        assert delta.rank == 1 or kept[delta.rank - 2] < 0.8
        assert delta.alpha == 1.0
    assert sorted(made.ranks["unet"]) == sorted(delta.rank for delta in found)
    assert made.lost["unet"] <= 0.2**0.5 + 1e-4


@ONE_FAMILY
def test_what_half_precision_rounded_is_no_change(folder: Path, tmp_path: Path):
    def change(component: str, name: str, tensor: Tensor) -> Tensor:
        return tensor + 0.1 if name.endswith("layers.0.mlp.fc1.weight") and component == "text_encoder_2" else tensor

    rewrite(inspect_base(str(folder)), tmp_path / "half.safetensors", change, "fp16")
    made = extract(str(tmp_path / "half.safetensors"), str(folder), tmp_path / "made.safetensors", rank=2)
    assert made.ranks == {"text_encoder_2": [2]}
    assert made.unchanged["text_encoder_2"] == 3 * 6 - 1
    assert not made.beyond
    assert made.told == ("The models are of different precisions: what rounding changed counts as change.",)


@pytest.mark.parametrize("shape", [(320, 512), (512, 300), (384, 40, 3, 3)])
def test_large_layers_are_as_near_as_by_the_whole_svd(shape: tuple[int, ...]):
    """Singular values that fall slowly, as those of fine-tuning, are the hard case of random projections."""
    torch.manual_seed(3)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    size = min(rows, columns)
    u, v = torch.linalg.qr(torch.randn(rows, size))[0], torch.linalg.qr(torch.randn(columns, size))[0]
    values = torch.arange(1, size + 1) ** -0.5
    change = ((u * values) @ v.T).view(shape)
    random = torch.get_rng_state()
    made = nearest("layer", change, rank=16)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(made.up, nearest("layer", change, rank=16).up)  # the same file each time
    least = float(values[16:].norm())
    assert float((made.of(change) - change).norm()) <= 1.001 * least
    assert (made.rank, made.scale) == (16, 1.0)
    small = lora("layer", made.down, made.up, 16.0).of(change)
    assert float((nearest("layer", small, rank=16).of(change) - small).norm()) <= 1e-5 * float(small.norm())


@ONE_FAMILY
def test_what_cannot_be_extracted_is_refused(folder: Path, merged: Path, tmp_path: Path):
    def refusal(tuned: Path = merged, name: str = "made.safetensors", **sizes: float) -> str:
        with pytest.raises(UserError) as caught:
            extract(str(tuned), str(folder), tmp_path / name, **(sizes or {"rank": 2}))  # pyright: ignore[reportArgumentType]
        assert len(caught.value.problems) == 1
        return str(caught.value)

    assert "are of different families, sd1 and sdxl" in refusal(Path("pocket"))
    assert "differ in" in refusal(MAKERS["sdxl"](tmp_path / "small", layers_per_block=1))
    assert "no layer that a LoRA can change differs" in refusal(folder)
    assert "does not end in .safetensors" in refusal(name="made.ckpt")
    assert "neither is given" in refusal(rank=0)
    assert "both are given" in refusal(rank=2, energy=0.5)
    assert "out of bounds" in refusal(energy=1.5)
    assert "has no effect beside an energy" in refusal(energy=0.5, conv_rank=2)

    def broken(_component: str, name: str, tensor: Tensor) -> Tensor:
        return tensor * 2 if name == "conv_in.bias" else tensor

    rewrite(inspect_base(str(folder)), tmp_path / "broken", broken)
    whole = tmp_path / "broken/unet/diffusion_pytorch_model.safetensors"
    content = bytearray(whole.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # NaN
    whole.write_bytes(content)
    assert "broken: unet." in refusal(tmp_path / "broken")
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
