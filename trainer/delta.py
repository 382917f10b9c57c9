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
        return Delta(self.name, {**self.tensors, scaled: self.tensors[scaled].float() * strength}, self.alpha)

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


def baked(delta: Delta, weight: Tensor, rank: int = 0, energy: float = 0.0) -> Baked:
    """The plain LoRA that is nearest to a change of `weight`, as `baked_sum` says."""
    return baked_sum([(delta, 1.0)], weight, rank, energy)


def baked_sum(parts: Sequence[tuple[Delta, float]], weight: Tensor, rank: int = 0, energy: float = 0.0) -> Baked:
    """The plain LoRA that is nearest to a sum of changes of `weight`, each times its strength (Eckart & Young 1936).

    It has at most `rank`; or the least rank, 1 at least, that keeps a share `energy` of |change|^2, which is the sum of
    the squared singular values. Of `weight` only a DoRA needs more than shape and device.
    """
    if (sum_ := joined(parts)) is not None and sum_.rank <= min(weight.flatten(1).shape):
        u, s, v = product_svd(sum_.up.to(weight.device), sum_.down.to(weight.device))
    else:
        change = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
        for delta, strength in parts:
            change.add_(delta.of(weight, torch.float64), alpha=strength)
        u, s, v = matrix_svd(change.flatten(1))
    kept = min(rank, len(s)) if rank else _least_rank(s, energy)
    down, up = _halves(u[:, :kept], s[:kept], v[:kept])
    name, kernel = parts[0][0].name, weight.shape[1:]
    up, down = up.view(*up.shape, *(1 for _ in kernel[1:])), down.view(kept, *kernel)
    made = lora(name, down.float().contiguous(), up.float().contiguous(), float(kept))
    return Baked(made, float(s.norm()), float(s[kept:].norm()))


_NOISE = 1e-7  # of the largest singular value: less is what fp32 rounds


def _least_rank(values: Tensor, energy: float) -> int:
    """How many singular values hold this share of the sum of all their squares; what is noise is not counted."""
    squares = values.double().square()
    left = squares.flip(0).cumsum(0).flip(0)  # left[k]: what is lacking when k are kept
    return max(1, min(int((left > (1 - energy) * left[0]).sum()), int((values > _NOISE * values[0]).sum())))


def joined(parts: Sequence[tuple[Delta, float]]) -> Delta | None:
    """The sum of changes of one layer, each times its strength, as one plain LoRA: factors side by side, so that
    nothing is lost and the ranks add up. Matrices in fp64; None if a part has no `factors`."""
    found = [(factors(delta), strength) for delta, strength in parts]
    known = [(own[0] * strength, own[1]) for own, strength in found if own is not None]
    if len(known) < len(parts):
        return None
    up, down = torch.cat([up for up, _ in known], 1), torch.cat([down for _, down in known], 0)
    return lora(parts[0][0].name, down, up, float(len(down)))


def factors(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """(up, down), (out, r) and (r, in kh kw) in fp64, whose product is the whole change, with its scale; None if its
    form has no such factors: a DoRA, a full change, and what is made with cores (but for the one of a LoRA).

    Of two products, (A B) * (C D) has a column a_i * c_j of `up` and a row b_i * d_j of `down` for each two parts;
    kron(W, A B) = kron(W, A) kron(1, B).
    """
    t = {leaf: tensor.double() for leaf, tensor in delta.tensors.items()}
    form = delta.form
    if form == "lora":
        up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"].flatten(1)
        if "lora_mid.weight" in t:
            down = torch.einsum("ijkl,jr->irkl", t["lora_mid.weight"], down).flatten(1)
    elif form == "loha" and "hada_t1" not in t:
        up = torch.einsum("op,oq->opq", t["hada_w1_a"], t["hada_w2_a"]).flatten(1)
        down = torch.einsum("pi,qi->pqi", t["hada_w1_b"], t["hada_w2_b"]).flatten(0, 1)
    elif form == "lokr" and "lokr_w2_a" in t and "lokr_t2" not in t:
        w1 = _kronecker_factor(t, "1")
        up = torch.kron(w1, t["lokr_w2_a"])
        down = torch.kron(torch.eye(w1.shape[1], dtype=w1.dtype, device=w1.device), t["lokr_w2_b"])
    else:
        return None
    return up * delta.scale, down


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


def matrix_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a whole matrix, fp64: (rows, n), (n,), (n, columns), n the lesser side.

    From the eigenvectors of its smaller Gram matrix, several times faster than the usual way. Singular values below
    1e-8 of the largest are lost in rounding; u s v is the matrix all the same, for u s is the matrix times v'.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, s, v = matrix_svd(matrix.T)
        return v.T, s, u.T
    own = matrix.double()
    _, vectors = torch.linalg.eigh(own.T @ own)
    v = vectors.flip(1)  # the largest first
    scaled = own @ v
    s = torch.linalg.vector_norm(scaled, dim=0)
    order = s.argsort(descending=True)
    return (scaled / s.clamp_min(torch.finfo(s.dtype).tiny))[:, order], s[order], v.T[order]


def product_norm(up: Tensor, down: Tensor) -> float:
    """|up @ down| without forming it: |A B|^2 = trace(A'A BB')."""
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())


def _halves(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) of equal size."""
    root = s.sqrt()
    return root[:, None] * v, u * root
