"""What an adapter changes in the weight of one layer: the same for live layers, for files, and for merging.

Tensors go by the names of LyCORIS, which kohya's files share; `lora_down.weight` and `lora_up.weight` are what PEFT
calls A and B. Formulas: LoRA (Hu et al. 2021), DoRA (Liu et al. 2024, eq. 5), LoHa (Hyeon-Woo et al. 2022, FedPara),
LoKr (Yeh et al. 2023, LyCORIS), each as the layer applies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["lora", "dora", "loha", "lokr", "full"]


@dataclass(frozen=True)
class Delta:
    """The change of one layer's weight, (out, in) or (out, in, kh, kw), at strength 1."""

    name: str
    """Dotted path of the layer inside its component."""
    tensors: Mapping[str, Tensor]
    """lora: `lora_down.weight` (rank, in[, kh, kw]), `lora_up.weight` (out, rank[, 1, 1]), perhaps `lora_mid.weight`
    (rank, rank, kh, kw) between 1x1 ones. dora: any other form with `dora_scale` besides, the lengths of the changed
    weight's rows, (out, 1[, 1, 1]), or of its columns, (1, in[, 1, 1]). loha: `hada_w1_a` (out, rank), `hada_w1_b`
    (rank, in kh kw), likewise w2; with `hada_t1` and `hada_t2` (rank, rank, kh, kw) the a are (rank, out) and the b
    (rank, in). lokr: `lokr_w1` (a, b) or the product of `lokr_w1_a` and `lokr_w1_b`, likewise w2, also with `lokr_t2`.
    full: `diff`, the change itself."""
    alpha: float
    """The change is scaled by alpha / rank; without a rank (full, lokr of two whole factors), not at all."""

    @property
    def form(self) -> Form:
        return "dora" if "dora_scale" in self.tensors else self._product_form

    @property
    def _product_form(self) -> Form:
        """The form of what is added to the weight, before a DoRA gives it its length."""
        if "lora_up.weight" in self.tensors:
            return "lora"
        return "loha" if "hada_w1_a" in self.tensors else "full" if "diff" in self.tensors else "lokr"

    @property
    def is_plain(self) -> bool:
        """Whether it is up @ down and nothing else."""
        return self.form == "lora" and "lora_mid.weight" not in self.tensors

    @property
    def rank(self) -> int:
        """0 where the change has none."""
        for name in ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
            if name in self.tensors:
                return self.tensors[name].shape[0]
        return 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def down(self) -> Tensor:
        return self.tensors["lora_down.weight"]

    @property
    def up(self) -> Tensor:
        return self.tensors["lora_up.weight"]

    def on(self, device: str | torch.device) -> Delta:
        """The same change with its tensors there."""
        return Delta(self.name, {leaf: tensor.to(device) for leaf, tensor in self.tensors.items()}, self.alpha)

    def times(self, strength: float) -> Delta:
        """The same change at another strength: a number that is 0 is the original weight.

        Raises:
            ValueError: for a DoRA, whose change at half the strength is no DoRA.
        """
        if self.form == "dora":
            raise ValueError(f"{self.name}: the change of a DoRA is not in proportion to any of its tensors")
        scaled = next(leaf for leaf in _IN_PROPORTION if leaf in self.tensors)
        return Delta(self.name, {**self.tensors, scaled: self.tensors[scaled] * strength}, self.alpha)

    def of(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The change of `weight`, in its shape and on its device."""
        t = {name: tensor.to(weight.device, dtype) for name, tensor in self.tensors.items()}
        change = _CHANGES[self._product_form](t).reshape(weight.shape) * self.scale
        if "dora_scale" not in t:
            return change
        directions = weight.to(dtype) + change
        axis = 0 if t["dora_scale"].shape[0] == weight.shape[0] else 1
        others = [dim for dim in range(weight.dim()) if dim != axis]
        lengths = torch.linalg.vector_norm(directions, dim=others, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        return directions * (t["dora_scale"].reshape(lengths.shape) / lengths) - weight.to(dtype)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is a change of a weight of this shape; nothing is computed."""
        t = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.tensors.items()}
        try:
            change = _CHANGES[self._product_form](t)
        except (RuntimeError, IndexError, KeyError, ValueError):
            return False
        length = t["dora_scale"].numel() if "dora_scale" in t else shape[0]
        return (
            change.dim() > 1
            and change.shape[0] == shape[0]
            and change[0].numel() == torch.Size(shape[1:]).numel()
            and (change.dim() < 4 or tuple(change.shape) == tuple(shape))
            and length in shape[:2]
        )


