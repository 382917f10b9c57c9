"""A museum of bad LoRA files: each is named for what it is, in one line, and nothing is read that is not there."""

from __future__ import annotations

import io
import json
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from lorasmith.trainer.anatomy import skeleton
from lorasmith.trainer.bases import FamilyName, inspect_base
from lorasmith.trainer.diagnosis.findings import Finding, findings
from lorasmith.trainer.diagnosis.inspection import inspect
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.models import Base

from .command import lorasmith

Weights = dict[str, Tensor]
Metadata = dict[str, str]

# ---------------------------------------------------------------------------------------------------------------------
# files that cannot be opened


def raw(header: str | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start: int, end: int, shape: str = "[1]", dtype: str = "F32") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}'


def whole_file() -> bytes:
    return save({f"lora_unet_{name}.alpha": torch.ones(25) for name in "abcd"})


def pickle(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": torch.ones(3)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("lora.safetensors", whole_file())
    return buffer.getvalue()


PAGE = b"<!DOCTYPE html><html><head><title>Log in</title></head><body>Please log in to download this.</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9\n"
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "three bytes": (b"abc", "it has 3 bytes, too few even for a header"),
    "cut in a tensor": (
        whole_file()[:-150],
        r"the last 150 bytes of it are missing, and with them 2 of its 4 tensors, from lora_unet_c\.alpha on",
    ),
    "cut in the header": (whole_file()[:60], r"ends \d+ bytes before the end of its header"),
    "too long": (whole_file() + b"\0" * 7, "goes on for 7 bytes after its last tensor"),
    "a header of 2 GB": (raw('{"a":', length=1 << 31), "says that its header has 2,147,483,648 bytes"),
    "a header beyond all disks": (raw('{"a":', length=(1 << 64) - 1), "says that its header has 18,446,744,"),
    "a header beyond the file": (raw("{}", length=5000), "ends 4,998 bytes before the end of its header"),
    "zeros": (bytes(4096), "zeros where its header should be"),
    "not JSON": (raw('{"a":' + entry(0, 4) + ",}", b"1234"), "header is not JSON"),
    "nested without end": (raw('{"a":' + "[" * 100_000, b""), "header is not JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "header is not UTF-8 from byte 2 on"),
    "NaN": (raw('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"), "NaN is no number in JSON"),
    "a number without end": (raw('{"a":' + "9" * 5000 + "}"), "header is not JSON"),
    "half a letter": (raw('{"a\\ud800":' + entry(0, 4) + "}", b"1234"), "not read by the safetensors library"),
    "a key twice": (raw(f'{{"a":{entry(0, 4)},"a":{entry(0, 4)}}}', b"1234"), "its header holds a twice"),
    "overlap": (raw(f'{{"a":{entry(0, 4)},"b":{entry(2, 6)}}}', b"123456"), "a and b are in the same place"),
    "a hole": (
        raw(f'{{"a":{entry(0, 4)},"b":{entry(6, 10)}}}', b"1234567890"),
        "2 bytes between a and b belong to no tensor",
    ),
    "too small for its shape": (
        raw(f'{{"a":{entry(0, 4, "[2,3]")}}}', b"1234"),
        "gives 4 bytes to a, which by its shape and type has 24 bytes",
    ),
    "fp4": (raw(f'{{"a":{entry(0, 1, "[2]", "F4")}}}', b"1"), "holds a of the type F4, which clients .* do not read"),
    "no such type": (raw(f'{{"a":{entry(0, 1, "[2]", "INT3")}}}', b"1"), "of the type INT3"),
    "a negative size": (raw(f'{{"a":{entry(0, 4, "[-1]")}}}', b"1234"), "does not say type, shape and place of a"),
    "an absurd size": (
        raw(f'{{"a":{entry(0, 0, f"[0,{2**62},{2**62}]")}}}'),
        "does not say type, shape and place of a",
    ),
    "no tensor": (raw('{"a":5}'), "does not say type, shape and place of a"),
    "metadata that are no text": (raw('{"__metadata__":{"ss_epoch":5}}'), "ss_epoch in its metadata is not text"),
    "a pickle": (pickle(legacy=False), r"a pickle \(.ckpt, .pt\) under another name"),
    "an old pickle": (pickle(legacy=True), r"a pickle \(.ckpt, .pt\) under another name"),
    "a pickle cut short": (pickle(legacy=False)[:300], r"a pickle \(.ckpt, .pt\) under another name"),
    "a zip archive": (zipped(), "it is a zip archive"),
    "a web page": (PAGE, "it is a web page"),
    "a server's answer": (b'{"error":"Unauthorized","message":"log in"}', "a text in JSON, such as a server's answer"),
    "a pointer": (POINTER, "a pointer of git-lfs"),
    "a letter": (b"not a model, but a long letter" * 9, "it is a text"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "it is a picture"),
    "noise": (bytes([3, 0, 0, 0, 0, 0, 0, 0]) + bytes(range(99)), "there is something else"),
    "a key that would take many lines": (
        raw('{"a\\n\\nb' + "x" * 500 + '":5}'),
        r"does not say type, shape and place of a\\n\\nbx+\.\.\.\. ",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_opened_says_why_in_one_line(tmp_path: Path, name: str):
    content, says = UNREADABLE[name]
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        inspect(path)
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    assert problem.fix
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_folder_and_no_file_at_all_are_told_apart(tmp_path: Path):
    with pytest.raises(UserError, match="is a folder"):
        LoraFile.open(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        LoraFile.open(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("begins", [b"{", b"\0"])
def test_a_huge_header_is_not_read(tmp_path: Path, begins: bytes):
    path = tmp_path / "lora.safetensors"
    with path.open("wb") as file:
        file.write(raw(begins, length=200_000_000))
        file.truncate(250_000_000)  # a hole, which takes no space
    tracemalloc.start()
    with pytest.raises(UserError, match="its header has 200,000,000 bytes"):
        inspect(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000


@pytest.mark.parametrize("name", ["a header of 2 GB", "cut in a tensor", "a web page"])
def test_the_command_says_it_without_a_traceback(tmp_path: Path, name: str):
    content, says = UNREADABLE[name]
    (tmp_path / "lora.safetensors").write_bytes(content)
    done = lorasmith(tmp_path, "inspect", "lora.safetensors", code=2)
    assert not done.stdout
    assert re.search(says, done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")


# ---------------------------------------------------------------------------------------------------------------------
# good files, a few layers of the full size

RANK = 4
MID = "mid_block_attentions_0_transformer_blocks_0"
SIZES: dict[FamilyName, tuple[str, dict[str, tuple[int, int]]]] = {
    "sd1": (f"lora_unet_{MID}", {"lora_te": (768, 3072)}),
    "sd2": (f"lora_unet_{MID}", {"lora_te": (1024, 4096)}),
    "sdxl": ("lora_unet_middle_block_1_transformer_blocks_0", {"lora_te1": (768, 3072), "lora_te2": (1280, 5120)}),
}
TEXT_WIDTH = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
VERSIONS = {"sd1": ("sd_v1", "False"), "sd2": ("sd_v2", "True"), "sdxl": ("sdxl_base_v1-0", "False")}


def good(family: FamilyName) -> tuple[Weights, Metadata]:
    """A LoRA of some attention and feed-forward layers."""
    unet, texts = SIZES[family]
    layers = {f"{unet}_attn1_to_{which}": (1280, 1280) for which in ("q", "k", "v", "out_0")}
    layers |= {f"{unet}_attn2_to_{which}": (1280, TEXT_WIDTH[family]) for which in ("k", "v")}
    for text, (width, wide) in texts.items():
        start = f"{text}_text_model_encoder_layers_0"
        layers |= {f"{start}_self_attn_{which}_proj": (width, width) for which in ("q", "k", "v", "out")}
        layers |= {f"{start}_mlp_fc1": (wide, width)}
    random, weights = torch.Generator().manual_seed(0), {}
    for name, (out, into) in layers.items():
        weights[f"{name}.lora_down.weight"] = torch.randn(RANK, into, generator=random).half()
        weights[f"{name}.lora_up.weight"] = torch.randn(out, RANK, generator=random).half() / 10
        weights[f"{name}.alpha"] = torch.tensor(2.0)
    version, v2 = VERSIONS[family]
    dims = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_output_name": "lora"}
    return weights, {"ss_base_model_version": version, "ss_v2": v2, **dims}


@pytest.fixture(scope="module")
def bases() -> dict[str, Base]:
    """The published shapes."""
    names: dict[FamilyName, str] = {"sd1": "random:sd15", "sd2": "random:sd21", "sdxl": "random:sdxl"}
    return {family: skeleton(inspect_base(name)) for family, name in names.items()}


def saved(weights: Mapping[str, Tensor], metadata: Metadata, folder: Path) -> Path:
    path = folder / "lora.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in weights.items()}, path, metadata or None)
    return path


def told(path: Path, base: Base | None = None) -> list[Finding]:
    """What is found, after a look at its form: one line each, none twice, the worst first."""
    found = findings(LoraFile.open(path), base)
    assert all(len(str(finding).splitlines()) == 1 for finding in found)
    assert len({(finding.what, finding.where) for finding in found}) == len(found)
    severities = [finding.severity for finding in found]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    return found


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_nothing_is_found_in_a_good_file(bases: dict[str, Base], tmp_path: Path, family: FamilyName):
    path = saved(*good(family), tmp_path)
    assert told(path) == []
    assert told(path, bases[family]) == []
    assert inspect(path)["findings"] == []
    assert inspect(path)["family"] == family


# ---------------------------------------------------------------------------------------------------------------------
# files that can be opened


def rename(old: str, new: str) -> Callable[[Weights, Metadata], None]:
    def spoil(weights: Weights, _: Metadata) -> None:
        for key in [key for key in weights if re.search(old, key)]:
            weights[re.sub(old, new, key)] = weights.pop(key)

    return spoil


def drop(pattern: str) -> Callable[[Weights, Metadata], None]:
    def spoil(weights: Weights, _: Metadata) -> None:
        for key in [key for key in weights if re.search(pattern, key)]:
            del weights[key]

    return spoil


def put(pattern: str, value: Callable[[Tensor], Tensor]) -> Callable[[Weights, Metadata], None]:
    def spoil(weights: Weights, _: Metadata) -> None:
        for key in [key for key in weights if re.search(pattern, key)]:
            weights[key] = value(weights[key])

    return spoil


def add(**tensors: Tensor) -> Callable[[Weights, Metadata], None]:
    """Underlines of a keyword stand for dots where there are two."""

    def spoil(weights: Weights, _: Metadata) -> None:
        weights |= {key.replace("__", "."): tensor for key, tensor in tensors.items()}

    return spoil


def only(**tensors: Tensor) -> Callable[[Weights, Metadata], None]:
    def spoil(weights: Weights, metadata: Metadata) -> None:
        weights.clear()
        metadata.clear()
        weights |= {key.replace("__", "."): tensor for key, tensor in tensors.items()}

    return spoil


def say(**metadata: str) -> Callable[[Weights, Metadata], None]:
    return lambda _, there: there.update({key.replace("__", "."): value for key, value in metadata.items()})


def bundle(words: int) -> Callable[[Weights, Metadata], None]:
    """Embeddings as LyCORIS and OneTrainer pack them."""

    def spoil(weights: Weights, _: Metadata) -> None:
        weights |= {f"bundle_emb.word{number}.string_to_param.*": torch.zeros(1, 768) for number in range(words)}

    return spoil


def dotted(weights: Weights, _: Metadata) -> None:
    """As PEFT and diffusers name them."""
    names = {"lora_down": "lora_A", "lora_up": "lora_B"}
    for key in [key for key in weights if "_to_q" in key]:
        leaf = re.sub(r"lora_(down|up)", lambda found: names[found[0]], key.partition(".")[2])
        tensor = weights.pop(key)
        if leaf != "alpha":
            weights[f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.{leaf}"] = tensor


def put_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


def flat_projection(weights: Weights, _: Metadata) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    weights |= {f"{name}.lora_down.weight": torch.ones(4, 1280), f"{name}.lora_up.weight": torch.ones(1280, 4)}
    weights[f"{name}.alpha"] = torch.tensor(2.0)


def as_loha(weights: Weights, _: Metadata) -> None:
    for key in [key for key in weights if re.search("attn1_to_q.lora", key)]:
        tensor, name = weights.pop(key), key.partition(".")[0]
        which = "b" if "down" in key else "a"
        weights |= {f"{name}.hada_w{number}_{which}": tensor for number in "12"}


def as_whole_lokr(weights: Weights, _: Metadata) -> None:
    name = f"lora_unet_{MID}_attn1_to_q"
    drop(f"{name}.lora")(weights, _)
    weights |= {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(640, 640)}


def peft_metadata(weights: Weights, metadata: Metadata) -> None:
    dotted(weights, metadata)
    drop("lora_te|lora_unet")(weights, metadata)
    metadata["lora_adapter_metadata"] = json.dumps({"unet.r": 4, "unet.lora_alpha": 2})


Q = f"lora_unet_{MID}_attn1_to_q"
SPOILT: dict[str, tuple[FamilyName, Callable[[Weights, Metadata], None], str]] = {
    # alphas
    "no alpha": ("sd1", drop("alpha$"), "warning: 11 layers, such as .*: has no alpha: clients take its rank"),
    "one alpha less": ("sd1", drop(f"{Q}.alpha$"), f"warning: {Q}: has no alpha"),
    "alpha 0": ("sd1", put("to_q.alpha", torch.zeros_like), rf"error: {Q}.alpha: is 0: the layer does nothing"),
    "a negative alpha": ("sd1", put("to_q.alpha", torch.neg), "warning: .*to_q.alpha: is negative"),
    "an alpha of NaN": ("sd1", put("to_q.alpha", lambda t: t * float("nan")), "error: .*alpha: is NaN or infinity"),
    "whole numbers as alphas": ("sd1", put("alpha$", torch.Tensor.long), "warning: 11 keys.*stable-diffusion.cpp ends"),
    "an alpha of many numbers": ("sd1", put("to_q.alpha", lambda t: t.expand(4)), "error: .*alpha: is not one number"),
    "mixed alphas": (
        "sd1",
        put(r"to_q.alpha", lambda t: t * 2),
        f"warning: {Q}: has alpha 4 where most of unet have 2, which diffusers takes for all",
    ),
    "PEFT's configuration beside alphas": ("sd1", say(lora_adapter_metadata="{}"), "error: .*diffusers refuses"),
    "PEFT's configuration alone": ("sd1", peft_metadata, r"warning: .*\(alpha\) stands here alone"),
    # keys
    "no up": ("sd1", drop("to_q.lora_up"), f"error: {Q}: lacks lora_up.weight, so that clients refuse or skip it"),
    "no down": ("sd1", drop("lora_down"), "error: 11 layers, such as .*: lacks lora_down.weight"),
    "an alpha alone": ("sd1", drop("to_q.lora_"), f"error: {Q}: lacks all but its alpha"),
    "a stray key": ("sd1", add(lora_unet_nothing__alpha=torch.ones(())), r"error: lora_unet_nothing.alpha: .*a LoRA"),
    "an unknown leaf": ("sd1", rename("to_q.lora_up", "to_q.lora_upp"), "error: .*lora_upp.weight: is no part of"),
    "many stray keys": ("sd1", rename("lora_unet_mid", "lora_unet_middle_of"), "error: 18 keys.*skip the whole file"),
    "mixed block naming": (
        "sdxl",
        rename("middle_block_1_transformer_blocks_0_attn1_to_q", f"{MID}_attn1_to_q"),
        f"error: {Q}: is named in another way than the other 5 layers of the UNet.*diffusers drops one kind",
    ),
    "original names on SD 1": (
        "sd1",
        rename("mid_block_attentions_0", "middle_block_1"),
        "error: 6 layers, .*name of the original code, and for Stable Diffusion 1 diffusers refuses",
    ),
    "text encoders without text_model": (
        "sd1",
        rename("text_model_", ""),
        "error: 5 layers, such as lora_te_encoder_layers_0.*lacks text_model_.*transformers from 5.6",
    ),
    "a numbered text encoder on SD 1": ("sd1", rename("lora_te_", "lora_te1_"), "warning: 5 layers.*InvokeAI and sd-"),
    "an unnumbered one on SDXL": ("sdxl", rename("lora_te1_", "lora_te_"), "warning: 5 layers.*A1111 leaves it out"),
    "the name of an adapter": ("sd1", rename(r"lora_up\.weight", "lora_B.default.weight"), "warning: 11 keys.*adapter"),
    "torch.compile's wrapper": ("sd1", rename("lora_unet_", "lora_unet__orig_mod_"), "error: 18 keys.*of a wrapper"),
    "DDP's wrapper": ("sd1", rename("lora_unet_", "module.lora_unet_"), "error: 18 keys.*of a wrapper"),
    "names of diffusers": ("sd1", dotted, r"warning: unet\.mid_block\..*only diffusers reads it whole"),
    "part of an attention": ("sdxl", drop("te2.*k_proj"), "warning: lora_te2.*self_attn: does not adapt all of q, k"),
    "layers outside of the blocks": (
        "sd1",
        add(
            **{
                "lora_unet_conv_in__lora_down__weight": torch.ones(4, 4, 3, 3),
                "lora_unet_conv_in__lora_up__weight": torch.ones(320, 4, 1, 1),
                "lora_unet_conv_in__alpha": torch.tensor(2.0),
            }
        ),
        "warning: lora_unet_conv_in: lies outside of the blocks: sd-scripts leaves it out",
    ),
    "an upsampler's name that A1111 looks for elsewhere": (
        "sdxl",
        only(
            **{
                "lora_unet_up_blocks_0_upsamplers_0_conv__lora_down__weight": torch.ones(4, 1280, 3, 3),
                "lora_unet_up_blocks_0_upsamplers_0_conv__lora_up__weight": torch.ones(1280, 4, 1, 1),
                "lora_te2_text_model_encoder_layers_0_mlp_fc1__lora_down__weight": torch.ones(4, 1280),
                "lora_te2_text_model_encoder_layers_0_mlp_fc1__lora_up__weight": torch.ones(5120, 4),
            }
        ),
        "warning: lora_unet_up_blocks_0_upsamplers_0_conv: .*A1111 does not find it",
    ),
    # kinds
    "DoRA": ("sd1", add(**{f"{Q}__dora_scale": torch.ones(1280, 1)}), f"warning: {Q}: is a dora, of which A1111"),
    "LoHa": ("sd1", as_loha, f"warning: {Q}: is a loha, which diffusers, sd-scripts do not read"),
    "LoKr of whole factors": ("sd1", as_whole_lokr, f"note: {Q}.alpha: has no effect"),
    "GLoRA": ("sd1", add(**{f"{Q}x__a1__weight": torch.ones(2)}), "warning: .*is of a GLoRA"),
    "OFT": ("sd1", add(**{f"{Q}x__oft_blocks": torch.ones(2, 2, 2)}), "warning: .*is a rotation"),
    "IA3": ("sd1", add(**{f"{Q}x__on_input": torch.ones(1)}), "warning: .*is of an IA3"),
    "norms": ("sd1", add(lora_unet_conv_norm_out__w_norm=torch.ones(9)), "warning: .*change of a bias or norm"),
    "bundled embeddings": ("sd1", bundle(1), "warning: bundle_emb.*: is of an embedding bundled.*diffusers refuses"),
    "many bundled embeddings": ("sd1", bundle(13), "warning: 13 keys.*Forge and Fooocus skip the whole file"),
    "Flux": (
        "sd1",
        only(
            lora_unet_double_blocks_0_img_attn_qkv__lora_down__weight=torch.ones(4, 9),
            lora_unet_double_blocks_0_img_attn_qkv__lora_up__weight=torch.ones(9, 4),
        ),
        "error: 2 keys, .*: is of a LoRA for Flux",
    ),
    "SD 3": (
        "sd1",
        only(transformer__transformer_blocks__0__attn__to_q__lora_A__weight=torch.ones(4, 9)),
        "error: .*diffusion transformer",
    ),
    "a checkpoint": (
        "sd1",
        only(model__diffusion_model__out__2__weight=torch.ones(4), first_stage_model__x=torch.ones(4)),
        "error: 2 keys.*: is of a whole model",
    ),
    "a UNet": (
        "sd1",
        only(down_blocks__0__resnets__0__conv1__weight=torch.ones(4)),
        "error: .*whole weight of a model",
    ),
    "an embedding": ("sd1", only(emb_params=torch.ones(1, 768)), r"error: emb_params: is of an embedding"),
    "a ControlNet": ("sd1", only(control_model__x__weight=torch.ones(1)), "error: .*is of a ControlNet"),
    "nothing": ("sd1", only(), "error: the file: holds no tensors"),
    # tensors
    "zeros": ("sd1", put("lora_up", torch.zeros_like), "error: the file: does nothing"),
    "a text encoder of zeros": ("sd1", put("te_.*lora_up", torch.zeros_like), "error: text_encoder: does nothing"),
    "a layer of zeros": ("sd1", put("to_q.lora_up", torch.zeros_like), f"note: {Q}: does nothing, while other layers"),
    "NaN": ("sd1", put("to_q.lora_up", put_nan), f"error: {Q}.lora_up.weight: holds NaN or infinity"),
    "beyond fp16": ("sd1", put("to_q.lora_up", lambda t: t.float() * 1e7), "warning: .*beyond 65,504"),
    "below fp16": ("sd1", put("to_q.lora_up", lambda t: t.float() * 1e-9), "note: .*only numbers below 0.00006"),
    "fp8": ("sd1", put("lora_", lambda t: t.to(torch.float8_e4m3fn)), "warning: 22 keys.*is of fp8"),
    "the other fp8": ("sd1", put("lora_", lambda t: t.to(torch.float8_e5m2)), "warning: 22 keys.*is of fp8"),
    "bf16": ("sd1", put("lora_", torch.Tensor.bfloat16), "note: 22 keys.*is of bf16"),
    "int8": ("sd1", put("to_q.lora_up", torch.Tensor.char), "error: .*of a type of whole numbers"),
    "two ranks": (
        "sd1",
        put("to_q.lora_up", lambda t: t[:, :2]),
        r"error: .*to_q: .*ranks.*down is 4 x 1280, up is 1280 x 2",
    ),
    "empty factors": ("sd1", put("to_q.lora", lambda t: t[:0]), "error: .*to_q: .*or no matrices: down is 0 x 1280"),
    "flat factors": ("sd1", put("to_q.lora_up", torch.Tensor.flatten), "error: .*or no matrices"),
    "a flat projection on SD 1": ("sd1", flat_projection, "warning: .*proj_in: is not of the dimensions.*sd-scripts"),
    # metadata
    "SDXL that A1111 hides": ("sdxl", say(ss_base_model_version="x"), "warning: ss_base_model_version.*do not list"),
    "SD 2 that A1111 hides": ("sd2", say(ss_v2="true"), "warning: ss_v2: is true, so that A1111 and Forge do not list"),
    "SD 1 that says SDXL": ("sd1", say(ss_base_model_version="sdxl_base_v1-0"), "warning: .*says that .* for SDXL"),
    "another rank": ("sd1", say(ss_network_dim="32"), "warning: ss_network_dim: is 32, and the tensors have 4"),
    "another alpha": ("sd1", say(ss_network_alpha="16"), "warning: ss_network_alpha: is 16, and the tensors have 2"),
    "tags of NaN": ("sd1", say(ss_tag_frequency='{"a": {"b": NaN}}'), "warning: ss_tag_frequency: .*strict JSON"),
    "tags by halves": ("sd1", say(ss_tag_frequency='{"a": {"b": 0.5}}'), "warning: ss_tag_frequency: .*whole numbers"),
    "folders in a list": ("sd1", say(ss_dataset_dirs="[]"), "warning: ss_dataset_dirs: is not an object"),
    "buckets cut short": ("sd1", say(ss_bucket_info='{"buckets":'), "warning: ss_bucket_info: is not an object"),
    "no time": ("sd1", say(ss_training_started_at="None"), "warning: ss_training_started_at: is None, no number"),
    "another hash": ("sd1", say(sshs_model_hash="0" * 64), "warning: sshs_model_hash: is not the hash"),
    "another hash of ModelSpec": ("sd1", say(modelspec__hash_sha256="0x0"), "warning: modelspec.hash_sha256: is not"),
    "a path of Windows": (
        "sd1",
        say(ss_sd_model_name=r"C:\Users\Erika\models\x.safetensors"),
        r"warning: ss_sd_model_name: tells paths .*the user's name \(Erika\)",
    ),
    "a path in JSON": (
        "sd1",
        say(ss_datasets=json.dumps([{"image_dir": "/home/erika/photos"}])),
        r"warning: ss_datasets: tells paths .*\(/home/erika/photos\), and the user's name \(erika\)",
    ),
    "another name": ("sd1", say(ss_output_name="old"), "note: ss_output_name: is old, which A1111 and Forge write"),
    "absurd metadata": ("sd1", say(notes="x" * 2_000_000), "note: notes: is longer than a million characters"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_wrong_with_a_file_is_said_in_one_line(bases: dict[str, Base], tmp_path: Path, name: str):
    family, spoil, says = SPOILT[name]
    weights, metadata = good(family)
    spoil(weights, metadata)
    path = saved(weights, metadata, tmp_path)
    for base in (None, bases[family]):
        lines = [str(finding) for finding in told(path, base)]
        assert sum(bool(re.match(says, line)) for line in lines) == 1, lines
        assert len(lines) <= 3, lines
    facts = json.loads(json.dumps(inspect(path), allow_nan=False))
    assert any(re.match(says, str(Finding(**finding))) for finding in facts["findings"])


def test_shapes_and_families_are_held_against_a_base(bases: dict[str, Base], tmp_path: Path):
    weights, metadata = good("sd1")
    path = saved(weights, metadata, tmp_path)
    (finding,) = told(path, bases["sdxl"])[:1]
    assert (finding.severity, finding.where) == ("error", "the file")
    assert "is for Stable Diffusion 1 (its text encoder has width 768), and the base is SDXL" in finding.what
    weights[f"{Q}.lora_up.weight"] = torch.ones(640, 4)
    (finding,) = told(saved(weights, metadata, tmp_path), bases["sd1"])
    assert finding.severity == "error"
    assert finding.where == Q
    assert "does not fit the layer of random:sd15: 4 x 1280 and 640 x 4 make no change of 1280 x 1280" in finding.what
    deep = {key.replace("layers_0", "layers_40"): tensor for key, tensor in good("sd1")[0].items()}
    (finding,) = told(saved(deep, metadata, tmp_path), bases["sd1"])
    assert "has no such layer" in finding.what
    assert finding.where.startswith("5 layers, such as lora_te_text_model_encoder_layers_40")


def test_one_layer_under_two_names_is_found(bases: dict[str, Base], tmp_path: Path):
    weights, metadata = good("sd1")
    weights |= {key.replace("lora_te_", "lora_te1_"): tensor for key, tensor in weights.items() if "te_text" in key}
    found = told(saved(weights, metadata, tmp_path), bases["sd1"])
    assert [finding.where for finding in found if "the same layer as another" in finding.what] == [
        "10 layers, such as lora_te1_text_model_encoder_layers_0_mlp_fc1"
    ]


def test_tensors_of_a_whole_model_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    read = LoraFile.read
    monkeypatch.setattr(LoraFile, "read", lambda self, keys: read(self, asked_for(keys)))

    def asked_for(keys: Any) -> Any:
        for key in keys:
            asked.append(key)
            yield key

    path = saved({"model.diffusion_model.out.2.weight": torch.ones(4)}, {}, tmp_path)
    assert inspect(path)["format"] == "ldm, a whole model"
    assert asked == []
    inspect(saved(*good("sd1"), tmp_path))
    assert f"{Q}.lora_up.weight" in asked


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_the_command_tells_findings_of_a_file_it_can_open(tmp_path: Path, verb: str):
    weights, metadata = good("sd1")
    put("to_q.lora_up", put_nan)(weights, metadata)
    code = {"inspect": 0, "verify": 3}[verb]
    done = lorasmith(tmp_path, verb, saved(weights, metadata, tmp_path), "--json", code=code)
    finding = json.loads(done.stdout)["findings"][0]
    assert finding["where"] == f"{Q}.lora_up.weight"
    assert finding["severity"] == "error"
