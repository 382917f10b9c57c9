"""`RunConfig`: the one description of a run. TOML, command line, browser form and documents come from its fields.

Every setting is defined once, here, with its type, bounds, default and a docstring that gives the reason for the
default. The order of precedence is: default, then recipe, then file, then `--set section.key=value`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigError, Problem, UserError
from .files import write_text

Targets = Literal["attention", "attention+ff", "attention+ff+conv"]
Attention = Literal["auto", "sdpa", "xformers"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]


class Section(BaseModel):
    """A table of the file. Unknown keys are errors; the docstring under a field is its help text."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class BaseSection(Section):
    """The model that is fine-tuned."""

    model: str = Field(default="pocket", min_length=1)
    """A Hub id, a diffusers folder, `pocket` (embedded), or `random:sd15`, `random:sd21`, `random:sdxl` (for tests)."""


class DataSection(Section):
    """One folder of images; repeat the table for more."""

    path: str = Field(min_length=1)
    """The folder of images, flat or nested. A relative path counts from the folder of the configuration file."""
    trigger: str = ""
    """The word that calls the style; put before each caption that does not hold it already. Empty: none."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often each image is shown in one epoch. 2 shows each twice, 0.5 every other epoch."""
    resolution: int = Field(default=0, ge=0, le=4096)
    """Side in pixels of the square whose area every bucket has. 0: the size the base was trained at."""
    caption_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of captions replaced by the empty one, which keeps classifier-free guidance alive. 0.05 to 0.1 is usual."""


class AdapterSection(Section):
    """The small weights that are trained beside the frozen base."""

    kind: Literal["lora"] = "lora"
    """The kind of adapter; LoRA is read by every client."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Width of the low-rank matrices. 16 holds a style; a larger rank copies more of the training images."""
    alpha: float = Field(default=16.0, gt=0, le=4096)
    """The effect is scaled by alpha / rank. Equal to the rank, so that a learning rate means the same at any rank."""
    targets: Targets = "attention"
    """Which layers get an adapter. Attention is enough for most styles; feed-forward and convolutions add texture."""
    unet: bool = True
    """Train an adapter on the UNet."""
    text_encoder: bool = True
    """Train adapters on the text encoder, on both of them for SDXL. Helps the trigger word take hold."""


class BudgetSection(Section):
    """How long to train. Images seen is the one unit of length; steps follow from it."""

    images: int = Field(default=2000, ge=1, le=100_000_000)
    """Images seen in training. 20 images shown 100 times each are 2000."""
    batch: int = Field(default=4, ge=1, le=4096)
    """Images in one forward and backward pass, on each process. Lower it when memory runs out."""
    accumulate: int = Field(default=1, ge=1, le=4096)
    """Batches whose gradients are added before the weights change. 2 x batch 2 equals batch 4 in less memory."""


class OptimizerSection(Section):
    """How the adapter's weights change."""

    kind: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: float = Field(default=1e-4, ge=0, le=1)
    """Learning rate of the UNet's adapter. 1e-4 is the usual place to start for rank 16 and alpha 16."""
    text_encoder_lr: float = Field(default=5e-5, ge=0, le=1)
    """Learning rate of the text encoders' adapters; they overfit sooner, so half of the UNet's or less."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape of the learning rate after the warm-up. Cosine ends near zero, which steadies the last checkpoints."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=0, le=1e6)
    """Gradients whose norm over all adapters is larger are scaled down to it. 0: no clipping."""


class ObjectiveSection(Section):
    """What the model is asked to predict, and how its errors are weighed."""

    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the UNet predicts. auto: what the base's scheduler says; change it only when that is known to be wrong."""
    min_snr_gamma: float = Field(default=5.0, ge=0, le=1000)
    """Min-SNR weighting (Hang et al. 2023) evens out the time-steps. 5 is the paper's value. 0: off."""
    noise_offset: float = Field(default=0.0, ge=0, le=1)
    """A constant added to each channel of the noise lets the model learn darker and lighter pictures. 0.05 is mild."""


class SaveSection(Section):
    """Checkpoints, in steps."""

    every: int = Field(default=100, ge=0, le=10_000_000)
    """A checkpoint each so many steps, and one at the end. 0: only at the end."""
    keep: Literal["all"] | int = "all"
    """`all`, or how many of the newest checkpoints to keep."""

    @field_validator("keep")
    @classmethod
    def at_least_one(cls, keep: str | int) -> str | int:
        if isinstance(keep, int) and keep < 1:
            raise ValueError('must be "all" or a number of at least 1')
        return keep


class SampleSection(Section):
    """Previews: the same prompts and seeds at every step, the untouched base first. They say what the LoRA does."""

    every: int = Field(default=100, ge=0, le=10_000_000)
    """Previews each so many steps, at step 0 and at the end. 0: never."""
    prompts: list[str] = Field(default_factory=list)
    """What to draw. Empty: four captions of the training images are taken when the run is planned."""
    negative_prompt: str = ""
    """What the previews should not show."""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """The first prompt's seed; the second's is one more, and so on."""
    steps: int = Field(default=25, ge=1, le=1000)
    """DDIM steps of one preview."""
    guidance: float = Field(default=7.0, ge=1, le=50)
    """Classifier-free guidance scale. 1: none."""


