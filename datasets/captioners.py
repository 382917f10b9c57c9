"""Models that describe pictures: BLIP and Florence-2 in sentences, SmilingWolf's taggers in Danbooru tags.

`choose` finds a model and says what it is; `load` brings it into memory, and imports torch or onnxruntime only then.
Pictures are prepared in numpy and Pillow alone, so that this can be done in a thread while the model runs.
"""

from __future__ import annotations

import csv
import pickle
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from ..trainer.bases import NO_MODEL, hub_answers
from ..trainer.errors import UserError, first_line
from ..trainer.jsonfile import read_json

Kind = Literal["blip", "florence2", "wd-tagger"]
Style = Literal["sentence", "detailed", "paragraph", "tags"]

STYLES: dict[Kind, tuple[Style, ...]] = {
    "blip": ("sentence",),
    "florence2": ("detailed", "sentence", "paragraph"),
    "wd-tagger": ("tags",),
}
"""What each kind can write; the first is what it writes if nothing was asked for."""
SHORT_NAMES = {
    "blip": "Salesforce/blip-image-captioning-large",
    "florence2": "florence-community/Florence-2-base",
    "wd-tagger": "SmilingWolf/wd-vit-tagger-v3",
}
_ACCEPTED = f"Give a Hub id, a folder, or one of {', '.join(SHORT_NAMES)}."


@dataclass(frozen=True)
class TagRules:
    """Which of a tagger's tags are written; the thresholds are those of SmilingWolf's Space for one model."""

    threshold: float = 0.35
    """Probability from which a tag of what is seen counts."""
    character_threshold: float = 0.85
    """Likewise of a character's name: a wrong one does more harm."""
    max_tags: int = 0
    """The most probable so many; 0 is all."""
    exclude_tags: tuple[str, ...] = ()
    """Never written, such as what the trigger word is to stand for."""


class Captioner(Protocol):
    """A model in memory."""

    @property
    def failures(self) -> tuple[type[BaseException], ...]:
        """What it raises if the memory is full, among others."""
        ...

    def prepare(self, pictures: Sequence[Image.Image]) -> Any:
        """RGB pictures of any size to what `describe` takes; may run in another thread."""
        ...

    def describe(self, prepared: Any) -> list[str]:
        """One caption a picture; empty if the model has nothing to say."""
        ...


@dataclass(frozen=True)
class Choice:
    """A model before it is loaded, and how it will be asked."""

    files: ModelFiles
    kind: Kind
    style: Style
    rules: TagRules = field(default_factory=TagRules)

    @property
    def settings(self) -> str:
        """What its captions depend on beside the model, in a line."""
        if self.kind != "wd-tagger":
            return f"style={self.style}"
        return " ".join(f"{name}={_in_a_word(value)}" for name, value in asdict(self.rules).items() if value)

    def load(self, device: str = "auto") -> Captioner:
        """The model in memory.

        Raises:
            UserError: if it is incomplete, or there is no such device, or no onnxruntime.
        """
        if self.kind == "wd-tagger":
            return WDTagger(self, device)
        return Blip(self, device) if self.kind == "blip" else Florence2(self, device)


def choose(model: str, kind: Kind | None = None, style: Style | None = None, **rules: Any) -> Choice:
    """Find a model by a short name, a Hub id or a folder, and recognise its kind; `rules` are those of `TagRules`.

    Raises:
        UserError: if it cannot be found or is no captioner, or if what was asked for has no effect on its kind.
    """
    files = ModelFiles.find(SHORT_NAMES.get(model, model))
    found = _recognise(files)
    if kind and kind != found:
        raise UserError(f"{files.name} is of the kind {found}", "--kind", f"Remove it, or give a model of kind {kind}.")
    style = style or STYLES[found][0]
    if style not in STYLES[found]:
        fix = f"It has {', '.join(STYLES[found])}."
        raise UserError(f"{files.name}, of the kind {found}, has no style {style!r}", "--style", fix)
    given = {name: value for name, value in rules.items() if value is not None}
    if given and found != "wd-tagger":
        where = f"--{next(iter(given)).replace('_', '-')}"
        raise UserError(f"has no effect: {files.name} writes no tags", where, "Remove it, or use --model wd-tagger.")
    return Choice(files, found, style, TagRules(**given))


# ---------------------------------------------------------------------------------------------------------------------
# where a model's files are, and what it is


