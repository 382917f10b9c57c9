"""`RunConfig`: the one description of a run. TOML, command line, browser form and documents come from its fields.

Every setting is defined once, here, with its type, bounds, default and a docstring that gives the reason for the
default. `configfile.py` reads and writes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..configs import recipe_names
from .formats import Format
from .idle import NESTED_PROBLEMS, RATE_FREE, RATES, problems_of
from .painting.samplers import MOST_STEPS

Kind = Literal["lora", "dora", "loha", "lokr", "oft", "boft", "full"]
Targets = Literal["attention", "attention+ff", "all-linear", "all", "style-blocks"]
Init = Literal["default", "gaussian", "pissa", "olora", "eva"]
Schedule = Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial", "rex", "wsd"]
Weighting = Literal["none", "min-snr", "soft-min-snr", "debiased"]
Loss = Literal["mse", "l1", "huber"]
Attention = Literal["auto", "sdpa", "flash", "cudnn", "efficient", "xformers"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
BaseWeights = Literal["full", "int8", "nf4"]


class Section(BaseModel):
    """A table of the file. Unknown keys and values of another type are errors; a field's docstring is its help text."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


class BaseSection(Section):
    """The model that is fine-tuned."""

    model: str = Field(default="pocket", min_length=1)
    """A Hub id, a diffusers folder, a .safetensors or .ckpt file, `pocket` (embedded), or `random:sd15`, `random:sd21`,
    `random:sdxl` (for tests)."""
    vae: str = ""
    """Another VAE: a diffusers folder, a .safetensors file, or a Hub id. Empty: the base's own."""
    merge: list[str] = Field(default_factory=list)
    """LoRA files that become part of the base before training, each with its strength if that is not 1, as in
    "detail.safetensors:0.6". The new LoRA is then meant for a base with them on."""


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

    @field_validator("trigger")
    @classmethod
    def without_blanks(cls, trigger: str) -> str:
        return trigger.strip()

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

    kind: Kind = "lora"
    """lora: small matrices beside frozen weights, which every client reads. dora: LoRA that also learns the length of
    each weight vector. loha, lokr: Hadamard and Kronecker products in place of a plain one. oft, boft: rotations of
    what a layer reads. full: the base's own weights are trained (rates near 1e-5), and a whole model comes out.
    Clients differ in what else than lora they read: the plan says which do."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Width of the low-rank matrices. 16 holds a style; a larger rank copies more of the training images."""
    alpha: float = Field(default=16.0, gt=0, le=4096)
    """The effect is scaled by alpha / rank. Equal to the rank, so that a learning rate means the same at any rank."""
    conv_rank: int = Field(default=0, ge=0, le=1024)
    """The rank of 3x3 convolutions, with targets "all". 0: as everywhere."""
    conv_alpha: float = Field(default=0.0, ge=0, le=4096)
    """Likewise alpha. 0: in the same ratio to the rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023), which keeps large ranks learning. Lower alpha with it."""
    init: Init = "default"
    """Where the matrices start. default: the change is zero (Hu et al. 2021); gaussian: likewise, with normal numbers;
    pissa, olora: at the base's own largest directions (Meng et al. 2024; Büyükakyüz 2024), which learns faster; eva: at
    the largest directions of what each layer reads from your images (Paischer et al. 2024)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's inputs that its adapter does not see in a step."""
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows of the change that is left out in a step."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapters (with oft and boft, of their rotation blocks) that are left out in a step."""
    decompose_factor: int = Field(default=-1, ge=-1, le=1024)
    """With lokr: the size of the smaller Kronecker factor. -1: as near to a square as it goes, which is smallest."""
    block_size: int = Field(default=32, ge=2, le=1024)
    """With oft and boft: sides of the rotated blocks. Larger blocks learn more; boft's best is a power of two."""
    targets: Targets = "attention"
    """Which layers get an adapter. attention is enough for most styles; attention+ff adds feed-forward layers and
    projections, all-linear time embeddings as well, all also convolutions, for texture. style-blocks: the attention of
    the block that holds SDXL's style (B-LoRA, Frenkel et al. 2024); the content stays the base's."""
    unet: bool = True
    """Train the UNet."""
    text_encoder: bool = True
    """Train the text encoder, both of them for SDXL. Helps the trigger word take hold."""
    train_only: list[str] = Field(default_factory=list)
    """The blocks that are trained, such as "unet.up_blocks", "text_encoder.encoder.layers.11" or "unet.*.attentions"
    (* is anything); all others are left alone. Empty: all that targets names."""
    start_from: str = ""
    """A LoRA file, of whichever trainer, whose change the new one starts with. Empty: none."""
    new_tokens: int = Field(default=0, ge=0, le=32)
    """Pivotal tuning: the trigger becomes so many new tokens, whose embeddings are trained with the adapter and written
    to a file of their own. 0: the trigger is what CLIP already reads in it."""
    token_init: str = ""
    """The words whose embeddings the new tokens start from. Empty: "style"."""

    @property
    def trains_text(self) -> bool:
        """Whether captions have to be encoded anew in each step."""
        return self.text_encoder or self.new_tokens > 0

    @property
    def drops(self) -> bool:
        """Whether parts of the adapter are left out at random in training."""
        return bool(self.dropout or self.rank_dropout or self.module_dropout)


