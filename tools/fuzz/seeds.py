"""Valid files to begin with, as small as their kind allows; what lies beside them where a reader looks further."""

from __future__ import annotations

import csv
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from lorasmith.datasets.images import EXIF_ORIENTATION
from lorasmith.trainer.bases import POCKET
from lorasmith.trainer.choosing.leaks import Captions, LeakPicture, Leaks, Uninvited, Unnamed
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import to_toml
from lorasmith.trainer.singlefile import COMPONENTS

Seeds = dict[str, bytes]


def header_only(entries: Mapping[str, Any], content: bytes = b"") -> bytes:
    """A `.safetensors` file of this header, right or wrong, and these bytes."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + content


# ---------------------------------------------------------------------------------------------------------------------
# weights


_ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
_KOHYA = {
    "ss_base_model_version": "sd_v1",
    "ss_network_dim": "2",
    "ss_network_alpha": "1.0",
    "ss_training_started_at": "1700000000.5",
    "ss_output_name": "a",
    "ss_tag_frequency": '{"10_cat": {"cat": 10, "sitting": 3}}',
    "ss_bucket_info": '{"buckets": {"0": {"resolution": [512, 512], "count": 3}}, "mean_img_ar_error": 0.0}',
    "ss_dataset_dirs": '{"10_cat": {"n_repeats": 10, "img_count": 3}}',
    "ss_datasets": "[]",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "sshs_model_hash": "0x00",
}
_PEFT = json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 2}, "unet.use_rslora": False})


def loras(folder: Path) -> Seeds:
    """For the pocket base, in the names of kohya, of diffusers, and of LyCORIS."""
    del folder
    layers = [f"{_ATTENTION}.{name}" for name in ("to_q", "to_k", "to_out.0")]
    width = json.loads((POCKET / "unet" / "config.json").read_text(encoding="utf-8"))["block_out_channels"][-1]
    down, up, alpha = torch.full((2, width), 0.5), torch.full((width, 2), 0.25), torch.tensor(1.0)
    kohya: dict[str, torch.Tensor] = {}
    diffusers: dict[str, torch.Tensor] = {}
    loha: dict[str, torch.Tensor] = {}
    for layer in layers:
        name = "lora_unet_" + layer.replace(".", "_")
        kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
        diffusers |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
        loha |= {f"{name}.hada_w{n}_a": up for n in (1, 2)} | {f"{name}.hada_w{n}_b": down for n in (1, 2)}
        loha |= {f"{name}.dora_scale": torch.ones(width, 1).half(), f"{name}.alpha": alpha.half()}
    return {
        "kohya": save(_copies(kohya), _KOHYA),
        "diffusers": save(_copies(diffusers), {"format": "pt", "lora_adapter_metadata": _PEFT}),
        "loha": save(_copies(loha)),
        "empty": save({}),
    }


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def base_files(folder: Path) -> Seeds:
    """Headers of whole models, whose tensors have a side of 0, so that they take no bytes; one says itself what it is.
    A family, a version of it with a mark, and a VAE alone."""
    del folder
    unet, vae = _ldm_unet(0), _ldm_vae()
    text = _clip("cond_stage_model.transformer.text_model.")
    configs = {name: _config(name) for name in ("unet", "vae", "text_encoder")}
    configs["scheduler"] = json.loads((POCKET / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    configs["tokenizer"] = {"model_max_length": 77, "pad_token": "<|endoftext|>"}
    said = {COMPONENTS: json.dumps({"family": "sd1", **configs})}
    marked = {"v_pred": _entry(0), "__metadata__": {"modelspec.resolution": "512x512", "ss_zero_terminal_snr": "True"}}
    return {
        "sd1": header_only({**unet, **vae, **text}),
        "marked": header_only({**unet, **vae, **text, **marked}),
        "ours": header_only({"__metadata__": said, **unet}),
        "vae": header_only({key.removeprefix("first_stage_model."): entry for key, entry in vae.items()}),
        "lora": loras(Path())["kohya"],
    }


def _entry(*shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 0]}


def _ldm_unet(width: int) -> dict[str, Any]:
    found = {
        "input_blocks.0.0.weight": _entry(32, 4, 3, 0),
        "input_blocks.1.0.out_layers.3.weight": _entry(32, 32, 3, 0),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": _entry(0, width),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": _entry(0, width),
        "middle_block.1.proj_in.weight": _entry(32, 32, 1, 0),
        "output_blocks.0.1.transformer_blocks.0.attn2.to_k.weight": _entry(0, width),
        "output_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": _entry(0, width),
        "out.2.weight": _entry(4, 32, 3, 0),
    }
    return {f"model.diffusion_model.{key}": entry for key, entry in found.items()}


def _ldm_vae() -> dict[str, Any]:
    found = {
        "encoder.conv_in.weight": _entry(32, 3, 3, 0),
        "encoder.down.0.block.0.conv1.weight": _entry(32, 32, 3, 0),
        "decoder.conv_out.weight": _entry(3, 32, 3, 0),
        "quant_conv.weight": _entry(8, 8, 1, 0),
    }
    return {f"first_stage_model.{key}": entry for key, entry in found.items()}


def _clip(prefix: str) -> dict[str, Any]:
    found = {
        "embeddings.token_embedding.weight": _entry(49408, 0),
        "embeddings.position_embedding.weight": _entry(77, 0),
        "encoder.layers.0.mlp.fc1.weight": _entry(128, 0),
    }
    return {prefix + key: entry for key, entry in found.items()}


def base_pickles(folder: Path) -> Seeds:
    """Pickles of weights, as PyTorch writes them now and as it did before."""
    del folder
    return {
        name: _pickled({"state_dict": {"model.diffusion_model.x": torch.ones(2, 3)}}, zipped)
        for name, zipped in (("zip", True), ("legacy", False))
    }


def _pickled(content: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def base_folder(folder: Path) -> None:
    """The pocket base without its weights, and with few words."""
    base = folder / "base"
    shutil.copytree(POCKET, base, ignore=shutil.ignore_patterns("*.safetensors", "vocab.json", "merges.txt"))
    words, rules = vocabularies(folder)["few"], merges(folder)["few"]
    (base / "tokenizer" / "vocab.json").write_bytes(words)
    (base / "tokenizer" / "merges.txt").write_bytes(rules)


def _config(part: str) -> dict[str, Any]:
    return json.loads((POCKET / part / "config.json").read_text(encoding="utf-8"))


def base_configs(folder: Path) -> Seeds:
    del folder
    return {"unet": json.dumps(_config("unet")).encode()}


def vocabularies(folder: Path) -> Seeds:
    del folder
    words = ["a", "c", "t", "a</w>", "t</w>", "cat</w>", "ca", "!</w>", "<|startoftext|>", "<|endoftext|>"]
    return {"few": json.dumps({word: number for number, word in enumerate(words)}).encode()}


def merges(folder: Path) -> Seeds:
    del folder
    return {"few": b"#version: 0.2\nc a\nca t</w>\n"}


def tokenizer_settings(folder: Path) -> Seeds:
    del folder
    return {"pocket": (POCKET / "tokenizer" / "tokenizer_config.json").read_bytes()}


def optimizers(folder: Path) -> Seeds:
    del folder
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    return {"adamw": _pickled({"optimizer": optimizer.state_dict()}), "nothing": _pickled({})}


def checkpoint(folder: Path) -> None:
    """All of it but the optimizer's state."""
    place = folder / "c" / "step-000002"
    place.mkdir(parents=True)
    (place / "state.json").write_bytes(of_state(folder)["plain"])
    (place / "adapter.safetensors").write_bytes(save({"x": torch.ones(2)}))