_IN_PROPORTION = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff")
"""Of each form the tensor that its change is in proportion to."""


def _lora(t: Mapping[str, Tensor]) -> Tensor:
    up, down = t["lora_up.weight"], t["lora_down.weight"]
    if "lora_mid.weight" in t:  # Tucker: a small convolution between two 1x1 ones
        return torch.einsum("ijkl,jr,pi->prkl", t["lora_mid.weight"], down.flatten(1), up.flatten(1))
    product = up.flatten(1).double() @ down.flatten(1).double()  # the parts of a PiSSA's cancel
    return product.to(up.dtype)


def _loha(t: Mapping[str, Tensor]) -> Tensor:
    return _hadamard_factor(t, "1") * _hadamard_factor(t, "2")


def _hadamard_factor(t: Mapping[str, Tensor], number: str) -> Tensor:
    a, b = t[f"hada_w{number}_a"], t[f"hada_w{number}_b"]
    core = t.get(f"hada_t{number}")
    return a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def _lokr(t: Mapping[str, Tensor]) -> Tensor:
    w1, w2 = _kronecker_factor(t, "1"), _kronecker_factor(t, "2")
    return torch.kron(w1.view(*w1.shape, *[1] * (w2.dim() - 2)), w2.contiguous())


def _kronecker_factor(t: Mapping[str, Tensor], number: str) -> Tensor:
    if f"lokr_w{number}" in t:
        return t[f"lokr_w{number}"]
    a, b = t[f"lokr_w{number}_a"], t[f"lokr_w{number}_b"]
    core = t.get(f"lokr_t{number}")
    return a @ b if core is None else torch.einsum("ijkl,ip,jr->prkl", core, a, b)


def _full(t: Mapping[str, Tensor]) -> Tensor:
    return t["diff"]


Changes = Mapping[str, Sequence[Delta]]
"""Of the layers of a whole model, by component."""

_CHANGES = {"lora": _lora, "loha": _loha, "lokr": _lokr, "full": _full}


def lora(name: str, down: Tensor, up: Tensor, alpha: float) -> Delta:
    """A plain LoRA's: alpha / rank * up @ down."""
    return Delta(name, {"lora_down.weight": down, "lora_up.weight": up}, alpha)


# ---------------------------------------------------------------------------------------------------------------------
# plain LoRAs of other changes


@dataclass(frozen=True)
class Baked:
    """The nearest plain LoRA of a rank, and how near it is, in Frobenius norms."""

    delta: Delta
    change: float
    """|change|."""
    rest: float
    """|change - what is kept of it|."""

    @property
    def lost(self) -> float:
        """|rest| / |change|."""
        return self.rest / self.change if self.change else 0.0


def baked(delta: Delta, weight: Tensor, rank: int) -> Baked:
    """The plain LoRA of at most this rank that is nearest to a change of `weight` (Eckart & Young 1936).

    Of `weight` only a DoRA needs more than shape and device.
    """
    if delta.is_plain:
        u, s, v = product_svd(delta.scale * delta.up.to(weight.device).double(), delta.down.to(weight.device))
    else:
        u, s, v = torch.linalg.svd(delta.of(weight).flatten(1), full_matrices=False)
    kept = min(rank, len(s))
    down, up = _halves(u[:, :kept], s[:kept], v[:kept])
    if weight.dim() == 4:
        up, down = up[:, :, None, None], down.view(kept, *weight.shape[1:])
    made = lora(delta.name, down.float().contiguous(), up.float().contiguous(), float(kept))
    return Baked(made, float(s.norm()), float(s[kept:].norm()))


def refactored(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) of the same product and shapes, along its own main directions, so that no two parts of it cancel."""
    u, s, v = product_svd(up, down)
    new_down, new_up = _halves(u, s, v)
    rank = down.shape[0] - len(s)  # more than the layer has: the rest is nothing
    new_down, new_up = (torch.nn.functional.pad(m, p) for m, p in ((new_down, (0, 0, 0, rank)), (new_up, (0, rank))))
    return new_down.to(down.dtype).view_as(down), new_up.to(up.dtype).view_as(up)


def product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of up @ down, fp64, from matrices as small as the rank: (out, r), (r,), (r, in)."""
    q_up, r_up = torch.linalg.qr(up.flatten(1).double())
    q_down, r_down = torch.linalg.qr(down.flatten(1).double().T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ u, s, v @ q_down.T


def product_norm(up: Tensor, down: Tensor) -> float:
    """|up @ down| without forming it: |A B|^2 = trace(A'A BB')."""
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())


def _halves(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) of equal size."""
    root = s.sqrt()
    return root[:, None] * v, u * root
