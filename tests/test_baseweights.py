"""Whole models read and written tensor by tensor: the same as in memory, from every kind of source to every target."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.architectures import ARCHITECTURES, FamilyName
from lorasmith.trainer.bases import POCKET, BaseInfo, inspect_base
from lorasmith.trainer.baseweights import BaseWeights, rewrite
from lorasmith.trainer.delta import lora
from lorasmith.trainer.errors import BaseModelError, ConfigError, ExportError, UserError
from lorasmith.trainer.export import Precision, save, tensors
from lorasmith.trainer.filetools.blending import blend_bases
from lorasmith.trainer.ldm import text_name
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.strengths import Strengths
from lorasmith.trainer.wholemodel import save_checkpoint_file, save_model_folder

from .test_singlefile import in_ldm, save_vae, small_vae, write
from .tiny import MAKERS

Weights = dict[tuple[str, str], Tensor]


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family; no test changes it."""
    return MAKERS[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """The same as a file in LDM's names, in half precision."""
    path = folder.with_suffix(".safetensors")
    save_checkpoint_file(load_base(inspect_base(str(folder))), path)
    return path


def test_a_tokenizer_that_knows_no_words_is_refused(sd1: Path):
    """transformers makes one out of nothing, and every prompt would be the same."""
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (sd1 / "tokenizer" / name).unlink(missing_ok=True)
    info = inspect_base(str(sd1))
    for load in (load_base, lambda info: BaseWeights.open(info).whole_outline()):
        with pytest.raises(BaseModelError, match="tokenizer: holds no words"):
            load(info)


@pytest.fixture
def sd1(tmp_path: Path) -> Path:
    return MAKERS["sd1"](tmp_path / "sd1")


def weights_of(base: Base) -> Weights:
    """What `load_base` gives, by component and name in files."""
    parts = {**base.components, "vae": base.vae}
    found = {(c, n): tensor for c, module in parts.items() for n, tensor in module.state_dict().items()}
    return {(c, text_name(n) if "text" in c else n): tensor for (c, n), tensor in found.items()}


def loaded(model: Path | str) -> Weights:
    return weights_of(load_base(inspect_base(str(model))))


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    odd = [key for key in expected if not torch.equal(found[key].float(), expected[key].float())]
    assert not odd


def assert_read(info: BaseInfo) -> BaseWeights:
    """What is read tensor by tensor, is what `load_base` gives."""
    weights = BaseWeights.open(info)
    found = {(c, n): weights.tensor(c, n) for c, own in weights.names().items() for n in own}
    assert_same(found, weights_of(load_base(info)))
    return weights


def same(_component: str, _name: str, tensor: Tensor) -> Tensor:
    return tensor


def scaled_attention(component: str, name: str, tensor: Tensor) -> Tensor:
    """Changes that differ in q, k and v, which some files keep in one matrix."""
    factor = 2.0 if "q_proj" in name or "to_k" in name else -1.0 if "v_proj" in name or component == "vae" else 1.0
    return tensor * factor


# ---------------------------------------------------------------------------------------------------------------------
# reading


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_files_as_communities_share_them(family: FamilyName, tmp_path: Path):
    write(tmp_path / "model.safetensors", in_ldm(family))
    weights = assert_read(inspect_base(str(tmp_path / "model.safetensors")))
    assert weights.dtype("unet", "conv_in.weight") == torch.float16


def test_a_pickle_is_read(tmp_path: Path):
    torch.save({"state_dict": in_ldm("sd2"), "global_step": 3}, tmp_path / "model.ckpt")
    assert_read(inspect_base(str(tmp_path / "model.ckpt")))


def test_a_layer_is_found_with_and_without_text_model(sd1: Path):
    weights = BaseWeights.open(inspect_base(str(sd1)))
    layer = "encoder.layers.1.self_attn.q_proj"
    expected = load_file(sd1 / "text_encoder/model.safetensors")
    expected = next(tensor for name, tensor in expected.items() if name.endswith(f"{layer}.weight"))
    for path in (layer, f"text_model.{layer}"):
        assert torch.equal(weights.weight("text_encoder", path), expected)


def to_shards(folder: Path) -> None:
    """Of the UNet, as the Hub has large models: two files, and an index that names them."""
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    own = load_file(whole)
    names = sorted(own)
    shards = {"one-1-of-2": names[::2], "one-2-of-2": names[1::2]}
    for shard, part in shards.items():
        save_file({name: own[name].clone() for name in part}, folder / f"unet/{shard}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f"{shard}.safetensors" for shard, part in shards.items() for n in part}}
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps(index), encoding="utf-8")
    whole.unlink()


def to_half(folder: Path) -> None:
    """Nothing but the fp16 variant."""
    for whole in [*folder.glob("*/*.safetensors")]:
        own = {name: tensor.half() for name, tensor in load_file(whole).items()}
        save_file(own, whole.with_suffix(".fp16.safetensors"), {"format": "pt"})
        whole.unlink()


def to_old_names(folder: Path) -> None:
    """As saved years ago: with a buffer, with `text_model.`, and with other names in the VAE's attention."""
    whole = folder / "text_encoder/model.safetensors"
    own = {text_name(name): tensor.clone() for name, tensor in load_file(whole).items()}
    save_file(own | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, whole, {"format": "pt"})
    whole = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    own = {name: tensor.clone() for name, tensor in load_file(whole).items()}
    for new, name in old.items():
        own = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): tensor for key, tensor in own.items()}
    save_file(own, whole, {"format": "pt"})