# ---------------------------------------------------------------------------------------------------------------------
# images and captions


@cache
def _images() -> Seeds:
    """Small pictures of every kind that is read, with all that a file may hold besides."""
    picture = Image.new("RGB", (24, 16), (200, 90, 30))
    text, exif = PngInfo(), Image.Exif()
    text.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler", zip=True)
    text.add_itxt("note", "é", zip=True)
    exif[EXIF_ORIENTATION] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    frames = {"save_all": True, "append_images": [Image.new("RGB", (24, 16), "blue")]}
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "png": (picture, "PNG", {"pnginfo": text, "icc_profile": profile, "exif": exif}),
        "alpha": (picture.convert("RGBA"), "PNG", {}),
        "palette": (picture.convert("P"), "PNG", {"transparency": 3}),
        "grey 16": (Image.new("I;16", (8, 8), 700), "PNG", {}),
        "moving png": (picture, "PNG", frames),
        "jpeg": (picture, "JPEG", {"exif": exif, "icc_profile": profile, "comment": b"x"}),
        "cmyk": (picture.convert("CMYK"), "JPEG", {"progressive": True}),
        "webp": (picture, "WEBP", {"exif": exif, "icc_profile": profile}),
        "gif": (picture, "GIF", frames),
        "bmp": (picture, "BMP", {}),
        "tiff": (picture, "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        "float tiff": (Image.new("F", (8, 8), 0.5), "TIFF", {}),
        "avif": (picture, "AVIF", {"exif": exif}),
    }
    return {name: _encoded(*kind) for name, kind in kinds.items() if kind[1] in Image.registered_extensions().values()}