@dataclass(frozen=True)
class ModelFiles:
    """A model in a folder, or on the Hub; if the Hub is out of reach, what this computer's cache holds of it."""

    source: str
    """A folder or a Hub id."""
    local: bool
    online: bool = False

    @classmethod
    def find(cls, model: str) -> ModelFiles:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return cls(str(folder), local=True)
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
            raise UserError(f"there is no folder {model}, and it is no Hub id", "--model", _ACCEPTED)
        return cls(model, local=False, online=hub_answers())

    @property
    def name(self) -> str:
        """Without any path of this computer."""
        return Path(self.source).resolve().name if self.local else self.source

    def file(self, name: str) -> Path | None:
        """One of its files; None if there is none of this name, as far as can be known offline."""
        if self.local:
            return there if (there := Path(self.source, name)).is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        try:
            return Path(hf_hub_download(self.source, name, local_files_only=not self.online))
        except EntryNotFoundError:  # also if it is not in the cache
            return None
        except HFValidationError as error:
            raise UserError(f"{self.source} is neither a folder here nor a Hub id", "--model", _ACCEPTED) from error
        except HfHubHTTPError as error:
            what, fix = f"the Hub refuses {self.source}: {first_line(error)}", "Check the name; or run: hf auth login"
            raise UserError(what, "--model", fix) from error

    def lacks(self, what: str) -> UserError:
        """The error that something needed is not among its files."""
        if self.local or self.online:
            return UserError(f"{self.source} {what}", "--model", _ACCEPTED)
        return UserError(
            f"{self.source} is no folder here nor in the cache, and the Hugging Face Hub cannot be reached",
            "--model",
            "Check the name and the connection, or give a folder that holds the model.",
        )


def _recognise(files: ModelFiles) -> Kind:
    """transformers' models say what they are in config.json; a tagger has its table of tags."""
    config = _read_json(files)
    kind: Any = config.get("model_type")
    architectures = config.get("architectures") or []
    if kind not in _CLASSES:
        if files.file("selected_tags.csv"):
            return "wd-tagger"
        says = f" (its config.json says {kind!r})" if kind else ""
        raise files.lacks(f"is none of the kinds that are known, {', '.join(STYLES)}{says}")
    if "auto_map" in config:
        what = f"{files.source} comes with a program of its own, which is not run here"
        raise UserError(what, "--model", f"Use {SHORT_NAMES[kind]} or one like it, made for transformers.")
    if architectures and _CLASSES[kind] not in architectures:
        what = f"{files.source} is a {architectures[0]}, which writes no captions"
        raise UserError(what, "--model", f"Use {SHORT_NAMES[kind]} or another {_CLASSES[kind]}.")
    return kind


_CLASSES: dict[Any, str] = {"blip": "BlipForConditionalGeneration", "florence2": "Florence2ForConditionalGeneration"}


def _read_json(files: ModelFiles) -> dict[str, Any]:
    path = files.file("config.json")
    try:
        values = read_json(path) if path else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})", "--model", "Save or download the model again.") from None
    return values if isinstance(values, dict) else {}


