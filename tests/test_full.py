"""Full fine-tuning: what is to be trained is, what is to be frozen is not, and a whole model comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from typer.testing import CliRunner

from lorasmith.trainer import run
from lorasmith.trainer.adapter import adapter_state, strength
from lorasmith.trainer.bases import inspect_base
from lorasmith.trainer.cli import app
from lorasmith.trainer.configfile import to_toml
from lorasmith.trainer.errors import ConfigError, RunError, UserError
from lorasmith.trainer.full import trained_weights
from lorasmith.trainer.lorafile import LoraFile
from lorasmith.trainer.models import Base, load_base
from lorasmith.trainer.paths import lies_in, path_of
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.strengths import Strengths

from . import tiny
from .conftest import trained_run


@pytest.fixture
def full(short_run, tmp_path: Path):
    """A function that gives a short run which trains the weights of a tiny base."""
    model = str(tiny.make_sd1(tmp_path / "base"))

    def make(train_only: list[str] | None = None, **over: object):
        adapter = {"kind": "full", "rank": 16, "alpha": 16.0, "train_only": train_only or []}
        return short_run(**({"base": {"model": model}, "adapter": adapter} | over))

    return make


def weights_of(base: Base) -> dict[str, Tensor]:
    return {f"{c}.{name}": p.detach() for c, module in base.components.items() for name, p in module.named_parameters()}


def changed(base: Base) -> set[str]:
    """Paths of the weights that differ from the base's own."""
    before, after = weights_of(load_base(base.info)), weights_of(base)
    assert before.keys() == after.keys()
    names = (name for name in before if not torch.equal(before[name], after[name]))
    return {path_of(*name.split(".", 1)) for name in names}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_all_weights_that_are_read_change(family, full, tmp_path):
    tiny.MAKERS[family](tmp_path / family)
    trainer = trained_run(full(base={"model": str(tmp_path / family)}))
    still = {path_of(*name.split(".", 1)) for name in weights_of(trainer.base)} - changed(trainer.base)
    if family == "sdxl":  # reads the first text encoder's last layer but one
        still = {path for path in still if not lies_in(path, "text_encoder.encoder.layers.2")}
        still.discard("text_encoder.final_layer_norm.weight")
        still.discard("text_encoder.final_layer_norm.bias")
    assert still == set()
    assert {parameter.dtype for parameter in trainer.trained} == {torch.float32}


@pytest.mark.parametrize(
    "blocks",
    [["unet.up_blocks", "text_encoder.encoder.layers.1"], ["unet.*.attentions", "text_encoder"]],
    ids=["two blocks", "a pattern and a component"],
)
def test_only_the_named_blocks_change(blocks, full):
    trainer = trained_run(full(blocks))
    paths = changed(trainer.base)
    assert paths
    assert all(any(lies_in(path, block) for block in blocks) for path in paths)
    for block in blocks:
        assert any(lies_in(path, block) for path in paths), block
    assert sum(part.parameters for part in trainer.parts) == sum(p.numel() for p in trainer.trained)
    assert set(adapter_state(trainer.base)) == set(trained_weights(trainer.base))


def test_a_pattern_means_all_that_it_names(full):
    trainer = trained_run(full(["unet.*.attentions", "text_encoder"]))
    in_unet = {path for path in changed(trainer.base) if path.startswith("unet.")}
    assert in_unet == {
        path_of("unet", name) for name, _ in trainer.base.unet.named_parameters() if ".attentions." in name
    }


def test_one_of_two_text_encoders_may_be_trained_alone(full, tmp_path):
    tiny.make_sdxl(tmp_path / "sdxl")
    trainer = trained_run(full(["unet.mid_block", "text_encoder_2"], base={"model": str(tmp_path / "sdxl")}))
    assert {path.split(".")[0] for path in changed(trainer.base)} == {"unet", "text_encoder_2"}
    assert [part.name for part in trainer.parts] == ["unet", "text_encoder_2"]


def test_weights_of_another_base_are_refused(full, tmp_path):
    config = full(["unet.mid_block", "text_encoder"])
    run_folder = trained_run(config).run
    tiny.make_sd1(tmp_path / "base", layers_per_block=1)
    with pytest.raises(RunError, match="the base model has changed"):
        run.load_run(run_folder.path, None)


def test_a_frozen_text_encoder_stays_as_it_was_and_its_captions_are_cached(full):
    adapter = {"kind": "full", "rank": 16, "alpha": 16.0, "text_encoder": False}
    trainer = trained_run(full(adapter=adapter, optimizer={"text_encoder_lr": 0.0}))
    assert {path.split(".")[0] for path in changed(trainer.base)} == {"unet"}
    assert trainer.text.cache.folder.is_dir()


def test_a_block_that_is_not_there_is_an_error_that_lists_those_that_are(full):
    config = full(["unet.upblocks", "unet.mid_block", "text_encoder.layers.99"])
    with pytest.raises(UserError) as caught:
        make_plan(config)
    assert [problem.where for problem in caught.value.problems] == ["adapter.train_only"] * 2
    assert "unet.upblocks is no block" in str(caught.value)
    assert "unet.up_blocks.0" in str(caught.value)
    assert "text_encoder.encoder.layers.0" in str(caught.value)
    assert not Path(config.runs, config.name).exists()


