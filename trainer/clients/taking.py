"""What a client takes of a file: the layers it changes and how, what it leaves out, or why it refuses the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product

import torch

from ..delta import Delta
from .contents import ALPHA, Contents
from .trees import Layer

LENGTHS = "dora_scale"
MISFIT = "its tensors do not fit the layer"


@dataclass(frozen=True)
class Kind:
    """A way to change a layer, told by the tensors that it needs."""

    form: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    """What it reads besides."""


LORA = Kind("lora", ("lora_down.weight", "lora_up.weight"), ("lora_mid.weight",))
LOHA = Kind("loha", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2"))
LOKR = tuple(
    Kind("lokr", (*one, *two), ("lokr_t2",))
    for one, two in product(*((("lokr_w" + n,), (f"lokr_w{n}_a", f"lokr_w{n}_b")) for n in "12"))
)
FULL = Kind("full", ("diff",), ("diff_b",))
BIAS = Kind("bias", ("diff_b",))
NORM = Kind("norm", ("w_norm",), ("b_norm",))
GLORA = Kind("glora", ("a1.weight", "a2.weight", "b1.weight", "b2.weight"))
OFT = (Kind("oft", ("oft_blocks",), ("rescale",)), Kind("oft", ("oft_diag",)))
IA3 = Kind("ia3", ("weight", "on_input"))


@dataclass(frozen=True)
class Change:
    """What a client changes in one layer."""

    layer: Layer
    keys: frozenset[str]
    """Of all tensors that it uses for it."""
    scale: float
    wrong: str = ""
    """What it does otherwise than the file means, where that is neither the scale nor a tensor left out."""


@dataclass
class Taken:
    """What a client takes of a file."""

    changes: list[Change] = field(default_factory=list)
    besides: set[str] = field(default_factory=set)
    """Keys that it uses for something else than a layer: embeddings."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Keys to why it leaves them out, where there is more to say than that it knows no such layer."""
    refusal: str = ""
    """Why it takes nothing; empty if it takes what it can."""
    scaling: str = ""
    """Where its scales come from, said if they are not those of the file."""

    def drop(self, keys: Iterable[str], why: str) -> None:
        self.dropped |= dict.fromkeys(keys, why)

    @property
    def used(self) -> set[str]:
        return self.besides.union(*(change.keys for change in self.changes))


def refused(why: str) -> Taken:
    return Taken(refusal=why)


Groups = dict[str, dict[str, str]]
"""Names of layers in a file, to their leaves, to the keys."""


def grouped(keys: Iterable[str], split: Callable[[str], tuple[str, str] | None]) -> Groups:
    """Keys by the layer and the leaf that `split` sees in them; those in which it sees none are left out."""
    found: Groups = {}
    for key in keys:
        if parts := split(key):
            found.setdefault(parts[0], {})[parts[1]] = key
    return found


def at_first_dot(key: str) -> tuple[str, str] | None:
    name, dot, leaf = key.partition(".")
    return (name, leaf) if dot else None


def by_ending(endings: Mapping[str, str]) -> Callable[[str], tuple[str, str] | None]:
    """How a key is split by what it ends with; of several endings the longest counts."""
    longest = sorted(endings, key=len, reverse=True)

    def split(key: str) -> tuple[str, str] | None:
        found = next((ending for ending in longest if key.endswith(ending)), None)
        return (key[: -len(found)], endings[found]) if found else None

    return split


def kind_of(leaves: Iterable[str], kinds: Sequence[Kind]) -> Kind | None:
    """The first kind that has all the tensors it needs."""
    held = set(leaves)
    return next((kind for kind in kinds if held.issuperset(kind.needs)), None)


def change_of(
    contents: Contents,
    layer: Layer,
    leaves: Mapping[str, str],
    kind: Kind,
    scale: float | None = None,
    lengths: Callable[[str], str] | None = None,
) -> Change:
    """A change as most clients make it: at alpha / rank, without a mistake.

    `lengths` says what a client does wrong with DoRA's lengths of "rows" or "columns"; one that does not read them has
    none.
    """
    used = {leaf: leaves[leaf] for leaf in (*kind.needs, *kind.may, ALPHA) if leaf in leaves}
    wrong = ""
    if lengths and LENGTHS in leaves:
        used[LENGTHS] = leaves[LENGTHS]
        wrong = lengths("columns" if contents.shapes[leaves[LENGTHS]][:1] == (1,) else "rows")
    return Change(layer, frozenset(used.values()), contents.scale_of(leaves) if scale is None else scale, wrong)


def lengths_of_columns(axis: str) -> str:
    """What clients do wrong that know LyCORIS' first DoRA, which has the lengths of columns."""
    return "" if axis == "columns" else "it takes DoRA's lengths of rows for those of columns"


def take(
    contents: Contents,
    groups: Groups,
    names: Mapping[str, Layer],
    kinds: Sequence[Kind],
    lengths: Callable[[str], str] | None = None,
) -> Taken:
    """What a client takes that skips every layer it does not know, finds incomplete, or cannot fit."""
    taken = Taken()
    for layer, leaves, kind in complete(groups, names, kinds):
        if fits(contents, layer, leaves, kind):
            taken.changes.append(change_of(contents, layer, leaves, kind, lengths=lengths))
        else:
            taken.drop(leaves.values(), MISFIT)
    for name in groups.keys() & names.keys():
        if not kind_of(groups[name], kinds):
            taken.drop(groups[name].values(), "its layer is not complete, or of a kind that it does not read")
    return taken


def complete(
    groups: Groups, names: Mapping[str, Layer], kinds: Sequence[Kind]
) -> Iterator[tuple[Layer, dict[str, str], Kind]]:
    """The groups of layers that a client knows and that have all they need."""
    for name, leaves in groups.items():
        if (layer := names.get(name)) and (kind := kind_of(leaves, kinds)):
            yield layer, leaves, kind


def fits(contents: Contents, layer: Layer, leaves: Mapping[str, str], kind: Kind) -> bool:
    """Whether the change has as many numbers as the weight; of kinds that are not computed here, taken for granted."""
    if kind.form not in ("lora", "loha", "lokr", "full"):
        return True
    used = (leaf for leaf in (*kind.needs, *kind.may, LENGTHS) if leaf in leaves and leaf != "diff_b")
    shapes = tuple((leaf, contents.shapes[leaves[leaf]]) for leaf in used)
    return all(0 not in shape for _, shape in shapes) and _fits(shapes, layer.shape)


def fits_exactly(contents: Contents, layer: Layer, leaves: Mapping[str, str]) -> bool:
    """Whether a plain LoRA has the very shapes that PyTorch's layers of such a change have: 4-D for a convolution."""
    down, up = contents.shapes[leaves["lora_down.weight"]], contents.shapes[leaves["lora_up.weight"]]
    if not down or 0 in down or len(down) != len(layer.shape):
        return False
    return down[1:] == layer.shape[1:] and up == (layer.shape[0], down[0], *[1] * (len(layer.shape) - 2))


@cache
def _fits(shapes: tuple[tuple[str, tuple[int, ...]], ...], weight: tuple[int, ...]) -> bool:
    tensors = {leaf: torch.empty(shape, device="meta") for leaf, shape in shapes}
    return Delta("", tensors, 1.0).fits(weight)


def unreadable_alpha(contents: Contents, leaves: Mapping[str, str]) -> str:
    """Why Python's `.item()` raises at the layer's alpha; empty if it does not."""
    alpha = leaves.get(ALPHA)
    if alpha is None or contents.is_single(alpha):
        return ""
    return f"it stops at {alpha}, which is not one number"