class BlockSection(Section):
    """Another rank, alpha or learning rate for some blocks; repeat the table for more. The last of several wins."""

    path: str = Field(min_length=1)
    """The block, such as "unet.up_blocks.1", "unet.mid_block" or "text_encoder.encoder.layers.*" (* is anything)."""
    rank: int = Field(default=0, ge=0, le=1024)
    """0: as everywhere."""
    alpha: float = Field(default=0.0, ge=0, le=4096)
    """0: in the same ratio to the rank."""
    lr: float = Field(default=0.0, ge=0, le=1)
    """0: as everywhere. To leave a block alone, use adapter.train_only."""


class BudgetSection(Section):
    """How long to train. Images seen is the one unit of length; steps follow from it."""

    images: int = Field(default=2000, ge=1, le=100_000_000)
    """Images seen in training. 20 images shown 100 times each are 2000."""
    batch: int = Field(default=4, ge=1, le=4096)
    """Images in one forward and backward pass, on each process; fewer by itself where the memory is full."""
    accumulate: int = Field(default=1, ge=1, le=4096)
    """Batches whose gradients are added before the weights change. 2 x batch 2 equals batch 4 in less memory."""


class OptimizerSection(Section):
    """How the trained weights change."""

    kind: str = Field(default="adamw", min_length=1)
    """adamw is PyTorch's own. adamw8bit (bitsandbytes), prodigy (prodigyopt), schedule-free adamw as adamw-schedulefree
    (schedulefree), and lion, adafactor, came and whatever else pytorch-optimizer knows by its name there; all of these
    come with: pip install "lorasmith[optimizers]"."""
    lr: float = Field(default=1e-4, ge=0, le=10)
    """Learning rate of the UNet. 1e-4 is the usual start for a LoRA with alpha = rank, 1e-5 for kind "full", a third of
    that for lion; 1 for prodigy and its kin, which find their own, and which take it if no rate is given."""
    text_encoder_lr: float = Field(default=5e-5, ge=0, le=10)
    """Learning rate of the text encoders; they overfit sooner, so half of the UNet's or less. 5e-6 for kind "full"."""
    token_lr: float = Field(default=1e-3, gt=0, le=10)
    """Learning rate of new tokens, where adapter.new_tokens asks for some."""
    loraplus_ratio: float = Field(default=1.0, ge=1, le=64)
    """LoRA+ (Hayou et al. 2024): the up matrices learn so many times faster than the down ones. 16 is the paper's
    value; 1: equally fast."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after the warm-up. Cosine ends near zero, which steadies the last checkpoints. wsd
    stays and falls at the end, so that a run can be prolonged well; rex falls late (Chen et al. 2021)."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    schedule_cycles: int = Field(default=3, ge=1, le=1000)
    """With cosine-restarts: how often it falls."""
    schedule_power: float = Field(default=2.0, gt=0, le=100)
    """With polynomial: the exponent."""
    schedule_decay: float = Field(default=0.2, gt=0, le=1)
    """With wsd: the share of the steps at the end over which it falls."""
    schedule_floor: float = Field(default=0.0, ge=0, lt=1)
    """Where a falling schedule ends, as a share of the learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Memory of gradients. Not given: what the optimizer's authors chose, 0.9 for adamw."""
    beta2: float = Field(default=0.999, gt=0, lt=1)
    """Memory of squared gradients. Not given: what the optimizer's authors chose; adamw's 0.999 looks back over about
    1000 steps, and 0.99 suits short, rough runs."""
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=0, le=1e6)
    """Gradients whose norm over all trained weights is larger are scaled down to it. 0: no clipping."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Previews, checkpoints and the file hold a running average of what is trained, with this decay: 0.99 looks back
    over about 100 steps. 0: none."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further arguments of the optimizer by its package's names, as in { d_coef = 0.8 }. An unknown one is an error."""

    @field_validator("options", mode="plain")  # in place of pydantic's own, which reports a problem for each of four
    @classmethod
    def plain_values_by_name(cls, options: Any) -> dict[str, bool | int | float | str]:
        if not isinstance(options, dict):
            raise ValueError("must be a table of names and values, as in { d_coef = 0.8 }")
        for name, value in options.items():
            if type(value) not in (bool, int, float, str) or (type(value) is float and not math.isfinite(value)):
                raise ValueError(f"must be true or false, finite numbers or texts, and {name} is {value!r}")
        return options

    @field_validator("kind")
    @classmethod
    def in_lower_case(cls, kind: str) -> str:
        return kind.lower()


