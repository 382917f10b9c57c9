"""`RunConfig`: the one description of a run. TOML, command line, browser form and documents come from its fields.

Every setting is defined once, here, with its type, bounds, default and a docstring that gives the reason for the
default. `configfile.py` reads and writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .errors import Problem

Targets = Literal["attention", "attention+ff", "attention+ff+conv"]
Attention = Literal["auto", "sdpa", "xformers"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]


class Section(BaseModel):
    """A table of the file. Unknown keys and values of another type are errors; a field's docstring is its help text."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


class BaseSection(Section):
    """The model that is fine-tuned."""

    model: str = Field(default="pocket", min_length=1)
    """A Hub id, a diffusers folder, `pocket` (embedded), or `random:sd15`, `random:sd21`, `random:sdxl` (for tests)."""


class DataSection(Section):
    """One set of images and its rules; repeat the table for more."""

    path: str = Field(min_length=1)
    """A folder of images, flat or nested; a .zip of one; a .parquet table; or "hf:owner/name", a data set on the
    Hugging Face Hub. A relative path counts from the folder of the configuration file."""
    trigger: str = ""
    """The word that calls the style; put where a caption says [trigger], or before each that does not hold it already.
    Empty: none."""
    weight: float = Field(default=1.0, ge=0.01, le=1000)
    """How often each image is shown in one epoch (its repeats). 2 shows each twice, 0.5 every other epoch."""
    resolution: int | list[int] = 0
    """Side in pixels of the square whose area every bucket has. A list, as in [512, 768]: an image's showings take them
    in turn. 0: the size the base was trained at."""
    regularization: bool = False
    """These images are no part of the style: they keep what the base knows (prior preservation, Ruiz et al. 2023)."""
    prior_loss_weight: float = Field(default=1.0, ge=0, le=100)
    """With regularization: the weight of the loss of these images. 1: as of all others."""
    mask: Literal["files", "alpha", "none"] = "files"
    """Which parts of an image are learned. files: pictures in a mask/ folder, where there are some, white for all of
    the loss, black for none; alpha: the image's own opacity; none: all of every image."""
    unmasked_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of the loss where a mask is black. A little, as 0.1, keeps backgrounds from running wild."""
    caption_lines: Literal["join", "variants"] = "join"
    """Several lines in a caption file are one caption (join), or one caption each, of which a showing takes one."""
    caption_prefix: str = ""
    """Put before each caption, as it is: end it with a comma or a space. The trigger comes before it."""
    caption_suffix: str = ""
    """Put after each caption, as it is."""
    caption_separator: str = Field(default=",", min_length=1)
    """What stands between tags."""
    shuffle_caption: bool = False
    """Tags come in another order each time, so that none is tied to its place."""
    keep_tokens: int = Field(default=0, ge=0, le=1000)
    """So many tags at the front of a caption are neither shuffled nor dropped."""
    keep_tokens_separator: str = ""
    """A mark, such as |||: the tags before it are neither shuffled nor dropped, instead of a fixed number."""
    caption_tag_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Each tag is left out with this probability."""
    wildcards: bool = False
    """{red|blue} in a caption becomes one of the two."""
    caption_variants: int = Field(default=8, ge=1, le=1000)
    """How many variants of a caption are drawn, where tags or wildcards make it vary; with frozen text encoders each of
    them is cached."""
    caption_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of captions replaced by the empty one, which keeps classifier-free guidance alive. 0.05 to 0.1 is usual."""
    machine_weight: float = Field(default=1.0, ge=0.01, le=1000)
    """Multiplies weight for images whose caption `lorasmith caption` wrote and nobody has edited since."""
    machine_caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Added to caption_dropout for such captions: a machine's words are trusted less."""
    flip: bool = False
    """Show each image mirrored as well. Not for styles with writing, or with a left and a right."""
    crop: Literal["center", "random"] = "center"
    """Where the part that a bucket cannot hold is cut off."""
    crop_jitter: float = Field(default=0.0, ge=0, le=1)
    """Enlarge an image by up to this share before it is cropped, so that compositions vary."""
    colour_jitter: float = Field(default=0.0, ge=0, le=0.9)
    """Change brightness, contrast and saturation by up to this share. The style then learns that colours vary."""
    augmentations: int = Field(default=4, ge=1, le=1000)
    """How many random crops and colours are drawn of an image; each is encoded once and cached."""

    @field_validator("resolution", mode="plain")  # in place of pydantic's own, which reports a problem for each of two
    @classmethod
    def one_side_or_several(cls, given: Any) -> int | list[int]:
        sides = given if isinstance(given, list) else [given]
        if not sides or not all(type(side) is int and 0 <= side <= 4096 for side in sides):
            raise ValueError("must be a number of pixels up to 4096, or a list of such numbers")
        if isinstance(given, list) and (0 in sides or len(set(sides)) < len(sides)):
            raise ValueError("must name each of several sides once, in pixels")
        return given

    @property
    def resolutions(self) -> list[int]:
        """Empty: the base's own."""
        given = self.resolution if isinstance(self.resolution, list) else [self.resolution]
        return [side for side in given if side]


