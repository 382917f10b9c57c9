"""Single files as community sites share them: known by their headers, loaded offline, and exactly the same model."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorasmith.datasets.buckets import BucketRules
from lorasmith.datasets.cache import LatentCache
from lorasmith.datasets.captions import CaptionRules
from lorasmith.datasets.dataset import Example, Source, load_examples
from lorasmith.trainer.bases import BaseInfo, FamilyName, inspect_base
from lorasmith.trainer.config import RunConfig, Weighting
from lorasmith.trainer.errors import BaseModelError, ConfigError, DataError
from lorasmith.trainer.ldm import to_ldm, with_text_model
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.noise import loss_weight
from lorasmith.trainer.plan import as_trained, make_plan
from lorasmith.trainer.run import train
from lorasmith.trainer.sample import Drawing, draw

from .conftest import draw_picture, unpack
from .tiny import make_sd1, make_sd2

UNET, VAE = "model.diffusion_model.", "first_stage_model."
Parts = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# small models by the rules of the published ones


def small_vae(sizes: int = 2, latents: int = 4) -> AutoencoderKL:
    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * sizes,
        "up_block_types": ("UpDecoderBlock2D",) * sizes,
        "block_out_channels": (32, 64, 64)[:sizes],
        "layers_per_block": 2,
        "latent_channels": latents,
    }
    return AutoencoderKL(**shape)


def text_encoder(kind: Any, width: int, act: str, **extra: Any) -> Any:
    shape = {"intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": width // 64}
    tokens = {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    return kind(CLIPTextConfig(hidden_size=width, hidden_act=act, **shape, **tokens, **extra))


def cross(**extra: Any) -> UNet2DConditionModel:
    shape: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
    }
    return UNet2DConditionModel(**(shape | extra))


def sd1_parts() -> Parts:
    unet = cross(block_out_channels=(32, 64), attention_head_dim=8, cross_attention_dim=64)
    return {"unet": unet, "vae": small_vae(), "text_encoder": text_encoder(CLIPTextModel, 64, "quick_gelu")}


def sd2_parts() -> Parts:
    heads: Any = (1, 2)
    unet = cross(
        block_out_channels=(64, 128), attention_head_dim=heads, cross_attention_dim=128, use_linear_projection=True
    )
    return {"unet": unet, "vae": small_vae(), "text_encoder": text_encoder(CLIPTextModel, 128, "gelu")}


def sdxl_parts() -> Parts:
    heads: Any = (1, 2, 4)
    unet = cross(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 256),
        attention_head_dim=heads,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=64 + 128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=96 + 6 * 256,
    )
    second = text_encoder(CLIPTextModelWithProjection, 128, "gelu", projection_dim=96)
    first = text_encoder(CLIPTextModel, 64, "quick_gelu")
    return {"unet": unet, "vae": small_vae(), "text_encoder": first, "text_encoder_2": second}


PARTS: dict[FamilyName, Callable[[], Parts]] = {"sd1": sd1_parts, "sd2": sd2_parts, "sdxl": sdxl_parts}
RESOLUTION = {"sd1": 512, "sd2": 768, "sdxl": 1024}
TENSORS: dict[FamilyName, dict[str, Tensor]] = {}


def parts_of(family: FamilyName) -> Parts:
    """The same random weights each time, rounded to what fp16 holds."""
    torch.manual_seed(7)
    return {name: module.half().float().eval() for name, module in PARTS[family]().items()}


def in_ldm(family: FamilyName) -> dict[str, Tensor]:
    """The file's tensors in the original names, with what such files hold besides."""
    if family not in TENSORS:
        parts = parts_of(family)
        weights = {name: dict(module.half().state_dict()) for name, module in parts.items()}
        weights = {name: with_text_model(own) if "text" in name else own for name, own in weights.items()}
        TENSORS[family] = to_ldm(family, weights, parts["unet"].config, parts["vae"].config) | BESIDES[family]
    return dict(TENSORS[family])