def _in_a_word(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else f"{value:g}"


# ---------------------------------------------------------------------------------------------------------------------
# transformers: sentences


class _Transformer:
    """What BLIP and Florence-2 have in common: a picture goes in, token ids come out by beam search."""

    failures = (MemoryError, RuntimeError)

    def __init__(self, choice: Choice, device: str) -> None:
        import torch
        import transformers
        from safetensors import SafetensorError

        self.device = _torch_device(device)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        files = choice.files
        where: dict[str, Any] = {"local_files_only": not files.online}
        transformers.utils.logging.disable_progress_bar()  # bars are our own
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(files.source, **where)
            # Pillow's resampling with or without torchvision: the same captions on every computer
            self.images = transformers.AutoImageProcessor.from_pretrained(files.source, backend="pil", **where)
            model_class = getattr(transformers, _CLASSES[choice.kind])
            loaded = model_class.from_pretrained(files.source, dtype=self.dtype, output_loading_info=True, **where)
        except (*NO_MODEL, OSError, SafetensorError, pickle.UnpicklingError) as error:
            if not files.local and not files.online:
                raise files.lacks("") from error
            fix = "Save or download it again: it needs config.json, weights, and its processor's files."
            raise UserError(f"{files.source} cannot be loaded: {first_line(error)}", "--model", fix) from error
        model, report = loaded
        if lacking := sorted(str(name) for name in [*report["missing_keys"], *report["mismatched_keys"]]):
            what = f"{len(lacking)} weights of {files.source} are missing or of another shape, such as {lacking[0]}"
            raise UserError(what, "--model", "They would be random numbers. Save or download the model again.")
        self.model: Any = model.eval().to(self.device)

    def prepare(self, pictures: Sequence[Image.Image]) -> Any:
        """Pixels, (batch, 3, height, width), as the model's processor makes them."""
        return self.images(images=list(pictures), return_tensors="pt")["pixel_values"]

    def _generate(self, pixels: Any, **settings: Any) -> list[str]:
        import torch

        with torch.inference_mode():
            ids = self.model.generate(
                pixel_values=pixels.to(self.device, self.dtype), do_sample=False, num_beams=3, **settings
            )
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


class Blip(_Transformer):
    """BLIP (Li et al. 2022), with the beam search of its demo; captions may be as long as CLIP reads, as at kohya's."""

    def describe(self, prepared: Any) -> list[str]:
        return [without_araf(text) for text in self._generate(prepared, min_length=5, max_length=75)]


def without_araf(caption: str) -> str:
    """BLIP large begins many captions with `arafed`, `araffe` and the like, which mean nothing but would be learned."""
    return re.sub(r"\baraf\w*\s*", "", caption).strip()


class Florence2(_Transformer):
    """Florence-2 (Xiao et al. 2024), with its task prompts, and beams as on its model card.

    At most 256 tokens: of more, Stable Diffusion would read nothing.
    """

    tasks: dict[Style, str] = {  # noqa: RUF012
        "sentence": "<CAPTION>",
        "detailed": "<DETAILED_CAPTION>",
        "paragraph": "<MORE_DETAILED_CAPTION>",
    }

    def __init__(self, choice: Choice, device: str) -> None:
        super().__init__(choice, device)
        self.task = self.tasks[choice.style]
        # the prompt is the same for every picture, and tokenizers are not for two threads
        prompt = self.processor(text=[self.task], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
        self.prompt = {name: prompt[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def describe(self, prepared: Any) -> list[str]:
        prompts = {name: ids.expand(len(prepared), -1) for name, ids in self.prompt.items()}
        texts = self._generate(prepared, max_new_tokens=256, **prompts)
        return [self.processor.post_process_generation(text=text, task=self.task)[self.task] for text in texts]


def _torch_device(wanted: str) -> Any:
    import torch

    if wanted == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _no_device(wanted, first_line(error)) from error
    return device


def _no_device(wanted: str, why: str, fix: str = "Use --device auto or --device cpu.") -> UserError:
    return UserError(f"{wanted} cannot be used here: {why.rstrip('.')}", "--device", fix)


# ---------------------------------------------------------------------------------------------------------------------
# onnxruntime: tags


@dataclass(frozen=True)
class Tag:
    """A row of `selected_tags.csv`."""

    name: str
    category: int


GENERAL, CHARACTER = 0, 4  # Danbooru's numbers; 9 is the rating, which is no part of a caption
_KAOMOJI = set(
    "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||".split()  # noqa: SIM905
)


class WDTagger:
    """SmilingWolf's taggers: an ONNX model, pixels to one probability a tag.

    Pictures and tags are treated as in their author's Space, huggingface.co/spaces/SmilingWolf/wd-tagger, app.py.
    """

    def __init__(self, choice: Choice, device: str) -> None:
        files = choice.files
        self.rules = choice.rules
        self.session, self.failures = _open_session(files, device)
        self.tags = read_tags(files)
        self.input, self.output = self.session.get_inputs()[0], self.session.get_outputs()[0]
        shape, count = self.input.shape, self.output.shape[-1]
        if len(shape) != 4 or shape[-1] != 3 or not isinstance(shape[1], int) or shape[1] != shape[2]:
            what = f"model.onnx of {files.source} takes {shape}, not pictures as (batch, side, side, 3)"
            raise UserError(what, "--model", f"Use {SHORT_NAMES['wd-tagger']} or another of its author's taggers.")
        if isinstance(count, int) and count != len(self.tags):
            what = f"model.onnx of {files.source} knows {count} tags, and selected_tags.csv names {len(self.tags)}"
            raise UserError(what, "--model", "Take both files from the same model.")
        self.side = shape[1]
        self.fixed_batch = shape[0] if isinstance(shape[0], int) else None

    def prepare(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(batch, side, side, 3), blue first, 0 to 255 in float32."""
        squares = [np.asarray(on_square(picture, self.side), np.float32) for picture in pictures]
        return np.ascontiguousarray(np.stack(squares)[..., ::-1])

    def describe(self, prepared: np.ndarray) -> list[str]:
        rows = self._probabilities(prepared)
        return [", ".join(tags_of(probabilities, self.tags, self.rules)) for probabilities in rows]

    def _probabilities(self, pixels: np.ndarray) -> list[np.ndarray]:
        """One row a picture; a model whose batch has a fixed size gets such batches, the last filled up with black."""
        size = self.fixed_batch or len(pixels)
        rows: list[np.ndarray] = []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            rows += list(self.session.run([self.output.name], {self.input.name: filled})[0][: len(part)])
        return rows


def on_square(picture: Image.Image, side: int) -> Image.Image:
    """In the middle of a white square, which is then resized, bicubic."""
    longest = max(picture.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
    return square if longest == side else square.resize((side, side), Image.Resampling.BICUBIC)


def tags_of(probabilities: np.ndarray, tags: Sequence[Tag], rules: TagRules) -> list[str]:
    """The tags whose probability is above their kind's threshold, the most probable first."""
    thresholds = {GENERAL: rules.threshold, CHARACTER: rules.character_threshold}
    excluded = {tag_in_words(tag.strip()).lower() for tag in rules.exclude_tags}
    found = [
        (float(probability), tag_in_words(tag.name))
        for probability, tag in zip(probabilities, tags, strict=True)
        if tag.category in thresholds and probability > thresholds[tag.category]
    ]
    found.sort(key=lambda pair: -pair[0])
    wanted = [name for _, name in found if name.lower() not in excluded]
    return wanted[: rules.max_tags or None]


def tag_in_words(name: str) -> str:
    """Spaces for underscores, but not in a face such as `>_<`."""
    return name if name in _KAOMOJI else name.replace("_", " ")


def read_tags(files: ModelFiles) -> list[Tag]:
    """`selected_tags.csv`, in the order of the model's outputs: tag_id, name, category, count."""
    path = files.file("selected_tags.csv")
    if path is None:
        raise files.lacks("has no selected_tags.csv")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            return [Tag(row["name"], int(row["category"])) for row in reader]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            what = f"{path} line {reader.line_num} is not tag_id,name,category,count ({first_line(error)})"
            raise UserError(what, "--model", "Download the model again.") from error


def _open_session(files: ModelFiles, device: str) -> tuple[Any, tuple[type[BaseException], ...]]:
    """The model in onnxruntime, and what that raises if the memory is full, among others."""
    try:
        onnxruntime: Any = import_module("onnxruntime")
    except ModuleNotFoundError as error:
        what = f"{files.name} is a tagger, and the package onnxruntime, which runs it, is missing"
        raise UserError(what, "--model", "Run: pip install lorasmith[captions]") from error

    providers, raised = _providers(onnxruntime, device), onnxruntime.capi.onnxruntime_pybind11_state
    path = files.file("model.onnx")
    if path is None:
        raise files.lacks("has no model.onnx")
    try:
        session = onnxruntime.InferenceSession(path, providers=providers)
    except (raised.Fail, raised.InvalidProtobuf, raised.InvalidGraph, raised.NotImplemented, raised.NoModel) as error:
        what = f"{path} cannot be loaded: {first_line(error)}"
        raise UserError(what, "--model", "Download the model again.") from error
    if device.startswith("cuda") and session.get_providers()[0] != _CUDA:
        why = "onnxruntime cannot load CUDA, and would use the CPU"
        raise _no_device(
            device, why, "Install the CUDA and cuDNN that your onnxruntime-gpu needs, or use --device cpu."
        )
    return session, (MemoryError, raised.Fail, raised.RuntimeException)


_CUDA = "CUDAExecutionProvider"


def _providers(onnxruntime: Any, device: str) -> list[Any]:
    """onnxruntime's names for a device; the CPU stands last, for what a GPU cannot do."""
    there = onnxruntime.get_available_providers()
    if device == "cpu" or (device == "auto" and _CUDA not in there):
        return ["CPUExecutionProvider"]
    if not re.fullmatch(r"auto|cuda(:\d+)?", device):
        raise _no_device(device, "taggers run on cpu, cuda or cuda:1, ...")
    if _CUDA not in there:
        fix = "Install onnxruntime-gpu in place of onnxruntime, or use --device cpu."
        raise _no_device(device, "this onnxruntime has no CUDA", fix)
    onnxruntime.preload_dlls()  # the CUDA that torch brought along
    return [(_CUDA, {"device_id": int(device.partition(":")[2] or 0)}), "CPUExecutionProvider"]


def memory_is_full(error: BaseException) -> bool:
    """Whether a library's error says so: torch's and onnxruntime's, of a GPU or of the computer."""
    words = ("out of memory", "failed to allocate", "can't allocate", "not enough memory", "bad allocation")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