def _encoded(picture: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def images(folder: Path) -> Seeds:
    del folder
    return _images()


def photos(folder: Path) -> None:
    """A folder with one picture, to which captions belong."""
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes(_images()["bmp"])


def captions(folder: Path) -> Seeds:
    del folder
    return {"plain": b"a cat on a mat\nanother one\n", "bom": "\ufeffa café, {red|blue}\r\n".encode()}


def captions_in_json(folder: Path) -> Seeds:
    del folder
    return {
        "object": b'{"caption": "a cat"}',
        "tags": b'{"tags": ["cat", "mat"], "score": 3}',
        "list": b'["one", "two"]',
        "text": b'"one"',
    }


def captions_in_jsonl(folder: Path) -> Seeds:
    del folder
    return {"two": b'{"file_name": "a.png", "text": "a cat"}\n{"file_name": "a.png", "caption": ["b", "c"]}\n'}


def captions_in_csv(folder: Path) -> Seeds:
    del folder
    text = io.StringIO()
    csv.writer(text).writerows([["file_name", "text"], ["a.png", 'a "cat",\non a mat']])
    return {"two": text.getvalue().encode()}


def journals(folder: Path) -> Seeds:
    del folder
    changes = [{"file": "a.txt", "before": "YQ==", "after": "00"}]
    deed = {"what": "wrote a caption", "changes": changes, "moves": [{"source": "a.png", "target": ".removed/a.png"}]}
    return {"one": json.dumps({"version": 1, "deeds": [deed]}).encode()}


def archives(folder: Path) -> Seeds:
    del folder
    found = {}
    for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression=method) as archive:
            archive.writestr("top/a.png", _images()["bmp"])
            archive.writestr("top/ü.txt", "a cat " * 20)
            archive.writestr("metadata.jsonl", b'{"file_name": "top/a.png", "text": "x"}')
        found[name] = buffer.getvalue()
    return found


def tables(folder: Path) -> Seeds:
    """As Hugging Face writes them, and with plain bytes."""
    del folder
    picture = _images()["png"]
    cells = {"image": [{"bytes": picture, "path": "a.png"}, {"bytes": picture, "path": None}], "text": ["a", "b"]}
    plain = {"jpg": [picture, picture], "caption": [["a", "b"], ["c"]]}
    found = {}
    for name, columns in (("structs", cells), ("plain", plain)):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
        found[name] = buffer.getvalue()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# a folder of runs