class ObjectiveSection(Section):
    """What the model is asked to predict, and how its errors are weighed."""

    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the UNet predicts. auto: what the base's scheduler says; change it only when that is known to be wrong."""
    zero_terminal_snr: Literal["auto", "on", "off"] = "auto"
    """Whether the last time-step is pure noise (Lin et al. 2024), as v-prediction SDXL models have it. auto: as the
    base."""
    weighting: Weighting = "min-snr"
    """How the time-steps are weighed. min-snr evens them out (Hang et al. 2023), soft-min-snr without an edge (Crowson
    et al. 2024), debiased by the root of the noise (Yu et al. 2023); none: as they are."""
    min_snr_gamma: float = Field(default=5.0, gt=0, le=1000)
    """Of min-snr and soft-min-snr: the signal-to-noise ratio from which on weights fall. 5 is the paper's value."""
    loss: Loss = "mse"
    """mse: squares of the errors. l1: their sizes. huber: squares of small and sizes of large errors (pseudo-Huber,
    Charbonnier 1997), so that odd images count less."""
    huber_c: float = Field(default=0.1, ge=1e-4, le=100)
    """With huber: errors far below it count as squares, far above it by their size."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """With huber: whether huber_c falls towards noise (exponential, or by the signal-to-noise ratio), as sd-scripts has
    it; there squares would blur less."""
    noise_offset: float = Field(default=0.0, ge=0, le=1)
    """A constant added to each channel of the noise lets the model learn darker and lighter pictures. 0.05 is mild."""
    multires_noise_iterations: int = Field(default=0, ge=0, le=16)
    """Noise of so many coarser sizes is added (Whitaker 2023), for larger contrasts of areas. 6 is usual; 0: none."""
    multires_noise_discount: float = Field(default=0.3, gt=0, le=1)
    """How much weaker each coarser size is. 0.3 for short runs, 0.8 for long ones."""
    input_perturbation: float = Field(default=0.0, ge=0, le=1)
    """Extra noise in what the model sees and is not asked for (Ning et al. 2023), against its own errors in drawing.
    0.1 is the paper's value."""
    min_timestep: int = Field(default=0, ge=0, le=999)
    """The first time-step that is trained; low ones hold details."""
    max_timestep: int = Field(default=999, ge=0, le=999)
    """The last one; high ones hold composition and colour."""
    timesteps: Literal["uniform", "logit-normal"] = "uniform"
    """How time-steps are drawn. logit-normal: those in the middle more often (Esser et al. 2024)."""
    timestep_mean: float = Field(default=0.0, ge=-5, le=5)
    """With logit-normal: above 0 more noise, below 0 less."""
    timestep_std: float = Field(default=1.0, gt=0, le=5)
    """With logit-normal: how wide it is."""


class PreferenceSection(Section):
    """A run that refines another by what people said of its pictures. `lorasmith refine` writes it."""

    start: str = ""
    """The checkpoint that is trained further, such as "runs/ink/checkpoints/step-000450"; it is the reference as well.
    The sets of images then hold rated pictures in better/ and worse/, up/ and down/. Empty: an ordinary training."""
    beta: float = Field(default=1000.0, gt=0, le=1e6)
    """How dear it is to leave the reference: the larger, the nearer the run stays (Diffusion-DPO, Wallace et al. 2023,
    who take 2000 to 5000, with very many pairs). 1000, because few pairs have to move something."""


class SaveSection(Section):
    """Checkpoints, in steps."""

    every: int = Field(default=100, ge=0, le=10_000_000)
    """A checkpoint each so many steps, and one at the end. 0: only at the end."""
    keep: Literal["all"] | int = "all"
    """`all`, or how many of the newest checkpoints to keep."""
    keep_best: bool = False
    """Save whenever the validation loss is lower than ever by more than its noise, or its scores better than ever, and
    keep the last such checkpoint whatever `keep` says."""

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
    steps: int = Field(default=25, ge=1, le=MOST_STEPS)
    """DDIM steps of one preview."""
    guidance: float = Field(default=7.0, ge=1, le=50)
    """Classifier-free guidance scale. 1: none."""