def test_a_part_without_a_trained_block_is_an_error(full):
    with pytest.raises(UserError, match="no block of text_encoder"):
        make_plan(full(["unet.mid_block"]))


@pytest.mark.parametrize(
    ("adapter", "key"),
    [
        ({"kind": "full", "rank": 8, "alpha": 16.0}, "adapter.rank"),
        ({"kind": "full", "rank": 16, "alpha": 16.0, "targets": "attention+ff"}, "adapter.targets"),
    ],
)
def test_settings_of_the_other_kind_are_errors(adapter, key, short_run):
    with pytest.raises(ConfigError) as caught:
        short_run(adapter=adapter)
    assert [problem.where for problem in caught.value.problems] == [f"configuration: {key}"]
    assert "has no effect" in str(caught.value)


def test_a_lora_rate_is_warned_of(full):
    assert any("1e-5 is usual" in warning for warning in make_plan(full(optimizer={"lr": 1e-4})).warnings())
    assert not any(
        "1e-5" in warning for warning in make_plan(full(optimizer={"lr": 1e-5, "text_encoder_lr": 5e-6})).warnings()
    )


def test_strength_interpolates_between_the_base_and_the_tuned_weights(full):
    base = trained_run(full()).base
    original, tuned = weights_of(load_base(base.info)), {name: w.clone() for name, w in weights_of(base).items()}
    with strength(base, 0):
        assert all(torch.equal(weight, original[name]) for name, weight in weights_of(base).items())
    with strength(base, 0.25):
        expected = {name: 0.75 * original[name] + 0.25 * tuned[name] for name in tuned}
        assert all(torch.allclose(weight, expected[name], atol=1e-6) for name, weight in weights_of(base).items())
    assert all(torch.equal(weight, tuned[name]) for name, weight in weights_of(base).items())


def test_a_block_of_a_whole_model_has_a_strength_of_its_own(full):
    base = trained_run(full()).base
    original, tuned = weights_of(load_base(base.info)), {name: w.clone() for name, w in weights_of(base).items()}
    strengths = Strengths(1.0, (("unet.up_blocks", 0.0), ("unet.*.attentions", 0.5), ("text_encoder", -1.0)))
    with strength(base, strengths):
        for name, weight in weights_of(base).items():
            expected = torch.lerp(original[name], tuned[name], strengths.of(*name.split(".", 1)))
            assert torch.allclose(weight, expected, atol=1e-6), name
            if name.startswith("unet.conv_in"):
                assert torch.equal(weight, tuned[name])
    assert all(torch.equal(weight, tuned[name]) for name, weight in weights_of(base).items())
    with (
        pytest.raises(ConfigError, match=r"unet\.side_blocks is no block"),
        strength(base, Strengths(1.0, (("unet.side_blocks", 0.5),))),
    ):
        pass


@pytest.fixture
def finished(full, tmp_path) -> Path:
    """The folder of a run that was trained by the command line's own path."""
    config = full(["unet.up_blocks", "text_encoder"], budget={"images": 7}, sample={"every": 100, "steps": 2})
    (tmp_path / "full.toml").write_text(to_toml(config), encoding="utf-8")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "full.toml")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "full: weights of unet and text_encoder, only unet.up_blocks, text_encoder" in result.output
    return Path(config.runs, config.name)


def test_a_whole_model_comes_out_that_diffusers_loads(finished):
    live = weights_of(run.load_run(finished, None).base)
    pipeline = StableDiffusionPipeline.from_pretrained(finished / "exports" / "short-diffusers")
    for name, weight in pipeline.unet.named_parameters():
        assert torch.equal(weight, live[f"unet.{name}"].half().float()), name
    tokenizer = json.loads((finished / "exports/short-diffusers/tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)
    file = LoraFile.open(finished / "exports" / "short.safetensors")
    assert file.metadata["modelspec.architecture"] == "stable-diffusion-v1"
    card = (finished / "exports" / "short.md").read_text(encoding="utf-8")
    assert "load_lora_weights" not in card
    assert "from_pretrained('short-diffusers')" in card
    assert '"lora"' not in card


def test_its_formats_and_strengths_are_those_of_a_whole_model(finished, tmp_path):
    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or result.exit_code == 0, result.exception
        return result.output

    call("export", finished, "--format", "ldm", "--precision", "fp32", "--out", tmp_path / "out")
    assert [file.name for file in sorted((tmp_path / "out").glob("*.safetensors"))] == ["short.safetensors"]
    call("convert", tmp_path / "out" / "short.safetensors", tmp_path / "folder")
    again, live = load_base(inspect_base(str(tmp_path / "folder"))), run.load_run(finished, None).base
    assert all(torch.equal(weight, weights_of(live)[name]) for name, weight in weights_of(again).items())
    call("convert", tmp_path / "folder", tmp_path / "again.safetensors", "--precision", "fp32")
    assert (tmp_path / "again.safetensors").is_file()

    call("sample", finished, "--prompt", "a house", "--strength", "0", "--out", tmp_path / "drawn")
    assert [file.name for file in (tmp_path / "drawn").iterdir()] == ["00.png"]
    result = CliRunner().invoke(app, ["export", str(finished), "--format", "kohya"])
    assert "there is no format 'kohya' of this run" in str(result.exception)