class RuntimeSection(Section):
    """How the computer is used; it changes speed and memory, not the aim."""

    precision: Precision = "auto"
    """Precision of the frozen base; adapters are always fp32. auto: bf16 or fp16 on a GPU, fp32 on a CPU."""
    attention: Attention = "auto"
    """Attention kernels. auto: PyTorch's own (sdpa). xformers needs an NVIDIA GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cache: str = ""
    """Folder of latents and text embeddings. Empty: the user's cache folder."""


class RunConfig(Section):
    """Everything a run needs to know."""

    name: str = Field(min_length=1, max_length=100)
    """The run's name: its folder is `runs/<name>`, its file `<name>.safetensors`. A name in use is refused."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Seed of everything random: adapter, order, noise, time-steps, caption dropout."""
    runs: str = "runs"
    """The folder that holds run folders. A relative path counts from the folder where the command is run."""
    base: BaseSection = Field(default_factory=BaseSection)
    data: list[DataSection] = Field(min_length=1)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    budget: BudgetSection = Field(default_factory=BudgetSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    save: SaveSection = Field(default_factory=SaveSection)
    sample: SampleSection = Field(default_factory=SampleSection)
    runtime: RuntimeSection = Field(default_factory=RuntimeSection)

    @field_validator("name")
    @classmethod
    def a_plain_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[^\W_][\w. -]*", name) or name.endswith((".", " ")):
            raise ValueError("must start with a letter or digit and hold only letters, digits, spaces and . _ -")
        return name

    @model_validator(mode="after")
    def nothing_without_effect(self) -> RunConfig:
        problems = list(self._settings_without_effect())
        if problems:
            raise ValueError(_NESTED_PROBLEMS, problems)
        return self

    def _settings_without_effect(self) -> Iterator[Problem]:
        adapter, optimizer = self.adapter, self.optimizer
        if not (adapter.unet or adapter.text_encoder):
            yield Problem(
                "adapter.unet", "nothing is trained: adapter.text_encoder is off as well", "Set one of the two to true."
            )
        parts = (("unet", adapter.unet, "lr"), ("text_encoder", adapter.text_encoder, "text_encoder_lr"))
        for part, trained, key in parts:
            if trained and getattr(optimizer, key) == 0:
                yield Problem(
                    f"optimizer.{key}",
                    f"is 0, so adapter.{part} would be trained without changing",
                    f"Give a rate above 0, or set adapter.{part} = false.",
                )
            elif not trained and key not in optimizer.model_fields_set:
                setattr(optimizer, key, 0.0)
            elif not trained and getattr(optimizer, key) > 0:
                yield Problem(
                    f"optimizer.{key}",
                    f"has no effect, because adapter.{part} is false",
                    f"Remove it (or set it to 0), or set adapter.{part} = true.",
                )


_NESTED_PROBLEMS = "several settings have no effect"


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_config(path: Path, overrides: Sequence[str] = (), recipe: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a TOML file, lay it over a recipe and under `--set` overrides, and validate the whole.

    Raises:
        ConfigError: with every problem of the file at once, each with its dotted path.
    """
    values = merge(recipe or {}, read_toml(path))
    for override in overrides:
        set_value(values, override)
    config = validate(values, source=path.name)
    for data in config.data:
        data.path = str(_absolute(data.path, path.parent))
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file as plain dictionaries."""
    try:
        return tomlkit.parse(path.read_text(encoding="utf-8-sig")).unwrap()
    except FileNotFoundError:
        raise ConfigError("no such file", str(path), "Write one with: lorasmith init FILE --images DIR") from None
    except IsADirectoryError:
        raise ConfigError("is a folder, not a configuration file", str(path), "Name a .toml file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text ({error.reason})", str(path), "Save it as UTF-8.") from None
    except tomlkit.exceptions.TOMLKitError as error:
        raise ConfigError(f"is not valid TOML: {error}", str(path), "Mend that line.") from None


def validate(values: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Values to a `RunConfig`; all problems in one `ConfigError`."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [problem for detail in error.errors() for problem in _explain(detail, source)]
        raise ConfigError.of(problems) from None


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are laid over each other key by key; any other value of `over` replaces the one of `under`."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def set_value(values: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value` in place; the value is read as TOML, or else as plain text.

    `data.path=...` sets the first data table, `data.1.path=...` the second.
    """
    dotted, equals, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise ConfigError("is not of the form section.key=value", f"--set {override}", "Example: --set adapter.rank=8")
    if keys[0] == "data" and len(keys) == 2:
        keys.insert(1, "0")
    table: Any = values
    for key, following in pairwise(keys):
        if isinstance(table, list):
            table = _list_entry(table, key, override)
        else:
            table = table.setdefault(key, [] if following.isdigit() else {})
    if isinstance(table, list) or not isinstance(table, dict):
        raise ConfigError("does not name a setting", f"--set {override}", "Name it by its dotted path.")
    table[keys[-1]] = _toml_value(text.strip())


def _list_entry(tables: list[Any], key: str, override: str) -> Any:
    if not key.isdigit() or int(key) > len(tables):
        raise ConfigError(f"there is no table number {key}", f"--set {override}", "The first one is number 0.")
    if int(key) == len(tables):
        tables.append({})
    return tables[int(key)]


def _toml_value(text: str) -> Any:
    try:
        return tomlkit.value(text).unwrap()
    except (tomlkit.exceptions.TOMLKitError, ValueError):
        return text


def _absolute(path: str, start: Path) -> Path:
    return (start.absolute() / Path(path).expanduser()).resolve()


def _explain(detail: Any, source: str) -> Iterator[Problem]:
    """One pydantic error in the words of this project."""
    path = [part for part in detail["loc"] if not str(part).startswith(("literal[", "int", "constrained"))]
    dotted = ".".join(str(part) for part in path)
    nested = detail.get("ctx", {}).get("error")
    if isinstance(nested, ValueError) and nested.args and nested.args[0] == _NESTED_PROBLEMS:
        yield from (Problem(f"{source}: {p.where}", p.what, p.fix) for p in nested.args[1])
    elif detail["type"] == "extra_forbidden":
        yield Problem(f"{source}: {dotted}", "unknown key", _did_you_mean(path))
    elif detail["type"] == "missing":
        yield Problem(f"{source}: {dotted}", "is missing", _HOW_TO_GIVE.get(dotted, "Give it a value."))
    else:
        message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
        shown = "" if isinstance(detail["input"], dict | list) else f" (it is {detail['input']!r})"
        yield Problem(f"{source}: {dotted}", f"{message}{shown}", _help_of(path))


_HOW_TO_GIVE = {
    "name": 'Add a line such as: name = "my-style"',
    "data": 'Add a table: [[data]] and under it path = "photos/"',
}


def _did_you_mean(path: Sequence[Any]) -> str:
    known = [dotted for dotted, _ in settings()]
    known += [name for name, field in RunConfig.model_fields.items() if _table_of(field.annotation)]
    wanted = ".".join(str(part) for part in path if not isinstance(part, int))
    siblings = [name for name in known if name.rpartition(".")[0] == wanted.rpartition(".")[0]]
    last = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(wanted, siblings + known, n=1, cutoff=0.6)
    if not close and (same := difflib.get_close_matches(wanted.rpartition(".")[2], list(last), n=1, cutoff=0.75)):
        close = [last[same[0]]]
    return f"Did you mean {close[0]}?" if close else f"Known here: {', '.join(siblings)}."


def _help_of(path: Sequence[Any]) -> str:
    wanted = ".".join(str(part) for part in path if not isinstance(part, int))
    return next((field.description or "" for dotted, field in settings() if dotted == wanted), "")


# ---------------------------------------------------------------------------------------------------------------------
# the fields, for whoever shows them: files, forms, documents


def settings(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted path, pydantic field), in the order of the file; of a list of tables, one."""
    for name, field in section.model_fields.items():
        table = _table_of(field.annotation)
        if table is None:
            yield f"{prefix}{name}", field
        else:
            yield from settings(table, f"{prefix}{name}.")


def _table_of(annotation: Any) -> type[Section] | None:
    """The section class behind `AdapterSection` or `list[DataSection]`; None for a plain setting."""
    inner = get_args(annotation)[0] if getattr(annotation, "__origin__", None) is list else annotation
    return inner if isinstance(inner, type) and issubclass(inner, Section) else None


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_config(config: RunConfig, path: Path) -> None:
    """Write the complete configuration, every value spelled out, whole or not at all."""
    write_text(path, to_toml(config, comments=False))


def to_toml(config: RunConfig, comments: bool = True) -> str:
    """The complete configuration as TOML; with `comments`, each value has its docstring above it."""
    document = tomlkit.document()
    tables = [name for name, field in RunConfig.model_fields.items() if _table_of(field.annotation)]
    _fill(document, config, comments, skip=tables)
    for name in tables:
        value = getattr(config, name)
        if isinstance(value, list):
            array = tomlkit.aot()
            for entry in value:
                array.append(_fill(tomlkit.table(), entry, comments))
            document.append(name, array)
        else:
            document.append(name, _fill(tomlkit.table(), value, comments))
    return tomlkit.dumps(document)


def _fill(table: Any, section: Section, comments: bool, skip: Sequence[str] = ()) -> Any:
    for name, field in type(section).model_fields.items():
        if name in skip:
            continue
        if comments and field.description:
            for line in field.description.splitlines():
                table.add(tomlkit.comment(line.strip()))
        table.add(name, getattr(section, name))
    table.add(tomlkit.nl())
    return table


__all__ = ["RunConfig", "UserError", "read_config", "settings", "to_toml", "validate", "write_config"]