class ValidationSection(Section):
    """A loss with the same images, time-steps and noise each time, or scores of pictures of the same prompts and noise.
    They can be compared from step to step, which the loss of a step cannot."""

    every: int = Field(default=0, ge=0, le=10_000_000)
    """Measured each so many steps, at step 0 and at the end. 0, because images that are held out for it are not
    learned, and a small set needs them all: never."""
    by: Literal["loss", "scores"] = "loss"
    """loss, or scores: style gained, prompt kept and copying, as lorasmith compare gives them, of pictures that are
    drawn each time. These judge what people look at and hold no image out; a loss takes a fraction of their time."""
    share: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the style's images that are held out: never trained on, two at least. 0: none; then the training images
    are measured with noise of their own."""
    min_images: int = Field(default=20, ge=4, le=1_000_000)
    """A style of fewer images keeps them all, as with a share of 0."""
    draws: int = Field(default=16, ge=1, le=10_000)
    """Noises of each band of time-steps, for the held-out images in turn, and as many for training images; by scores,
    pictures, of the previews' prompts in turn. More tell finer differences, and take longer."""
    seed: int = Field(default=4321, ge=0, lt=2**63)
    """Seed of time-steps and noise, which no step of the training draws."""
    patience: int = Field(default=0, ge=0, le=1_000_000)
    """The run ends when the loss was not lower than its lowest, by more than its noise, or the scores were not better,
    so many times in a row. 0: never, because pictures may get better while this loss does not."""


class ExportSection(Section):
    """The files to share, written at the end of a run and by `lorasmith export`, and what they say about themselves."""

    formats: list[Format] = Field(default_factory=list)
    """kohya, which every client reads, and diffusers; of a whole model ldm, one file, and diffusers, a folder. Empty:
    all that there are for what was trained, so that nobody has to ask for another."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision of the files. fp16 holds a LoRA to 11 bits and is what clients compute in; fp32 is twice as large, for
    merging and training on."""
    metadata: Literal["safe", "all", "none"] = "safe"
    """What the files say of the training. safe: settings, counts and frequent tags, but no path, user name, caption or
    prompt that may be one, because a file that is shared stays so. all: everything that is known, with complete tag
    counts, prompts and the configuration. none: only what clients need to load and recognise the file."""
    tag_threshold: int = Field(default=3, ge=1, le=1_000_000)
    """With metadata "safe": a tag is told if at least so many images of a folder have it, and if it is no sentence. 3,
    because what one or two images have may be a caption, or a name."""
    checkpoint: Literal["last", "best"] = "last"
    """Whose weights the files at the end of a run hold: of its last step, or, with save.keep_best, of the checkpoint
    with the lowest validation loss or the best scores."""
    strength: float = Field(default=1.0, gt=0, le=10)
    """The strength that others are told to use it at. 1: as it was trained, which is how the previews are drawn."""
    title: str = ""
    """What it is called where people read it. Empty: the run's name, as the file."""
    author: str = ""
    """Who made it. Empty: not told, for nobody has to sign."""
    description: str = ""
    """What it is, in a sentence or more. Empty: which family it is for."""
    license: str = ""
    """An identifier such as "cc-by-4.0", or the name of another license. Empty: that of the base's family, because what
    is trained from a base is a derivative of it."""
    tags: list[str] = Field(default_factory=list)
    """Words by which others find it, such as "ink" or "watercolour". Empty: none but those of its kind."""
    bundle: bool = False
    """Also write `<name>.zip` with all of it: the files, pictures, a model card, the configuration, a license note and
    checksums, as `lorasmith publish` takes it. false, because it takes the room of the files once more."""


