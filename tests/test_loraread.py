"""LoRA files of any trainer: the same changes whatever the names are, and no key that is left over unseen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from lorasmith.trainer.adapter import ADAPTER, deltas, tuner_layers
from lorasmith.trainer.bases import FamilyName, inspect_base
from lorasmith.trainer.config import AdapterSection
from lorasmith.trainer.delta import Delta, lora
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.fitting import put_on
from lorasmith.trainer.full import trained_weights
from lorasmith.trainer.keys import kohya_name
from lorasmith.trainer.loraread import merge, merged, parse_merge, read_lora
from lorasmith.trainer.models import Base, load_base

from .tiny import MAKERS

FAMILIES: list[FamilyName] = ["sd1", "sd2", "sdxl"]
RANK, ALPHA = 3, 6.0
Changes = dict[str, dict[str, Delta]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    place = tmp_path_factory.mktemp("bases")
    return {name: load_base(inspect_base(str(make(place / name)))) for name, make in MAKERS.items()}


def plain_path(component: str, path: str) -> str:
    return path if component == "unet" else "text_model." + path.removeprefix("text_model.")


def is_attention(path: str) -> bool:
    return bool(re.search(r"\.attn[12]\.to_(q|k|v|out\.0)$|\.self_attn\.(q|k|v|out)_proj$", path))


def some_changes(base: Base, alpha: float = ALPHA, wanted: Callable[[str], bool] = is_attention) -> Changes:
    """A random LoRA of every wanted layer, by component and path."""
    random = torch.Generator().manual_seed(7)
    found: Changes = {}
    for component, module in base.components.items():
        for path, layer in module.named_modules():
            weight = getattr(layer, "weight", None)
            if weight is None or weight.dim() not in (2, 4) or "embeddings." in path or not wanted(path):
                continue
            down = torch.randn(RANK, *weight.shape[1:], generator=random)
            up = torch.randn(weight.shape[0], RANK, *(1 for _ in weight.shape[2:]), generator=random)
            found.setdefault(component, {})[path] = lora(path, down, up, alpha)
    return found


def written(changes: Changes, naming: Callable[[str, str], tuple[str, str, str]]) -> dict[str, Tensor]:
    weights = {}
    for component, own in changes.items():
        for path, delta in own.items():
            down, up, alpha = naming(component, path)
            weights |= {down: delta.down.clone(), up: delta.up.clone()}
            if alpha:
                weights[alpha] = torch.tensor(delta.alpha)
    return weights


def kohya(name: str) -> tuple[str, str, str]:
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def with_alphas(family: FamilyName) -> dict[str, Callable[[str, str], tuple[str, str, str]]]:
    te = {"text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}
    prefix = {"unet": "lora_unet_", **te}
    te1 = prefix | {"text_encoder": "lora_te1_"}

    def underlined(prefixes: dict[str, str], component: str, path: str) -> tuple[str, str, str]:
        return kohya(prefixes[component] + plain_path(component, path).replace(".", "_"))

    return {
        "kohya": lambda c, p: kohya(kohya_name(family, c, p)),
        "kohya in diffusers' names": lambda c, p: underlined(prefix, c, p),
        "te1 on all families": lambda c, p: underlined(te1, c, p),
        "without text_model": lambda c, p: tuple(k.replace("text_model_", "") for k in underlined(prefix, c, p)),  # pyright: ignore
    }


def dotted(component: str, path: str, down: str, up: str) -> tuple[str, str, str]:
    name = f"{component}.{plain_path(component, path)}"
    return f"{name}{down}", f"{name}{up}", ""


def processors(component: str, path: str) -> tuple[str, str, str]:
    """diffusers until 0.19."""
    if component != "unet":
        return dotted(component, path, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    attention, which = re.fullmatch(r"(.*attn[12])\.to_(q|k|v|out)(?:\.0)?", path).groups()  # pyright: ignore
    name = f"unet.{attention}.processor.to_{which}_lora"
    return f"{name}.down.weight", f"{name}.up.weight", ""


def first_text(component: str, path: str) -> tuple[str, str, str]:
    """diffusers until 0.17."""
    if component == "unet":
        return tuple(key.removeprefix("unet.") for key in processors(component, path))  # pyright: ignore
    name = f"{component}.{plain_path(component, path)}"
    name = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1_lora", name)
    return f"{name}.down.weight", f"{name}.up.weight", ""


def wrapped(component: str, path: str) -> tuple[str, str, str]:
    down, up, _ = dotted(component, path, ".lora_A.default.weight", ".lora_B.default.weight")
    component, _, inside = down.partition(".")
    return f"{component}.base_model.model.{inside}", f"{component}.base_model.model.{up.partition('.')[2]}", ""


WITHOUT_ALPHAS: dict[str, Callable[[str, str], tuple[str, str, str]]] = {
    "diffusers": lambda c, p: dotted(c, p, ".lora_A.weight", ".lora_B.weight"),
    "diffusers without text_model": lambda c, p: tuple(  # pyright: ignore
        key.replace("text_model.", "") for key in dotted(c, p, ".lora_A.weight", ".lora_B.weight")
    ),
    "layers of diffusers": lambda c, p: dotted(c, p, ".lora.down.weight", ".lora.up.weight"),
    "processors of diffusers": processors,
    "the first text encoders": first_text,
    "PEFT": wrapped,
}
NAMINGS = [*with_alphas("sd1"), *WITHOUT_ALPHAS]


def require_same(found: dict[str, list[Delta]], changes: Changes, base: Base) -> None:
    assert {c: {d.name for d in own} for c, own in found.items()} == {c: set(own) for c, own in changes.items()}
    for component, own in found.items():
        for delta in own:
            weight = base.components[component].get_submodule(delta.name).weight
            torch.testing.assert_close(delta.of(weight), changes[component][delta.name].of(weight))


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_every_trainer_give_the_same_changes(
    bases: dict[str, Base], tmp_path: Path, family: FamilyName, naming: str
):
    base, alphas = bases[family], with_alphas(family)
    changes = some_changes(base, ALPHA if naming in alphas else RANK)
    save_file(written(changes, (alphas | WITHOUT_ALPHAS)[naming]), tmp_path / "lora.safetensors")
    require_same(read_lora(tmp_path / "lora.safetensors", base.components, family), changes, base)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_unet_is_found_by_its_kohya_name(bases: dict[str, Base], tmp_path: Path, family: FamilyName):
    """Also those that not all clients know, which other trainers may adapt."""
    base = bases[family]
    changes = some_changes(base, wanted=lambda path: True)
    naming = with_alphas(family)["kohya in diffusers' names"]
    save_file(written(changes, naming), tmp_path / "lora.safetensors")
    require_same(read_lora(tmp_path / "lora.safetensors", base.components, family), changes, base)


ORIGINAL = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@pytest.mark.parametrize("start", ["lora_unet_", "diffusion_model.", ""])
def test_the_original_names_of_sdxl_are_read_with_dots_as_well(bases: dict[str, Base], tmp_path: Path, start: str):
    base, file = bases["sdxl"], tmp_path / "lora.safetensors"
    changes = {"unet": some_changes(base, wanted=ORIGINAL.__contains__)["unet"]}
    assert changes["unet"].keys() == ORIGINAL.keys()
    names = {p: start + (name.replace(".", "_") if start.startswith("lora") else name) for p, name in ORIGINAL.items()}
    save_file(written(changes, lambda _, path: kohya(names[path])), file)
    require_same(read_lora(file, base.components, "sdxl"), changes, base)


# ---------------------------------------------------------------------------------------------------------------------
# what the libraries themselves write


def adapted(base: Base, **settings: Any) -> Base:
    live = load_base(base.info)
    put_on(live, AdapterSection(**({"rank": 4, "alpha": 2.0} | settings)), seed=1)
    torch.manual_seed(3)
    for parameter in trained_weights(live).values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return live


def live_changes(live: Base) -> Changes:
    return {c: {delta.name: delta for delta in deltas(module)} for c, module in live.components.items()}


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"targets": "all", "conv_rank": 2, "conv_alpha": 5.0}])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_diffusers_saves_with_its_alphas_is_read(
    bases: dict[str, Base], tmp_path: Path, family: FamilyName, settings: dict[str, Any]
):
    live, base = adapted(bases[family], **settings), bases[family]
    saved = {f"{c}_lora_layers": get_peft_model_state_dict(module) for c, module in live.components.items()}
    headers = {
        f"{c}_lora_adapter_metadata": module.peft_config[ADAPTER].to_dict() for c, module in live.components.items()
    }
    live.pipeline().save_lora_weights(tmp_path, **saved, **headers)
    found = read_lora(tmp_path / "pytorch_lora_weights.safetensors", base.components, family)
    require_same(found, live_changes(live), base)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_what_peft_saves_is_read(bases: dict[str, Base], tmp_path: Path, kind: str):
    base = bases["sd1"]
    live = adapted(base, kind=kind, alpha=4.0, targets="all")
    state = {
        f"{component}.{plain_path(component, name)}": tensor.contiguous()
        for component, module in live.components.items()
        for name, tensor in get_peft_model_state_dict(module).items()
    }
    save_file(state, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors", base.components, "sd1")
    require_same(found, live_changes(live), base)


def test_an_adapter_folder_of_peft_is_read_with_the_alpha_of_its_configuration(bases: dict[str, Base], tmp_path: Path):
    base = bases["sd1"]
    settings = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    model: Any = get_peft_model(load_base(base.info).unet, settings)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(str(tmp_path))
    [component] = read_lora(tmp_path / "adapter_model.safetensors", base.components, "sd1").items()
    assert component[0] == "unet"
    for delta in component[1]:
        layer: Any = model.base_model.model.get_submodule(delta.name)
        torch.testing.assert_close(delta.of(layer.base_layer.weight), layer.get_delta_weight("default"))


# ---------------------------------------------------------------------------------------------------------------------
# other forms


CONV = "down_blocks.0.resnets.0.conv2"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def one_layer(base: Base, tmp_path: Path, path: str, tensors: dict[str, Tensor]) -> Delta:
    name = f"lora_unet_{path.replace('.', '_')}"
    save_file({f"{name}.{leaf}": t.contiguous() for leaf, t in tensors.items()}, tmp_path / "one.safetensors")
    [delta] = read_lora(tmp_path / "one.safetensors", base.components, "sd1")["unet"]
    assert delta.name == path
    return delta


def test_forms_of_lycoris_are_read_with_their_scales(bases: dict[str, Base], tmp_path: Path):
    base = bases["sd1"]
    out, width, *_ = base.unet.get_submodule(CONV).weight.shape
    tucker = {
        "lora_down.weight": torch.randn(2, width, 1, 1),
        "lora_mid.weight": torch.randn(2, 2, 3, 3),
        "lora_up.weight": torch.randn(out, 2, 1, 1),
        "alpha": torch.tensor(1.0),
    }
    assert (one_layer(base, tmp_path, CONV, tucker).form, one_layer(base, tmp_path, CONV, tucker).scale) == (
        "lora",
        0.5,
    )
    cores = {f"hada_t{n}": torch.randn(2, 2, 3, 3) for n in (1, 2)}
    factors = {f"hada_w{n}_a": torch.randn(2, out) for n in (1, 2)} | {
        f"hada_w{n}_b": torch.randn(2, width) for n in (1, 2)
    }
    found = one_layer(base, tmp_path, CONV, cores | factors | {"alpha": torch.tensor(4.0)})
    assert (found.form, found.scale) == ("loha", 2.0)
    whole = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(out // 2, width // 2, 3, 3)}
    found = one_layer(base, tmp_path, CONV, whole | {"alpha": torch.tensor(9.0)})
    assert (found.form, found.scale) == ("lokr", 1.0)
    assert one_layer(base, tmp_path, CONV, {"diff": torch.randn(out, width, 3, 3)}).form == "full"


def test_the_lengths_of_a_dora_are_those_of_rows_or_columns_as_their_shape_says(bases: dict[str, Base], tmp_path: Path):
    base = bases["sd1"]
    weight = base.unet.get_submodule("up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj").weight
    path, (out, width) = "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj", weight.shape
    assert out != width
    tensors = {"lora_down.weight": torch.randn(2, width), "lora_up.weight": torch.randn(out, 2)}
    for lengths, dim in ((torch.rand(out, 1) + 1, 1), (torch.rand(1, width) + 1, 0)):
        changed = weight + one_layer(base, tmp_path, path, tensors | {"dora_scale": lengths}).of(weight)
        torch.testing.assert_close(changed.norm(dim=dim), lengths.flatten())


def test_ranks_and_alphas_may_differ_and_an_alpha_may_be_absent(bases: dict[str, Base], tmp_path: Path):
    base = bases["sd1"]
    width = base.unet.get_submodule(QUERY).weight.shape[0]
    weights = {}
    for number, leaf in enumerate(("to_q", "to_k", "to_v"), 1):
        name = f"lora_unet_{QUERY.replace('.', '_')}".replace("to_q", leaf)
        weights |= {
            f"{name}.lora_down.weight": torch.randn(number, width),
            f"{name}.lora_up.weight": torch.randn(width, number),
        }
        weights |= {f"{name}.alpha": torch.tensor([number / 2])} if number > 1 else {}
    save_file(weights, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors", base.components, "sd1")["unet"]
    assert {delta.name[-1]: (delta.rank, delta.scale) for delta in found} == {"q": (1, 1), "k": (2, 0.5), "v": (3, 0.5)}


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def good(base: Base) -> dict[str, Tensor]:
    return written(some_changes(base), with_alphas("sd1")["kohya"])


NAME = "lora_unet_" + QUERY.replace(".", "_")


@pytest.mark.parametrize(
    ("add", "says"),
    [
        ({"lora_unet_nowhere.alpha": torch.tensor(1.0)}, "1 of its .* keys are no part of .*lora_unet_nowhere.alpha"),
        ({f"{NAME}.diff_b": torch.zeros(8)}, "changes of biases and norms"),
        ({f"{NAME}.oft_blocks": torch.zeros(2, 4, 4)}, r"rotations \(OFT\)"),
        ({f"{NAME}.a1.weight": torch.zeros(2, 4)}, "GLoRA"),
        ({f"{NAME}.weight": torch.zeros(8), f"{NAME}.on_input": torch.zeros(1)}, "IA3"),
        ({"bundle_emb.x.string_to_param.*": torch.zeros(1, 8)}, "it holds embeddings"),
        ({"model.diffusion_model.out.2.weight": torch.zeros(4)}, "a whole model, not a LoRA"),
        ({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(1, 4)}, "a model of another kind"),
        ({f"unet.{QUERY}.lora_A.weight": torch.zeros(3, 8)}, "under another name as well"),
        ({f"{NAME}.alpha": torch.tensor([1.0, 2.0])}, "alpha of 2 numbers"),
        ({f"{NAME}.lora_up.weight": torch.full((8, 3), torch.nan)}, "NaN"),
        ({f"{NAME}.lora_up.weight": torch.zeros(9, 3)}, r"is of shape \(8, 8\), which .*lora_up.weight \(9, 3\)"),
    ],
)
def test_what_cannot_be_read_is_named(bases: dict[str, Base], tmp_path: Path, add: dict[str, Tensor], says: str):
    save_file(good(bases["sd1"]) | add, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=says) as caught:
        read_lora(tmp_path / "lora.safetensors", bases["sd1"].components, "sd1")
    assert "lora.safetensors" in str(caught.value)


def test_half_a_layer_is_refused(bases: dict[str, Base], tmp_path: Path):
    weights = good(bases["sd1"])
    del weights[f"{NAME}.lora_up.weight"]
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"is not complete: it holds alpha, lora_down\.weight only"):
        read_lora(tmp_path / "lora.safetensors", bases["sd1"].components, "sd1")


def test_an_empty_file_is_refused(bases: dict[str, Base], tmp_path: Path):
    save_file({}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="holds nothing"):
        read_lora(tmp_path / "lora.safetensors", bases["sd1"].components, "sd1")


def test_a_file_of_another_family_is_told_as_that(bases: dict[str, Base], tmp_path: Path):
    sdxl = bases["sdxl"]
    weights = written(some_changes(sdxl), with_alphas("sdxl")["kohya"])
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"it is for SDXL.*Take a LoRA made for"):
        read_lora(tmp_path / "lora.safetensors", bases["sd1"].components, "sd1")


def test_alphas_in_a_broken_header_are_refused(bases: dict[str, Base], tmp_path: Path):
    for broken in ("{", "[1]", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": {"(": 1}}'):
        weights = {key: tensor for key, tensor in good(bases["sd1"]).items() if not key.endswith(".alpha")}
        save_file(weights, tmp_path / "lora.safetensors", {"lora_adapter_metadata": broken})
        with pytest.raises(UserError, match=r"lora_adapter_metadata in its header, .* is not PEFT's configuration"):
            read_lora(tmp_path / "lora.safetensors", bases["sd1"].components, "sd1")


# ---------------------------------------------------------------------------------------------------------------------
# merging


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_changes_the_weights_as_the_live_adapter_does(
    bases: dict[str, Base], tmp_path: Path, family: FamilyName
):
    live = adapted(bases[family])
    fresh = load_base(live.info)
    changes = {component: list(own.values()) for component, own in live_changes(live).items()}
    before = {name: weight.clone() for name, weight in fresh.unet.state_dict().items()}
    with merged(fresh.components, changes, 0.5):
        delta = changes["unet"][0]
        weight = fresh.unet.get_submodule(delta.name).weight
        torch.testing.assert_close(weight, before[f"{delta.name}.weight"] + 0.5 * delta.of(weight))
    assert all(torch.equal(weight, before[name]) for name, weight in fresh.unet.state_dict().items())

    merge(fresh.components, changes)
    for _, layer in tuner_layers(live.unet):
        layer.merge()  # pyright: ignore
    for delta in changes["unet"]:
        ours, theirs = (base.unet.get_submodule(delta.name).weight for base in (fresh, live))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("detail.safetensors", "detail.safetensors", 1.0),
        ("detail.safetensors:0.6", "detail.safetensors", 0.6),
        ("a:b/detail.v1.safetensors:-1", "a:b/detail.v1.safetensors", -1.0),
        (r"C:\loras\detail.safetensors", r"C:\loras\detail.safetensors", 1.0),
        (r"C:\loras\detail.safetensors:0.6", r"C:\loras\detail.safetensors", 0.6),
        ("D.SafeTensors:2", "D.SafeTensors", 2.0),
    ],
)
def test_an_entry_is_a_path_and_a_strength(text: str, path: str, strength: float):
    assert parse_merge(text) == (Path(path), strength)


@pytest.mark.parametrize("text", ["", "detail", "detail.ckpt:0.5"])
def test_an_entry_that_names_no_file_is_refused(text: str):
    with pytest.raises(UserError, match=r"base.merge: .* is not a .safetensors file"):
        parse_merge(text)


@pytest.mark.parametrize("strength", ["", "much", "nan", "inf", "0"])
def test_an_entry_without_a_strength_is_refused(strength: str):
    with pytest.raises(UserError, match=r"base.merge: .* is no strength"):
        parse_merge(f"detail.safetensors:{strength}")