class BucketsSection(Section):
    """Aspect-ratio buckets: no image is distorted, none is dropped, and batches are of one shape."""

    step: int = Field(default=0, ge=0, le=1024)
    """Sides are multiples of it, in pixels. 0: what the base's VAE and UNet need (64 for SD 1 and 2, 32 for SDXL)."""
    min_edge: int = Field(default=0, ge=0, le=8192)
    """Shortest side of a bucket in pixels. 0: any."""
    max_edge: int = Field(default=0, ge=0, le=8192)
    """Longest side of a bucket in pixels. 0: any."""
    max_ratio: float = Field(default=4.0, ge=1, le=16)
    """The longer side of a bucket is at most so many times the shorter one. 1: squares only."""
    upscale: bool = True
    """Enlarge images that are smaller than the resolution. false: they go to a smaller bucket."""
    max_crop: float = Field(default=0.25, ge=0, le=1)
    """The plan warns of each image that loses a larger share of its pixels, and says what would keep more."""


class AdapterSection(Section):
    """What is trained: small weights beside the frozen base, or the base's own."""

    kind: Literal["lora", "full"] = "lora"
    """lora: small matrices beside frozen weights, which every client reads. full: the base's own weights are trained
    (learning rates near 1e-5), and a whole model comes out."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Width of the low-rank matrices. 16 holds a style; a larger rank copies more of the training images."""
    alpha: float = Field(default=16.0, gt=0, le=4096)
    """The effect is scaled by alpha / rank. Equal to the rank, so that a learning rate means the same at any rank."""
    targets: Targets = "attention"
    """Which layers get an adapter. Attention is enough for most styles; feed-forward and convolutions add texture."""
    unet: bool = True
    """Train the UNet."""
    text_encoder: bool = True
    """Train the text encoder, both of them for SDXL. Helps the trigger word take hold."""
    train_only: list[str] = Field(default_factory=list)
    """With kind "full": the blocks that are trained, such as "unet.up_blocks", "text_encoder.encoder.layers.11" or
    "unet.*.attentions" (* is anything); all others are frozen. Empty: all are trained."""


class BudgetSection(Section):
    """How long to train. Images seen is the one unit of length; steps follow from it."""

    images: int = Field(default=2000, ge=1, le=100_000_000)
    """Images seen in training. 20 images shown 100 times each are 2000."""
    batch: int = Field(default=4, ge=1, le=4096)
    """Images in one forward and backward pass, on each process. Lower it when memory runs out."""
    accumulate: int = Field(default=1, ge=1, le=4096)
    """Batches whose gradients are added before the weights change. 2 x batch 2 equals batch 4 in less memory."""