class RuntimeSection(Section):
    """How the computer is used; it changes speed and memory, not the aim."""

    precision: Precision = "auto"
    """Precision of the computation; what is trained is kept in fp32. auto: bf16 or fp16 on a GPU, fp32 on a CPU."""
    attention: Attention = "auto"
    """What computes the UNet's attention. auto: on an NVIDIA GPU for each shape the fastest of all these, found by a
    short probe before the first step; elsewhere as sdpa. sdpa: as PyTorch chooses, without a probe. flash, cudnn,
    efficient: this kernel of PyTorch for all shapes. xformers, cudnn and efficient need an NVIDIA GPU."""
    fast_lora: bool = True
    """Compute each plain LoRA layer as one function, forward and backward: the same result in less time and memory.
    false: PEFT's own way. Layers of another kind, and with dropout, always go PEFT's way."""
    autocast: bool = False
    """Let PyTorch choose the precision of each operation. false: with bf16 all of a base whose layers are fast ones
    computes in bf16, which takes less time and memory; everything else is autocast in any case."""
    lean_activations: bool = True
    """Keep of the UNet's convolutions, norms and gated units nothing large for the backward pass that it can make again
    at once: the same result in less memory. false: all that PyTorch keeps."""
    flat_optimizer: bool = True
    """Keep all matrices of one learning rate side by side in memory, so that AdamW's step is one operation for all.
    false: one for each. Other optimizers, which may look at single matrices, always get them singly."""
    cpu_kernels: bool = True
    """On a CPU, compute convolutions over few pixels and short attention as products of matrices: the same result, and
    faster. false: PyTorch's own kernels. On a GPU those are used in any case."""
    channels_last: bool = False
    """Keep the UNet's convolutions in the order of memory that some kernels of GPUs prefer. Measure it with
    `lorasmith bench`: it pays on some cards, and costs on others. On a CPU `cpu_kernels` gains more, and it is refused.
    """
    compile: bool = False
    """Compile the blocks of transformers that the UNet repeats: the same result but for rounding, in less time a step.
    Compiling itself takes a minute or more before the first step, so it pays in long runs. It needs a compiler: on a
    CPU one of C++, on a GPU Triton. Previews and measures are computed without, for each would be another shape."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpointed_blocks: int = Field(default=0, ge=0, le=100)
    """With `gradient_checkpointing`: of how many blocks of the UNet, those first whose feature maps are largest, which
    keep most. The others cost no more time. 0: of all, and of text encoders that are trained."""
    cuda_graphs: bool = False
    """Record each optimizer step of a size of batch once and replay it as a CUDA graph: a small batch then waits for
    no Python, and the graphs keep their memory. Not tried on a GPU yet. For AdamW and one process alone."""
    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the VAE. fp32 is exact; below it encoding is faster, and an image that overflows is encoded anew in
    fp32."""
    base_weights: BaseWeights = "full"
    """What the frozen weights of linear layers are kept in while the run trains: of the UNet, and of text encoders that
    are trained. int8: half of bf16, with nearly the same result in more time. nf4: a bit more than a quarter, and less
    exact; needs bitsandbytes. full: as the base computes. For adapters that need no exact weights: kinds lora, loha and
    lokr, and no init from them. Files, and pictures drawn after the run, are those of the full base."""
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
    recipe: str = ""
    """The shipped recipe whose values stand for all that the file leaves out. Empty: the defaults do."""
    base: BaseSection = Field(default_factory=BaseSection)
    data: list[DataSection] = Field(min_length=1)
    buckets: BucketsSection = Field(default_factory=BucketsSection)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    block: list[BlockSection] = Field(default_factory=list)
    budget: BudgetSection = Field(default_factory=BudgetSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    preference: PreferenceSection = Field(default_factory=PreferenceSection)
    save: SaveSection = Field(default_factory=SaveSection)
    sample: SampleSection = Field(default_factory=SampleSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    export: ExportSection = Field(default_factory=ExportSection)
    runtime: RuntimeSection = Field(default_factory=RuntimeSection)

    @property
    def trigger(self) -> str:
        """The word that calls the style; of several, the first."""
        return next((data.trigger for data in self.data if data.trigger and not data.regularization), "")

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

    @field_validator("recipe")
    @classmethod
    def a_shipped_recipe(cls, recipe: str) -> str:
        if recipe and recipe not in recipe_names():
            raise ValueError(f"there is no such recipe; shipped are {', '.join(recipe_names())}")
        return recipe

    @model_validator(mode="after")
    def nothing_without_effect(self) -> RunConfig:
        self._rates_that_were_not_given()
        if problems := list(problems_of(self)):
            raise ValueError(NESTED_PROBLEMS, problems)
        return self

    def _rates_that_were_not_given(self) -> None:
        """Of a part that is not trained, 0; of an optimizer that finds its own, 1."""
        for part, key in RATES.items():
            if key not in self.optimizer.model_fields_set:
                if not getattr(self.adapter, part):
                    setattr(self.optimizer, key, 0.0)
                elif self.optimizer.kind in RATE_FREE:
                    setattr(self.optimizer, key, 1.0)


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