@pytest.mark.parametrize("to", [to_shards, to_half, to_old_names])
def test_folders_as_others_make_them(to: Callable[[Path], None], sd1: Path):
    to(sd1)
    assert_read(inspect_base(str(sd1)))


def test_a_random_base_is_made_in_memory(sd1: Path, monkeypatch: pytest.MonkeyPatch):
    files = {"scheduler": "scheduler_config.json"}
    names = ("unet", "vae", "text_encoder", "scheduler")
    configs = {name: json.loads((sd1 / name / files.get(name, "config.json")).read_text("utf-8")) for name in names}
    for config in configs.values():
        for key in [key for key in config if key.startswith("_")]:
            del config[key]
    monkeypatch.setitem(ARCHITECTURES, "sd15", configs)
    assert_read(inspect_base("random:sd15"))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")  # diffusers uses it
def test_a_hub_model_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    commit, model = "c0ffee" + "0" * 34, tmp_path / "models--owner--name"
    MAKERS["sd1"](model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    info = inspect_base("owner/name")
    assert (info.source, info.revision) == ("owner/name", commit)
    weights = BaseWeights.open(info)
    expected = load_file(model / "snapshots" / commit / "unet/diffusion_pytorch_model.safetensors")
    assert torch.equal(weights.weight("unet", "conv_out"), expected["conv_out.weight"])
    (model / "snapshots" / commit / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"there is no diffusion_pytorch_model\.safetensors"):
        BaseWeights.open(info)


def small_lora(base: Base, path: Path) -> Path:
    """Of one attention layer and one of a text encoder."""
    torch.manual_seed(4)
    layers = {"unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"}
    layers["text_encoder"] = "encoder.layers.0.mlp.fc1"
    changes = {}
    for component, name in layers.items():
        out, inner = base.components[component].get_submodule(name).weight.shape
        changes[component] = [lora(name, torch.randn(2, inner), torch.randn(out, 2), 2.0)]
    save(path, tensors(base, changes, "kohya"), lambda _writer: {}, "kohya", "fp32")
    return path


@pytest.mark.parametrize("kind", ["subfolder", "whole model", "old diffusers"])
def test_another_vae_and_merged_files_are_part_of_the_base(kind: str, tmp_path: Path):
    model = write(tmp_path / "model.safetensors", in_ldm("sd1"))
    detail = small_lora(skeleton(inspect_base(str(model))), tmp_path / "detail.safetensors")
    torch.manual_seed(99)
    info = inspect_base(str(model), str(save_vae(kind, small_vae(), tmp_path)), [f"{detail}:0.5"])
    assert_read(info)
    rewrite(info, tmp_path / "made.safetensors", same, "fp32")
    assert_same(loaded(tmp_path / "made.safetensors"), weights_of(load_base(info)))


def test_what_is_missing_or_of_another_shape_is_named(sd1: Path):
    whole = sd1 / "unet/diffusion_pytorch_model.safetensors"
    own = {name: tensor.clone() for name, tensor in load_file(whole).items()}
    save_file(own | {"conv_in.bias": torch.zeros(3)}, whole)
    with pytest.raises(BaseModelError, match=r"unet: 1 weights are missing or of another shape, such as conv_in\.bias"):
        BaseWeights.open(inspect_base(str(sd1)))
    to_shards(sd1)
    (sd1 / "unet/one-2-of-2.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"unet: one-2-of-2\.safetensors is missing"):
        BaseWeights.open(inspect_base(str(sd1)))
    (sd1 / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BaseModelError, match="is no index of weights"):
        BaseWeights.open(inspect_base(str(sd1)))


# ---------------------------------------------------------------------------------------------------------------------
# writing


@pytest.mark.parametrize("kind", ["file to folder", "folder to file"])
def test_a_changed_model_is_read_back_as_it_was_meant(kind: str, folder: Path, file: Path, tmp_path: Path):
    model, target = (file, tmp_path / "made") if kind == "file to folder" else (folder, tmp_path / "made.safetensors")
    rewrite(inspect_base(str(model)), target, scaled_attention)
    assert_same(loaded(target), {key: scaled_attention(*key, tensor) for key, tensor in loaded(model).items()})
    assert not [path for path in tmp_path.iterdir() if path != target]


def test_a_file_is_the_same_as_of_a_model_in_memory(folder: Path, tmp_path: Path):
    info = inspect_base(str(folder))
    if info.family == "sdxl":  # marked for clients as a model that predicts v, and whose noise ends in zero SNR
        info = dataclasses.replace(info, prediction="v_prediction", zero_terminal_snr=True)
    mine, expected = tmp_path / "mine/model.safetensors", tmp_path / "model.safetensors"
    rewrite(info, mine, same, "bf16", merged_from=["base", "folder/detail"])
    save_checkpoint_file(load_base(info), expected, "bf16")
    assert_same_tensors(mine, expected)
    with safe_open(mine, framework="pt") as one, safe_open(expected, framework="pt") as other:
        own = {"modelspec.hash_sha256", "modelspec.merged_from"}
        assert {key: one.metadata()[key] for key in one.metadata() if key not in own} == other.metadata()
        assert one.metadata()["modelspec.merged_from"] == "base, detail"


def assert_same_tensors(one: Path, other: Path) -> None:
    mine, theirs = load_file(one), load_file(other)
    assert {key: t.dtype for key, t in mine.items()} == {key: t.dtype for key, t in theirs.items()}
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_folder_is_the_same_as_of_a_model_in_memory(folder: Path, tmp_path: Path):
    info, one, other = inspect_base(str(folder)), tmp_path / "one", tmp_path / "other"
    rewrite(info, one, same, "fp16")
    save_model_folder(load_base(info), other)
    files = sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    for name in files:
        if name.suffix == ".safetensors":
            assert_same_tensors(one / name, other / name)
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_without_a_precision_each_weight_keeps_its_type(precision: Precision | None, sd1: Path, tmp_path: Path):
    to_half(sd1)
    vae = {name: tensor.float() for name, tensor in load_file(next(sd1.glob("vae/*.safetensors"))).items()}
    save_file(vae, sd1 / "vae/diffusion_pytorch_model.safetensors", {"format": "pt"})
    rewrite(inspect_base(str(sd1)), tmp_path / "made.safetensors", lambda *_: _[-1].float(), precision)
    types = {key.split(".")[0]: tensor.dtype for key, tensor in load_file(tmp_path / "made.safetensors").items()}
    kept = torch.float32 if precision else torch.float16
    assert types == {"model": kept, "cond_stage_model": kept, "first_stage_model": torch.float32}


@pytest.mark.parametrize("folder", ["sdxl"], indirect=True)
def test_memory_holds_few_weights_at_a_time(folder: Path, tmp_path: Path):
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def change(_component: str, _name: str, tensor: Tensor) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        made = tensor.clone()
        alive.append(weakref.ref(made))
        return made

    seen: list[tuple[int, int]] = []
    rewrite(inspect_base(str(folder)), tmp_path / "made", change)
    rewrite(inspect_base(str(folder)), tmp_path / "made.safetensors", change, progress=lambda *at: seen.append(at))
    count = len(loaded(folder))
    assert seen == [(number, count) for number in range(1, count + 1)]
    assert len(alive) == 2 * count
    assert most <= 4  # q, k and v of one layer, and what was written before


def overflowing(_component: str, name: str, tensor: Tensor) -> Tensor:
    return tensor * 1e6 + 1e6 if name == "conv_in.bias" else tensor


def broken(_component: str, name: str, tensor: Tensor) -> Tensor:
    return tensor * float("nan") if name == "conv_in.bias" else tensor


@pytest.mark.parametrize(
    ("change", "told", "into"),
    [
        (overflowing, r"conv_in\.bias: is beyond the range of float16", "made.safetensors"),
        (broken, r"conv_in\.bias: holds what is no number", "made"),
    ],
)
def test_what_is_not_finite_is_not_written(change: Any, told: str, into: str, sd1: Path, tmp_path: Path):
    rewrite(inspect_base(str(sd1)), tmp_path / into, same)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ExportError, match=told):
        rewrite(inspect_base(str(sd1)), tmp_path / into, change, "fp16")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_the_disk_changed_is_found(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lorasmith.trainer.tensorfile import TensorWriter

    write = TensorWriter.write

    def damaging(self: TensorWriter, path: Path, metadata: dict[str, str]) -> None:
        write(self, path, metadata)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(TensorWriter, "write", damaging)
    with pytest.raises(ExportError, match="was not read back"):
        rewrite(inspect_base(str(sd1)), tmp_path / "made.safetensors", same)
    assert {path.name for path in tmp_path.iterdir()} == {"sd1"}


def test_what_is_read_is_not_overwritten(sd1: Path, tmp_path: Path):
    info = inspect_base(str(sd1))
    for target in (sd1, tmp_path):
        with pytest.raises(UserError, match="is what is read, or holds it"):
            rewrite(info, target, same)
    with pytest.raises(UserError, match="would be a pickle"):
        rewrite(info, tmp_path / "made.ckpt", same)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(UserError, match="holds no model"):
        rewrite(info, tmp_path / "letters", same)


def test_a_tokenizer_of_its_own_needs_a_folder(sd1: Path, tmp_path: Path):
    tokenizer = CLIPTokenizer.from_pretrained(POCKET / "tokenizer")
    tokenizer.add_tokens("<new>")
    tokenizer.save_pretrained(sd1 / "tokenizer")
    with pytest.raises(ExportError, match="Save a diffusers folder"):
        rewrite(inspect_base(str(sd1)), tmp_path / "made.safetensors", same)
    rewrite(inspect_base(str(sd1)), tmp_path / "made", same)
    assert "<new>" in load_base(inspect_base(str(tmp_path / "made"))).tokenizers[0].get_vocab()


# ---------------------------------------------------------------------------------------------------------------------
# blending


@pytest.fixture
def tuned(folder: Path, tmp_path: Path) -> Path:
    """The model after other weights were found for all of it."""

    def change(_component: str, _name: str, tensor: Tensor) -> Tensor:
        return tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))

    rewrite(inspect_base(str(folder)), tmp_path / "tuned.safetensors", change, "fp32")
    return tmp_path / "tuned.safetensors"