BESIDES: dict[FamilyName, dict[str, Tensor]] = {
    "sd1": {
        "alphas_cumprod": torch.rand(1000),
        "model_ema.decay": torch.tensor(0.9),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    },
    "sd2": {
        "cond_stage_model.model.text_projection": torch.ones(128, 64),
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": torch.ones(128),
        "cond_stage_model.model.logit_scale": torch.tensor(1.0),
    },
    "sdxl": {"denoiser.sigmas": torch.rand(1000), "conditioner.embedders.1.model.logit_scale": torch.tensor(1.0)},
}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def what_is_wrong(model: Path | str, vae: Path | str = "", where: str = "base.model") -> str:
    with pytest.raises(BaseModelError) as caught:
        inspect_base(str(model), str(vae))
    [problem] = caught.value.problems
    assert problem.where == where
    assert problem.fix
    return problem.what


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# ---------------------------------------------------------------------------------------------------------------------
# the same model


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@torch.no_grad()
def test_a_community_file_is_the_model_it_was_made_from(family: FamilyName, ending: str, tmp_path: Path, offline: None):
    path = tmp_path / f"model-vpred{ending}"
    if ending == ".ckpt":
        torch.save({"state_dict": in_ldm(family), "global_step": 3}, path)
    else:
        write(path, in_ldm(family))
    info = inspect_base(str(path))
    sides = 2 ** len(parts_of(family)["unet"].config.block_out_channels)
    assert (info.family, info.prediction, info.resolution) == (family, "v_prediction", RESOLUTION[family])
    assert (info.vae_factor, info.bucket_step, info.short_name) == (2, sides, path.name)
    base, parts = load_base(info), parts_of(family)
    noisy, t, pictures = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.rand(1, 3, 32, 32)
    conditions, sizes = base.encode(["a red apple"]), torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    said = base.family.encode([parts[name] for name in base.text_encoders], base.tokenize(["a red apple"]))
    assert torch.equal(conditions.hidden, said.hidden)
    assert (conditions.pooled is None) == (said.pooled is None)
    if conditions.pooled is not None and said.pooled is not None:
        assert torch.equal(conditions.pooled, said.pooled)
    predicted = [base.family.predict(unet, noisy, t, said, sizes) for unet in (base.unet, parts["unet"])]
    assert torch.equal(*predicted)
    moments = [vae.encode(pictures).latent_dist.parameters for vae in (base.vae, parts["vae"])]
    assert torch.equal(*moments)
    assert torch.equal(base.vae.decode(noisy).sample, parts["vae"].decode(noisy).sample)
    assert base.scaling_factor == info.scaling_factor == (0.13025 if family == "sdxl" else 0.18215)
    pads = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}
    assert [tokenizer.pad_token for tokenizer in base.tokenizers] == pads[family]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_other_precisions(dtype: torch.dtype, tmp_path: Path):
    path = write(tmp_path / "model.safetensors", {key: tensor.to(dtype) for key, tensor in in_ldm("sd1").items()})
    base = load_base(inspect_base(str(path)), torch.bfloat16)
    assert (base.dtype, base.vae.dtype) == (torch.bfloat16, torch.float32)
    expected = parts_of("sd1")["unet"].conv_in.weight.to(dtype).bfloat16()
    assert torch.equal(base.unet.conv_in.weight, expected)


def test_the_file_may_change_once_it_is_loaded(tmp_path: Path):
    path = write(tmp_path / "model.safetensors", in_ldm("sd1"))
    base = load_base(inspect_base(str(path)), torch.float16)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(base.unet.conv_in.weight, parts_of("sd1")["unet"].conv_in.weight.half())