class OptimizerSection(Section):
    """How the trained weights change."""

    kind: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: float = Field(default=1e-4, ge=0, le=1)
    """Learning rate of the UNet. 1e-4 is the usual start for a LoRA with alpha = rank, 1e-5 for kind "full"."""
    text_encoder_lr: float = Field(default=5e-5, ge=0, le=1)
    """Learning rate of the text encoders; they overfit sooner, so half of the UNet's or less. 5e-6 for kind "full"."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape of the learning rate after the warm-up. Cosine ends near zero, which steadies the last checkpoints."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    beta2: float = Field(default=0.999, gt=0, lt=1)
    """AdamW's memory of squared gradients. 0.999 looks back over about 1000 steps; 0.99 suits short, rough runs."""
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=0, le=1e6)
    """Gradients whose norm over all trained weights is larger are scaled down to it. 0: no clipping."""


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

    @field_validator("keep", mode="plain")  # in place of pydantic's own, which reports a problem for each of the two
    @classmethod
    def all_or_at_least_one(cls, keep: Any) -> str | int:
        if keep == "all" or (type(keep) is int and keep >= 1):  # True is an int, and no number
            return keep
        raise ValueError('must be "all" or a number of at least 1')


class SampleSection(Section):
    """Previews: the same prompts and seeds at every step, the untouched base first. They say what training does."""

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
    """Precision of the computation; what is trained is kept in fp32. auto: bf16 or fp16 on a GPU, fp32 on a CPU."""
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
    buckets: BucketsSection = Field(default_factory=BucketsSection)
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
        if _WINDOWS_DEVICE.fullmatch(name.partition(".")[0].rstrip()):
            raise ValueError("must not be the name of a device, which Windows takes for no file")
        if len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"must be at most {_LONGEST_NAME} bytes long, and these letters are {len(name.encode())}")
        return name

    @model_validator(mode="after")
    def nothing_without_effect(self) -> RunConfig:
        self._switch_off_rates()
        problems = [
            *self._idle_rates(),
            *self._idle_of_kind(),
            *self._idle_targets(),
            *self._idle_previews(),
            *self._idle_of_data(),
        ]
        if problems:
            raise ValueError(NESTED_PROBLEMS, problems)
        return self

    def _switch_off_rates(self) -> None:
        """A rate that was not given, of a part that is not trained, is 0."""
        for part, key in RATES.items():
            if not getattr(self.adapter, part) and key not in self.optimizer.model_fields_set:
                setattr(self.optimizer, key, 0.0)

    def _idle_rates(self) -> Iterator[Problem]:
        adapter, optimizer = self.adapter, self.optimizer
        if not (adapter.unet or adapter.text_encoder):
            yield Problem(
                "adapter.unet", "nothing is trained: adapter.text_encoder is off as well", "Set one of the two to true."
            )
        for part, key in RATES.items():
            trained = getattr(adapter, part)
            if trained and getattr(optimizer, key) == 0:
                yield Problem(
                    f"optimizer.{key}",
                    f"is 0, so adapter.{part} would be trained without changing",
                    f"Give a rate above 0, or set adapter.{part} = false.",
                )
            elif not trained and getattr(optimizer, key) > 0:
                yield Problem(
                    f"optimizer.{key}",
                    f"has no effect, because adapter.{part} is false",
                    f"Remove it (or set it to 0), or set adapter.{part} = true.",
                )

    def _idle_of_kind(self) -> Iterator[Problem]:
        """What belongs to the other kind. A complete file spells out the defaults as well, so these may stand."""
        kind = self.adapter.kind
        for key in OF_LORA if kind == "full" else OF_FULL:
            if getattr(self.adapter, key) != AdapterSection.model_fields[key].get_default(call_default_factory=True):
                other = "lora" if kind == "full" else "full"
                yield Problem(
                    f"adapter.{key}",
                    f'has no effect, because adapter.kind is "{kind}"',
                    f'Remove it, or set adapter.kind = "{other}".',
                )

    def _idle_targets(self) -> Iterator[Problem]:
        """Text encoders have no convolutions."""
        adapter = self.adapter
        if adapter.targets == "attention+ff+conv" and adapter.text_encoder and not adapter.unet:
            yield Problem(
                "adapter.targets",
                'is the same as "attention+ff", because adapter.unet is false',
                'Set adapter.targets = "attention+ff", or adapter.unet = true.',
            )

    def _idle_previews(self) -> Iterator[Problem]:
        """A complete file spells out the defaults as well, so these may stand."""
        for key in OF_PREVIEWS if self.sample.every == 0 else ():
            default = SampleSection.model_fields[key].get_default(call_default_factory=True)
            if getattr(self.sample, key) != default:
                yield Problem(
                    f"sample.{key}",
                    "has no effect, because sample.every is 0",
                    "Remove it, or set sample.every above 0.",
                )

    def _idle_of_data(self) -> Iterator[Problem]:
        """Settings of a set of images that wait for another one. A complete file spells out the defaults as well."""
        for number, data in enumerate(self.data):
            for key, (switches, fix) in OF_SWITCHES.items():
                field = DataSection.model_fields
                is_set = getattr(data, key) != field[key].default
                if is_set and not any(getattr(data, switch) != field[switch].default for switch in switches):
                    named = " and ".join(f"data.{switch}" for switch in switches)
                    without = f"has no effect, because {named} {'is' if len(switches) == 1 else 'are'} not set"
                    yield Problem(f"data.{number}.{key}", without, f"Remove it, or set {fix}.")
            if data.mask == "none" and data.unmasked_weight:
                what = 'has no effect, because data.mask is "none"'
                yield Problem(f"data.{number}.unmasked_weight", what, "Remove it.")
        if all(data.regularization for data in self.data):
            what = "all images are regularization images, so no style would be learned"
            yield Problem("data.0.regularization", what, "Add a [[data]] table with the images of the style.")