@pytest.mark.parametrize("folder", ["sdxl"], indirect=True)
def test_a_blend_lies_between_the_two_by_block(folder: Path, tuned: Path, tmp_path: Path):
    share = Strengths.parse(0.25, ["unet.mid_block=1", "vae=0", "text_encoder.encoder.layers.0=0.5"])
    blend_bases(str(folder), str(tuned), share, tmp_path / "blend.safetensors")
    first, second, found = loaded(folder), loaded(tuned), loaded(tmp_path / "blend.safetensors")
    for key, tensor in found.items():
        path = f"{key[0]}.{key[1].removeprefix('text_model.')}"
        s = 1.0 if path.startswith("unet.mid_block") else 0.0 if key[0] == "vae" else 0.25
        s = 0.5 if path.startswith("text_encoder.encoder.layers.0.") else s
        torch.testing.assert_close(tensor, (1 - s) * first[key] + s * second[key], rtol=1e-5, atol=1e-6)
        assert s % 1 or torch.equal(tensor, (second if s else first)[key])


def test_what_cannot_be_blended_is_refused(sd1: Path, tmp_path: Path):
    def refusal(second: Path, target: str = "blend") -> str:
        with pytest.raises(UserError) as caught:
            blend_bases(str(sd1), str(second), Strengths(0.5), tmp_path / target)
        return str(caught.value)

    other = MAKERS["sd1"](tmp_path / "other", layers_per_block=1)
    assert "differ in" in refusal(other)
    assert "absent" in refusal(other)
    assert "predict different things" in refusal(MAKERS["sd2"](tmp_path / "sd2"))
    assert "of different families" in refusal(MAKERS["sdxl"](tmp_path / "sdxl"))
    assert "is what is read" in refusal(other, target="other")
    with pytest.raises(ConfigError, match=r"unet\.nowhere"):
        blend_bases(str(sd1), str(sd1), Strengths.parse(0.5, ["unet.nowhere=1"]), tmp_path / "blend")