def _run_config() -> RunConfig:
    return RunConfig.model_validate(
        {"name": "r", "data": [{"path": "photos", "trigger": "trg"}], "budget": {"images": 2, "batch": 1}}
    )


def configs(folder: Path) -> Seeds:
    del folder
    return {
        "whole": to_toml(_run_config(), comments=False).encode(),
        "short": b'name = "r"\nrecipe = "style-sd1"\n[[data]]\npath = "photos"\n[adapter]\nrank = 8\n',
    }


def runs(folder: Path) -> None:
    """One run, that was trained and exported, and what pages keep beside it; each file as its seed."""
    run = folder / "runs" / "r"
    for place, content in {
        run / "config.toml": to_toml(_run_config(), comments=False).encode(),
        run / "events.jsonl": of_events(folder)["done"],
        run / "checkpoints/step-000002/state.json": of_state(folder)["plain"],
        run / "checkpoints/step-000002/adapter.safetensors": save({"x": torch.ones(2)}),
        run / "exports/r.safetensors": loras(folder)["kohya"],
        run / "exports/r.md": of_card(folder)["short"],
    }.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)


_PROCESS = b'{"pid": 999999, "created": 1700000000.0, "started": 1700000000.0, "model": "blip"}'
_LOOK = {"negative_prompt": "", "steps": 2, "guidance": 7.0, "sampler": "ddim", "size": 0}


def _json(value: object) -> Seeds:
    return {"plain": json.dumps(value).encode()}


def of_events(folder: Path) -> Seeds:
    del folder
    step = {"type": "step", "images": 1, "loss": 0.5, "grad_norm": 1.0, "lr": {"unet": 1e-4}, "seconds": 0.1}
    records = [
        {"type": "phase", "name": "loading", "done": 1, "total": 2},
        {"type": "plan", "steps": 2, "images": 4, "plan": {}, "parts": [], "every": {"sample": 1, "save": 1}},
        {**step, "step": 1},
        {"type": "sample", "step": 1, "folder": "samples/step-000001", "prompts": ["a cat"]},
        {"type": "validation", "step": 1, "bands": ["0-999"], "validation": [0.5], "train": [0.4], "held_out": 2}
        | {"predictions": 4, "of": "ae0f", "best": 1},
        {
            "type": "scores",
            "step": 1,
            "style": 0.5,
            "prompt": 0.9,
            "copying": -0.1,
            "pictures": 4,
            "of": "ae",
            "best": 1,
        },
        {"type": "checkpoint", "step": 1, "folder": "checkpoints/step-000001"},
        {**step, "step": 2, "loss": None},
        {"type": "warning", "message": "look"},
        {"type": "error", "message": "failed", "step": 2, "fix": "do", "overrides": ["a.b=1"], "anew": []},
        {**step, "step": 2, "images": 2},
        {"type": "done", "step": 2, "exports": ["exports/r.safetensors"]},
    ]
    lines = [json.dumps({"time": 1700000000.0 + n, **record}) + "\n" for n, record in enumerate(records)]
    return {"done": "".join(lines).encode(), "training": "".join(lines[:8]).encode()}


def of_chosen(folder: Path) -> Seeds:
    del folder
    return _json({"step": 2, "strength": 0.8})


def of_ratings(folder: Path) -> Seeds:
    del folder
    lines = [
        {"better": "samples/step-000002/00.png", "worse": "samples/step-000001/00.png", "prompt": "a cat"},
        {"picture": "compare/1f2e.png", "up": True},
        {"neither": ["samples/step-000002/01.png", "samples/step-000001/01.png"], "prompt": "a dog"},
        {"undo": True},
    ]
    return {"each": "".join(json.dumps(line) + "\n" for line in lines).encode(), "torn": b'{"picture": "a.png", "up'}