def test_inspecting_reads_the_header_without_torch(tmp_path: Path):
    path = write(tmp_path / "model.safetensors", in_ldm("sd2"))
    code = (
        "import sys\n"
        "from lorasmith.trainer.bases import inspect_base\n"
        "print(inspect_base(sys.argv[1]).family, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("sd2 False", "")


def test_a_community_file_unpacks_to_the_same_model(tmp_path: Path):
    path = write(tmp_path / "model.safetensors", in_ldm("sdxl"), {"modelspec.prediction_type": "v"})
    unpack(path, tmp_path / "folder")
    file, folder = (load_base(inspect_base(str(source))) for source in (path, tmp_path / "folder"))
    assert (folder.info.family, folder.info.prediction) == ("sdxl", "v_prediction")
    for component, module in file.components.items():
        theirs = folder.components[component].state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(file.encode(["an apple"]).hidden, folder.encode(["an apple"]).hidden)


def test_a_file_is_known_by_its_weights_wherever_it_lies(tmp_path: Path):
    one = inspect_base(str(write(tmp_path / "one.safetensors", in_ldm("sd1"))))
    other = inspect_base(str(write(tmp_path / "other.safetensors", in_ldm("sd1"))))
    changed = {key: tensor + 1 if key.startswith(VAE) else tensor for key, tensor in in_ldm("sd1").items()}
    assert one.identity == other.identity
    assert inspect_base(str(write(tmp_path / "changed.safetensors", changed))).identity != one.identity


# ---------------------------------------------------------------------------------------------------------------------
# what it predicts


def found(path: Path, family: FamilyName, metadata: dict[str, str] | None = None, **marks: Tensor) -> BaseInfo:
    return inspect_base(str(write(path, in_ldm(family) | marks, metadata)))


MARK = torch.zeros(0)


@pytest.mark.parametrize(
    ("family", "metadata", "marks", "prediction", "zero"),
    [
        ("sdxl", {"modelspec.prediction_type": "v"}, [], "v_prediction", False),
        ("sdxl", {"modelspec.prediction_type": "epsilon"}, [], "epsilon", False),
        ("sdxl", {"v_parameterization": "True"}, [], "v_prediction", False),
        ("sdxl", {"ss_v_parameterization": "False"}, [], "epsilon", False),
        ("sdxl", {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, [], "v_prediction", True),
        ("sdxl", {}, ["v_pred"], "v_prediction", False),
        ("sdxl", {}, ["v_pred", "ztsnr"], "v_prediction", True),
        ("sd1", {}, ["ztsnr"], "v_prediction", True),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, [], "v_prediction", False),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, [], "epsilon", False),
        ("sd2", {"ss_base_model_version": "sd_v2_v"}, [], "v_prediction", False),
    ],
)
def test_what_a_file_states(
    family: FamilyName, metadata: dict[str, str], marks: list[str], prediction: str, zero: bool, tmp_path: Path
):
    info = found(tmp_path / "model.safetensors", family, metadata, **dict.fromkeys(marks, MARK))
    assert (info.prediction, info.zero_terminal_snr, info.prediction_stated) == (prediction, zero, True)
    assert not any("objective.prediction" in told for told in info.assumptions)
    open_end = prediction == "v_prediction" and not zero and family != "sd2"
    assert any("zero SNR" in told for told in info.assumptions) == open_end
    scheduler = load_base(info).scheduler
    assert scheduler.config["prediction_type"] == prediction
    assert (scheduler.alphas_cumprod[-1] == 0) == zero
    if family == "sd2":
        assert info.resolution == (768 if prediction == "v_prediction" else 512)


@pytest.mark.parametrize(("spread", "prediction"), [(0.2, "v_prediction"), (0.02, "epsilon")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_sd2_is_known_by_the_spread_of_a_bias(
    spread: float, prediction: str, dtype: torch.dtype, ending: str, tmp_path: Path
):
    torch.manual_seed(4)
    levels: Any = {
        "block_out_channels": (64, 64, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 1,
    }
    unet = cross(cross_attention_dim=128, use_linear_projection=True, **levels)
    others = {key: tensor for key, tensor in in_ldm("sd2").items() if not key.startswith(UNET)}
    parts = {"unet": unet.state_dict(), "vae": {}, "text_encoder": {}}
    tensors = others | to_ldm("sd2", parts, unet.config, parts_of("sd2")["vae"].config)
    sign = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    assert sign in tensors
    tensors = {key: tensor.to(dtype) for key, tensor in (tensors | {sign: torch.randn(64) * spread}).items()}
    path = tmp_path / f"model{ending}"
    torch.save(tensors, path) if ending == ".ckpt" else write(path, tensors)
    info = inspect_base(str(path))
    assert (info.prediction, info.prediction_stated) == (prediction, True)
    assert info.resolution == (768 if prediction == "v_prediction" else 512)


def test_what_nothing_states_is_an_assumption(tmp_path: Path):
    info = found(tmp_path / "model.safetensors", "sdxl")
    assert (info.prediction, info.prediction_stated) == ("epsilon", False)
    told, size = info.assumptions
    assert told == (
        "model.safetensors does not say what its UNet predicts; epsilon is assumed, as in most SDXL models. If "
        'pictures come out wrong, set objective.prediction = "v_prediction", and objective.zero_terminal_snr if its '
        "page says so."
    )
    assert "of another size than SDXL" in size
    named = found(tmp_path / "anime V-Pred 2.safetensors", "sdxl")
    assert (named.prediction, named.prediction_stated) == ("v_prediction", False)
    assert "by its name alone" in named.assumptions[0]


def test_signs_that_are_at_odds_are_told(tmp_path: Path):
    metadata = {"modelspec.prediction_type": "epsilon"}
    info = found(tmp_path / "model.safetensors", "sdxl", metadata, v_pred=MARK, ztsnr=MARK)
    assert (info.prediction, info.zero_terminal_snr) == ("v_prediction", True)
    assert "its metadata says epsilon" in info.assumptions[0]


@pytest.mark.parametrize(("said", "resolution"), [("768x768", 768), ("1024x512", 512), ("7x7", 512), ("x", 512)])
def test_the_resolution_is_what_modelspec_says(said: str, resolution: int, tmp_path: Path):
    assert found(tmp_path / "model.safetensors", "sd1", {"modelspec.resolution": said}).resolution == resolution


def test_a_folder_says_it_in_its_scheduler(tmp_path: Path):
    file = make_sd2(tmp_path / "folder") / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"rescale_betas_zero_snr": True}), encoding="utf-8")
    info = inspect_base(str(tmp_path / "folder"))
    assert (info.prediction, info.zero_terminal_snr) == ("v_prediction", True)
    scheduler = load_base(info).scheduler
    assert (float(scheduler.alphas_cumprod[-1]), scheduler.config["timestep_spacing"]) == (0, "trailing")