_TAGS, _DRAWN = ("shuffle_caption", "caption_tag_dropout"), ("crop", "crop_jitter", "colour_jitter")
OF_SWITCHES = {
    "prior_loss_weight": (("regularization",), "data.regularization = true"),
    "caption_separator": (_TAGS, "data.shuffle_caption = true"),
    "keep_tokens": (_TAGS, "data.shuffle_caption = true"),
    "keep_tokens_separator": (_TAGS, "data.shuffle_caption = true"),
    "caption_variants": ((*_TAGS, "wildcards"), "data.shuffle_caption = true"),
    "augmentations": (_DRAWN, 'data.crop = "random"'),
}
"""Settings of a `[[data]]` table by those of which one at least must be set for them to have an effect."""
RATES = {"unet": "lr", "text_encoder": "text_encoder_lr"}  # what can be trained, and its learning rate
OF_LORA, OF_FULL = ("rank", "alpha", "targets"), ("train_only",)
OF_PREVIEWS = ("prompts",)  # the other settings of the section serve `lorasmith sample` as well
NEEDS = {
    "sample.every": [f"sample.{key}" for key in OF_PREVIEWS],
    **{f"adapter.{part}": [f"optimizer.{rate}"] for part, rate in RATES.items()},
}
"""Settings by the switch without which they have no effect."""
NESTED_PROBLEMS = "several settings have no effect"
_WINDOWS_DEVICE = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9¹²³]", re.IGNORECASE)
_LONGEST_NAME = 200  # bytes; most disks take 255, and a file adds its suffix and a temporary name to the run's


# ---------------------------------------------------------------------------------------------------------------------
# the fields, for whoever shows them: files, forms, documents


def settings(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted path, pydantic field), in the order of the file; of a list of tables, one."""
    for name, field in section.model_fields.items():
        table = table_of(field.annotation)
        if table is None:
            yield f"{prefix}{name}", field
        else:
            yield from settings(table, f"{prefix}{name}.")


def table_of(annotation: Any) -> type[Section] | None:
    """The section class behind `AdapterSection` or `list[DataSection]`; None for a plain setting."""
    inner = get_args(annotation)[0] if getattr(annotation, "__origin__", None) is list else annotation
    return inner if isinstance(inner, type) and issubclass(inner, Section) else None