def of_leaks(folder: Path) -> Seeds:
    del folder
    found = Leaks(
        step=2,
        strength=1.0,
        trigger="trg",
        seed=1,
        without=0.5,
        with_trigger=0.8,
        word=0.1,
        leak=0.6,
        error=0.1,
        sentence="It leaks.",
        pictures=(LeakPicture("a cat", "trg, a cat", 0.5, 0.8, 0.1, "0.png"),),
        uninvited=(Uninvited("hat", 3, 4.5),),
        words=9,
        captions=Captions(("emoji",), ("1.png",), (Unnamed(("0.png", "2.png"), ("a", "b")),)),
        images=8,
    )
    return _json(asdict(found)) | {"nothing": json.dumps(asdict(replace(found, leak=None, error=None))).encode()}


def of_owner(folder: Path) -> Seeds:
    del folder
    return {"gone": _PROCESS}


def of_state(folder: Path) -> Seeds:
    del folder
    return _json({"step": 2, "images": 4, "dataset": "00", "base": "00", "version": 2})


def of_choices(folder: Path) -> Seeds:
    del folder
    kept = {"steps": [2], "strengths": [0.5, 1.0], "prompt": "trg, a cat", "leak": False, "seed": 1}
    return _json({**kept, "second_seed": False, "look": _LOOK})


def of_verified(folder: Path) -> Seeds:
    del folder
    answers = {"unet": {"error": 0.0001}}
    verification = {"weight_error": 0.0, "weight_tolerance": 0.001, "answers": answers, "answer_tolerance": 0.01}
    client = {"client": "A1111", "reading": "same", "why": "", "layers": 3, "of": 3}
    report = {"file": "r.safetensors", "format": "kohya", "hashes": {"sha256": "00"}, "clients": [client]}
    return _json({"files": [{**report, "verification": verification}]})


def of_card(folder: Path) -> Seeds:
    del folder
    head = '---\ntags: ["lora"]\nwidget: {"text": "a"}\nbase_model: "x"\n---\n'
    return {
        "short": (
            head + "# A\n\n![a](r-grid.png) [b](https://x.example)\n\n<Gallery />\n\n| a | b |\n|-|-|\n"
        ).encode(),
        "gallery": b'---\nwidget: [{"output": {"url": "r.png"}, "text": "a"}]\n---\n<Gallery />\n',
    }


def of_export_settings(folder: Path) -> Seeds:
    del folder
    return _json({"strength": 0.8, "title": "A"})


def of_export_process(folder: Path) -> Seeds:
    del folder
    return {"gone": _PROCESS}


def of_waiting_list(folder: Path) -> Seeds:
    del folder
    entry = {"name": "r", "overrides": ["budget.images=8"], "from_step": None}
    process = {"pid": 999999, "created": 1700000000.0}
    return _json({"waiting": [entry], "current": {"entry": entry, "since": 1700000000.0, "process": process}})


def of_visit(folder: Path) -> Seeds:
    del folder
    return _json({"folder": "photos", "trigger": "trg", "teaching": "Style"})


def of_remembered(folder: Path) -> Seeds:
    del folder
    return _json({"user": "me"})


def of_errand(folder: Path) -> Seeds:
    del folder
    return {"gone": _PROCESS}


def of_order(folder: Path) -> Seeds:
    run = str((folder / "runs" / "r").absolute())
    shared = {"prompts": ["a cat"], "seeds": [1], "run": run, "look": _LOOK}
    wall = {"kind": "wall", **shared, "steps": [2], "strengths": [1.0]}
    pictures = {"kind": "pictures", **shared, "step": 2, "strength": 1.0, "base": "pocket", "loras": [["a", 1.0]]}
    return {"wall": json.dumps(wall).encode(), "pictures": json.dumps(pictures).encode()}


def of_drawn(folder: Path) -> Seeds:
    del folder
    return _json({"state": "drawing", "done": 1, "total": 2, "message": "", "fix": "", "seconds_left": 1.5})