def test_a_folder_whose_scheduler_is_silent_is_taken_by_its_name(tmp_path: Path):
    for name in ("plain", "my-vpred"):
        file = make_sd2(tmp_path / name) / "scheduler/scheduler_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        del config["prediction_type"]
        file.write_text(json.dumps(config), encoding="utf-8")
    plain, named = (inspect_base(str(tmp_path / name)) for name in ("plain", "my-vpred"))
    assert (plain.prediction, plain.assumptions) == ("epsilon", ())
    assert (named.prediction, named.prediction_stated) == ("v_prediction", False)
    assert "by its name alone" in named.assumptions[0]


# ---------------------------------------------------------------------------------------------------------------------
# what is trained


def test_settings_go_above_what_the_base_says(short_run: Callable[..., RunConfig], tmp_path: Path):
    info = found(tmp_path / "model.safetensors", "sdxl", {}, v_pred=MARK, ztsnr=MARK)
    trained = as_trained(info, short_run(objective={"zero_terminal_snr": "off"}))
    assert (trained.prediction, trained.zero_terminal_snr) == ("v_prediction", False)
    assert float(load_base(trained).scheduler.alphas_cumprod[-1]) > 0
    with pytest.raises(ConfigError, match=r"objective\.zero_terminal_snr: the noise ends in zero SNR"):
        as_trained(info, short_run(objective={"prediction": "epsilon"}))
    plain = found(tmp_path / "plain.safetensors", "sd1")
    with pytest.raises(ConfigError, match=r"objective\.zero_terminal_snr: the noise ends in zero SNR"):
        as_trained(plain, short_run(objective={"zero_terminal_snr": "on"}))
    asked = {"prediction": "v_prediction", "zero_terminal_snr": "on"}
    trained = as_trained(plain, short_run(objective=asked))
    assert (trained.prediction, trained.zero_terminal_snr) == ("v_prediction", True)
    assert not any("objective." in told for told in trained.assumptions)


def small_run(short_run: Callable[..., RunConfig], path: Path, **over: Any) -> RunConfig:
    """Training at the size of the test's pictures, not at that of the published model."""
    config = short_run(base={"model": str(path)}, **over)
    for data in config.data:
        data.resolution = 32
    return config


def test_the_plan_warns_of_assumptions(short_run: Callable[..., RunConfig], tmp_path: Path):
    path = write(tmp_path / "model.safetensors", in_ldm("sd1"))
    assert any(
        "does not say what its UNet predicts" in told for told in make_plan(small_run(short_run, path)).warnings()
    )
    told = list(make_plan(small_run(short_run, path, objective={"prediction": "v_prediction"})).warnings())
    assert not any("UNet predicts" in one or "the base says" in one for one in told)


def test_a_run_on_a_file_whose_noise_ends_in_zero_snr(
    short_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tensors = in_ldm("sd1") | {"v_pred": MARK, "ztsnr": MARK}
    path = write(tmp_path / "model.safetensors", tensors, {"modelspec.resolution": "32x32"})
    monkeypatch.chdir(tmp_path)
    sample = {"every": 4, "prompts": ["a red apple"], "steps": 2}
    objective = {"min_timestep": 999, "weighting": "none"}
    config = short_run(base={"model": path.name}, sample=sample, objective=objective)
    plan = make_plan(config)
    assert plan.config.base.model == str(path)
    finished = train(plan, lambda event: None)
    assert finished.exports


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_the_loss_is_finite_where_nothing_is_left_of_the_picture(weighting: Weighting, tmp_path: Path):
    info = found(tmp_path / "model.safetensors", "sd1", None, v_pred=MARK, ztsnr=MARK)
    schedule, t = load_base(info).scheduler.alphas_cumprod, torch.tensor([0, 500, 999])
    assert schedule[999] == 0
    assert loss_weight(weighting, info.prediction, t, schedule, 5.0).isfinite().all()


@pytest.mark.parametrize("steps", [1, 7, 25, 50])
def test_previews_start_from_pure_noise(steps: int, tmp_path: Path):
    info = found(tmp_path / "model.safetensors", "sd1", None, v_pred=MARK, ztsnr=MARK)
    base = load_base(info)
    seen: list[int] = []
    base.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    [picture] = draw(base, ["a red apple"], Drawing("", 3, steps, 4.0, 32))
    assert (seen[0], len(seen)) == (999, steps)
    assert np.asarray(picture).std() > 0


# ---------------------------------------------------------------------------------------------------------------------
# pickles


class Malicious:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_pickle_is_run(zipped: bool, tmp_path: Path):
    content = {"state_dict": in_ldm("sd1"), "callbacks": Malicious(tmp_path / "owned")}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    said = f"model.ckpt holds {os.mkdir.__module__}.mkdir, which is no weight and might run code"
    assert what_is_wrong(tmp_path / "model.ckpt") == said
    assert not (tmp_path / "owned").exists()
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    what_is_wrong(tmp_path / "plain.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_pickle_of_the_old_format_is_read(tmp_path: Path):
    torch.save(in_ldm("sd1"), tmp_path / "model-vpred.pt", _use_new_zipfile_serialization=False)
    base = load_base(inspect_base(str(tmp_path / "model-vpred.pt")))
    assert torch.equal(base.unet.conv_in.weight, parts_of("sd1")["unet"].conv_in.weight)


@pytest.mark.parametrize("content", [{}, {"state_dict": {"a": 3}}, [1, 2], {"state_dict": 3}, torch.ones(3)])
def test_a_pickle_without_weights_is_refused(content: Any, tmp_path: Path):
    torch.save(content, tmp_path / "model.ckpt")
    assert what_is_wrong(tmp_path / "model.ckpt") == "model.ckpt holds no weights"


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_cut_short_is_refused(share: float, zipped: bool, tmp_path: Path):
    torch.save(in_ldm("sd1"), tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "model.ckpt").read_bytes()
    (tmp_path / "model.ckpt").write_bytes(content[: int(len(content) * share)])
    assert what_is_wrong(tmp_path / "model.ckpt").startswith("model.ckpt ")


# ---------------------------------------------------------------------------------------------------------------------
# what is no base


ONE = torch.zeros(1)
TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


def reading(channels: int) -> dict[str, Tensor]:
    """A model whose UNet reads so many channels."""
    return in_ldm("sd1") | {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3)}


def only(family: FamilyName, prefix: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in in_ldm(family).items() if key.startswith(prefix)}


def without(family: FamilyName, prefix: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in in_ldm(family).items() if not key.startswith(prefix)}


def renamed(tensors: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def with_wider_text() -> dict[str, Tensor]:
    wide = with_text_model(text_encoder(CLIPTextModel, 128, "gelu").half().state_dict())
    return without("sdxl", "conditioner.embedders.0.") | {
        f"conditioner.embedders.0.transformer.{key}": tensor for key, tensor in wide.items()
    }


UNEVEN = "has blocks of uneven depth, as SSD-1B"
NO_BASES: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "inpainting": (lambda: reading(9), "is an inpainting model: its UNet reads 9 channels, not 4"),
    "depth": (lambda: reading(5), "is a depth model: its UNet reads 5 channels, not 4"),
    "refiner": (lambda: renamed(in_ldm("sdxl"), "embedders.1.", "embedders.0."), "is the SDXL refiner"),
    "uneven": (lambda: without("sdxl", f"{UNET}output_blocks.0.1.transformer_blocks.1."), UNEVEN),
    "no middle": (lambda: without("sdxl", f"{UNET}middle_block.1."), UNEVEN),
    "unclip": (lambda: in_ldm("sd1") | {f"{UNET}label_emb.0.0.weight": ONE}, "is a special kind of Stable Diffusion 1"),
    "kohya": (lambda: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": ONE}, "is a LoRA, not a base"),
    "peft": (lambda: {"unet.mid_block.attentions.0.proj_in.lora_A.weight": ONE}, "is a LoRA, not a base"),
    "flux": (lambda: {"double_blocks.0.img_attn.qkv.weight": ONE}, "is a Flux, SD 3 or other diffusion transformer"),
    "sd3": (lambda: {f"{UNET}joint_blocks.0.context_block.attn.qkv.weight": ONE}, "is a Flux, SD 3 or other"),
    "edm": (lambda: in_ldm("sdxl") | {"edm_mean": ONE}, "was trained with another noise schedule"),
    "controlnet": (lambda: {"control_model.input_hint_block.0.bias": ONE}, "is a ControlNet"),
    "vae": (lambda: renamed(only("sd1", VAE), VAE, ""), "holds a VAE alone"),
    "prefixed vae": (lambda: only("sd1", VAE), "holds a VAE alone"),
    "diffusers": (lambda: {"down_blocks.0.resnets.0.conv1.weight": ONE}, "holds a UNet alone, in diffusers' names"),
    "embedding": (lambda: {"emb_params": ONE}, "is a textual inversion embedding"),
    "something else": (lambda: {"layers.0.weight": ONE}, "is not a checkpoint of the Stable Diffusion family"),
    "nothing": (dict, "is not a checkpoint of the Stable Diffusion family"),
    "unet": (lambda: only("sd1", UNET), "lacks text encoders"),
    "no vae": (lambda: without("sd1", VAE), "holds no VAE"),
    "lacking": (lambda: without("sd1", f"{UNET}out.2.weight"), f"is no whole model: {UNET}out.2.weight is missing"),
    "flat": (lambda: in_ldm("sd1") | {f"{UNET}out.2.weight": ONE}, "is no whole model: model.diffusion_model.out.2."),
    "vocabulary": (lambda: in_ldm("sd1") | {TOKENS: torch.zeros(9, 64)}, "reads text in a vocabulary of 9 words"),
    "wider text": (
        with_wider_text,
        "is no whole model: its UNet reads text of width 192, and its text encoders give 256",
    ),
}


@pytest.mark.parametrize("kind", NO_BASES)
def test_what_is_no_base_is_refused(kind: str, tmp_path: Path):
    tensors, what = NO_BASES[kind]
    assert what_is_wrong(write(tmp_path / "model.safetensors", tensors())).startswith(f"model.safetensors {what}")


@pytest.mark.parametrize("share", [0, 0.0001, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused(share: float, tmp_path: Path):
    path = write(tmp_path / "model.safetensors", in_ldm("sd1"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert re.search("is not a whole safetensors file|is empty", what_is_wrong(path))


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert what_is_wrong(tmp_path / "model.gguf") == "model.gguf is no file of weights"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({f"{UNET}out.2.bias": None}, "1 weights are missing or of another shape, such as conv_out.bias"),
        ({f"{UNET}out.2.bias": torch.zeros(5)}, "1 weights are missing or of another shape, such as conv_out.bias"),
        ({f"{UNET}middle_block.9.weight": torch.zeros(5)}, "is no part of a sd1 model of this shape"),
    ],
)
def test_weights_that_are_missing_or_too_many_are_named_when_it_loads(
    change: dict[str, Tensor | None], what: str, tmp_path: Path
):
    tensors = {key: tensor for key, tensor in (in_ldm("sd1") | change).items() if tensor is not None}
    info = inspect_base(str(write(tmp_path / "model.safetensors", tensors)))
    with pytest.raises(BaseModelError, match=what):
        load_base(info)


# ---------------------------------------------------------------------------------------------------------------------
# another VAE


@pytest.fixture(scope="module")
def other_vae() -> AutoencoderKL:
    torch.manual_seed(99)
    return small_vae().eval()


def vae_in_ldm(vae: AutoencoderKL) -> dict[str, Tensor]:
    parts = {"unet": {}, "vae": vae.state_dict(), "text_encoder": {}}
    return to_ldm("sd1", parts, parts_of("sd1")["unet"].config, vae.config)


def save_vae(kind: str, vae: AutoencoderKL, folder: Path) -> Path:
    file, ldm = folder / "vae.safetensors", vae_in_ldm(vae)
    if kind == "folder":
        vae.save_pretrained(folder / "other")
        return folder / "other"
    if kind == "subfolder":
        vae.save_pretrained(folder / "model/vae")
        return folder / "model"
    if kind == "pickle":
        torch.save({"state_dict": {key.removeprefix(VAE): t for key, t in ldm.items()}}, folder / "vae.pt")
        return folder / "vae.pt"
    if kind == "ldm":
        return write(file, {key.removeprefix(VAE): t for key, t in ldm.items()} | {"loss.logvar": torch.zeros(1)})
    if kind == "whole model":
        return write(file, in_ldm("sd1") | ldm)
    tensors = vae.state_dict()
    if kind == "old diffusers":
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            tensors = {key.replace(f".attentions.0.{new}.", f".attentions.0.{old}."): t for key, t in tensors.items()}
    return write(file, tensors)


VAE_KINDS = ["folder", "subfolder", "pickle", "ldm", "whole model", "diffusers", "old diffusers"]


@pytest.mark.parametrize("kind", VAE_KINDS)
def test_another_vae_stands_in(kind: str, other_vae: AutoencoderKL, tmp_path: Path, offline: None):
    model = str(write(tmp_path / "model.safetensors", in_ldm("sd1")))
    vae = save_vae(kind, other_vae, tmp_path)
    own, info = inspect_base(model), inspect_base(model, str(vae))
    assert (info.vae, info.family) == (str(vae.resolve()), "sd1")
    assert info.identity != own.identity
    base = load_base(info)
    assert base.vae_fingerprint != load_base(own).vae_fingerprint
    theirs = base.vae.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in other_vae.state_dict().items())
    assert base.scaling_factor == info.scaling_factor == 0.18215


def test_it_scales_latents_as_its_own_configuration_says_or_as_the_base(other_vae: AutoencoderKL, tmp_path: Path):
    model = str(write(tmp_path / "model.safetensors", in_ldm("sdxl"), {"modelspec.prediction_type": "epsilon"}))
    file, folder = save_vae("ldm", other_vae, tmp_path), save_vae("folder", other_vae, tmp_path)
    assert load_base(inspect_base(model, str(file))).scaling_factor == 0.13025
    info = inspect_base(model, str(folder))
    assert load_base(info).scaling_factor == 0.18215
    assert any("base.vae scales its latents by 0.18215" in told for told in info.assumptions)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["scaling_factor"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_base(inspect_base(model, str(folder))).scaling_factor == 0.13025


def test_a_vae_of_the_hub_is_taken_from_the_cache(
    other_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
):
    from huggingface_hub import constants

    commit = "c0ffee" + "0" * 34
    model = tmp_path / "models--owner--vae"
    other_vae.save_pretrained(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit, encoding="utf-8")
    for module in (constants, sys.modules["huggingface_hub.file_download"]):
        monkeypatch.setattr(module.constants if hasattr(module, "constants") else module, "HF_HUB_CACHE", str(tmp_path))
    info = inspect_base(str(make_sd1(tmp_path / "base")), "owner/vae")
    assert (info.vae, info.vae_revision, info.vae_subfolder) == ("owner/vae", commit, "")
    assert f"owner/vae@{commit}" in info.identity


@pytest.mark.parametrize("kind", ["folder", "ldm", "diffusers"])
def test_a_vae_that_does_not_fit_is_refused(kind: str, tmp_path: Path):
    model = write(tmp_path / "model.safetensors", in_ldm("sd1"))
    vae = save_vae(kind, small_vae(latents=8), tmp_path)
    assert "8" in what_is_wrong(model, vae, "base.vae")
    (tmp_path / "deeper").mkdir()
    vae = save_vae(kind, small_vae(sizes=3), tmp_path / "deeper")
    assert "makes a latent of 4 x 4 pixels" in what_is_wrong(model, vae, "base.vae")


def test_what_is_no_vae_is_refused(tmp_path: Path):
    model = write(tmp_path / "model.safetensors", in_ldm("sd1"))
    assert "does not exist" in what_is_wrong(model, "nothing", "base.vae")
    assert "has no config.json" in what_is_wrong(model, tmp_path, "base.vae")
    lora = write(tmp_path / "lora.safetensors", {"lora_unet_a.lora_up.weight": torch.zeros(1)})
    assert what_is_wrong(model, lora, "base.vae") == "lora.safetensors holds no VAE"
    flux = {key: t for key, t in small_vae().state_dict().items() if "quant_conv" not in key}
    assert "of another family" in what_is_wrong(model, write(tmp_path / "flux.safetensors", flux), "base.vae")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}', encoding="utf-8")
    assert "AutoencoderTiny" in what_is_wrong(model, tmp_path, "base.vae")
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    assert "is not a JSON object" in what_is_wrong(model, tmp_path, "base.vae")


# ---------------------------------------------------------------------------------------------------------------------
# a VAE in half precision


def overflowing(base: Base) -> Base:
    """A channel in the middle of encoder and decoder that is beyond fp16 on the way, and harmless in fp32."""
    with torch.no_grad():
        for half in (base.vae.encoder, base.vae.decoder):
            resnet = half.mid_block.resnets[0]
            resnet.conv1.bias[0] = 6e4
            resnet.conv1.weight[0] = 2e4 * resnet.conv1.weight[0].sign()
    return base


def examples_of(folder: Path) -> list[Example]:
    source = Source(path=folder, label=folder.name, resolutions=(64,), captions=CaptionRules())
    return load_examples([source], BucketRules(16), 0)


@pytest.fixture
def photo(tmp_path: Path) -> list[Example]:
    (tmp_path / "photos").mkdir()
    draw_picture(3, (64, 64)).save(tmp_path / "photos/a.png")
    return examples_of(tmp_path / "photos")


def quiet(done: int, total: int) -> None:
    pass


def entry_of(base: Base, photo: list[Example], folder: Path) -> dict[str, Tensor]:
    cache = LatentCache(folder, base.vae_fingerprint)
    cache.fill(base, photo, quiet)
    return load_file(cache.path(photo[0], photo[0].views[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_makes_other_latents_under_another_key(dtype: torch.dtype, photo: list[Example], tmp_path: Path):
    full, half = (load_base(inspect_base("pocket"), vae_dtype=kind) for kind in (torch.float32, dtype))
    assert half.vae.dtype == dtype
    assert half.vae_fingerprint != full.vae_fingerprint
    exact, rough = (entry_of(base, photo, tmp_path / "cache") for base in (full, half))
    assert rough["mean"].dtype == torch.float32
    assert not torch.equal(exact["mean"], rough["mean"])
    assert torch.allclose(exact["mean"], rough["mean"], atol=0.2)


def test_what_overflows_in_fp16_is_run_again_in_fp32(photo: list[Example], tmp_path: Path):
    half = overflowing(load_base(inspect_base("pocket"), vae_dtype=torch.float16))
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert not half.vae.encode(pixels.half()).latent_dist.mean.isfinite().all()
        assert not half.vae.decode(torch.randn(1, 4, 16, 16).half()).sample.isfinite().all()
    exact = load_base(inspect_base("pocket"))
    exact.vae.load_state_dict(half.vae.state_dict())  # what fp16 holds of the weights
    assert torch.equal(entry_of(half, photo, tmp_path)["mean"], entry_of(exact, photo, tmp_path)["mean"])
    assert half.vae.dtype == torch.float16
    latents = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(half.decode(latents), exact.decode(latents))
        assert all(map(torch.equal, half.posterior(pixels), exact.posterior(pixels)))


def test_an_image_that_is_not_finite_in_fp32_either_is_named(photo: list[Example], tmp_path: Path):
    broken = load_base(inspect_base("pocket"), vae_dtype=torch.float16)
    with torch.no_grad():
        broken.vae.encoder.conv_in.bias[0] = torch.nan
    with pytest.raises(DataError, match=r"a\.png: its latents are not finite"):
        LatentCache(tmp_path, broken.vae_fingerprint).fill(broken, photo, quiet)
