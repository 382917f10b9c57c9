"""Changes of a weight: each form by its own formula, whether it fits, and the plain LoRA that is nearest to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorasmith.trainer.delta import Delta, baked, baked_sum, factors, joined, lora, matrix_svd, refactored

LINEAR, CONVOLUTION = (12, 8), (12, 8, 3, 3)


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(0)


def plain(shape: tuple[int, ...], rank: int = 4, alpha: float = 2.0) -> Delta:
    out, width, *kernel = shape
    return lora("x", torch.randn(rank, width, *kernel), torch.randn(out, rank, *(1 for _ in kernel)), alpha)


def tucker(shape: tuple[int, ...]) -> Delta:
    out, width, *kernel = shape
    down, mid, up = torch.randn(4, width, 1, 1), torch.randn(4, 4, *kernel), torch.randn(out, 4, 1, 1)
    return Delta("x", {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, 2.0)


def loha(shape: tuple[int, ...]) -> Delta:
    out, width = shape[0], torch.Size(shape[1:]).numel()
    names = {f"hada_w{n}_{side}": size for n in (1, 2) for side, size in (("a", (out, 3)), ("b", (3, width)))}
    return Delta("x", {name: torch.randn(size) for name, size in names.items()}, 1.5)


def loha_of_cores(shape: tuple[int, ...]) -> Delta:
    out, width, *kernel = shape
    sizes = {"t": (3, 3, *kernel), "w_a": (3, out), "w_b": (3, width)}
    names = {name.replace("t", f"t{n}").replace("w", f"w{n}"): size for n in (1, 2) for name, size in sizes.items()}
    return Delta("x", {f"hada_{name}": torch.randn(size) for name, size in names.items()}, 1.5)


def lokr(shape: tuple[int, ...]) -> Delta:
    out, width, *kernel = shape
    w2_b = torch.randn(2, width // 4 * torch.Size(kernel).numel())
    return Delta("x", {"lokr_w1": torch.randn(3, 4), "lokr_w2_a": torch.randn(out // 3, 2), "lokr_w2_b": w2_b}, 3.0)


def lokr_of_a_core(shape: tuple[int, ...]) -> Delta:
    out, width, *kernel = shape
    w1 = {"lokr_w1_a": torch.randn(3, 2), "lokr_w1_b": torch.randn(2, 4)}
    w2 = {"lokr_w2_a": torch.randn(2, out // 3), "lokr_w2_b": torch.randn(2, width // 4)}
    return Delta("x", w1 | w2 | {"lokr_t2": torch.randn(2, 2, *kernel)}, 3.0)


def lokr_of_whole_factors(shape: tuple[int, ...]) -> Delta:
    out, width, *kernel = shape
    return Delta("x", {"lokr_w1": torch.randn(3, 4), "lokr_w2": torch.randn(out // 3, width // 4, *kernel)}, 3.0)


def full(shape: tuple[int, ...]) -> Delta:
    return Delta("x", {"diff": torch.randn(shape)}, 0.0)


def dora_of_rows(shape: tuple[int, ...]) -> Delta:
    lengths = torch.rand(shape[0], *(1 for _ in shape[1:])) + 0.5
    return Delta("x", {**plain(shape).tensors, "dora_scale": lengths}, 2.0)


def dora_of_columns(shape: tuple[int, ...]) -> Delta:
    lengths = torch.rand(1, shape[1], *(1 for _ in shape[2:])) + 0.5
    return Delta("x", {**loha(shape).tensors, "dora_scale": lengths}, 1.5)


def by_hand(delta: Delta, weight: Tensor) -> Tensor:
    """One number after the other, from the papers' formulas."""
    t = {name: tensor.double() for name, tensor in delta.tensors.items()}
    out, width = weight.shape[:2]
    change = torch.zeros(*weight.shape, dtype=torch.float64)
    for o in range(out):
        for i in range(width):
            change[o, i] = scale_by_hand(delta) * one_by_hand(t, o, i, weight)
    if "dora_scale" not in t:
        return change
    directions, rows = weight.double() + change, t["dora_scale"].shape[0] == out
    for number in range(out if rows else width):
        part = directions[number] if rows else directions[:, number]
        part *= t["dora_scale"].flatten()[number] / part.norm()
    return directions - weight.double()


def scale_by_hand(delta: Delta) -> float:
    names = delta.tensors.keys()
    if "diff" in names or {"lokr_w1", "lokr_w2"} <= names:
        return 1.0
    ranks = {"lora_down.weight": 4, "hada_w1_b": 3, "lokr_w2_b": 2}
    return delta.alpha / next(rank for name, rank in ranks.items() if name in names)


def one_by_hand(t: dict[str, Tensor], o: int, i: int, weight: Tensor) -> Tensor | float:
    """The change of one number of a linear layer, or of one kernel."""
    kernel, size = weight.shape[2:], weight[0, 0].numel()
    span = slice(i * size, (i + 1) * size)
    if "diff" in t:
        return t["diff"][o, i]
    if "lora_mid.weight" in t:
        up, mid, down = (t[f"lora_{name}.weight"].squeeze() for name in ("up", "mid", "down"))
        return sum(up[o, a] * mid[a, b] * down[b, i] for a in range(4) for b in range(4))  # pyright: ignore
    if "lora_up.weight" in t:
        return sum(t["lora_up.weight"][o, r].squeeze() * t["lora_down.weight"][r, i] for r in range(4))
    if "hada_t1" in t:
        cores = [(t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in (1, 2)]
        one, two = (sum(a[p, o] * core[p, q] * b[q, i] for p in range(3) for q in range(3)) for core, a, b in cores)
        return one * two  # pyright: ignore
    if "hada_w1_a" in t:
        one, two = (sum(t[f"hada_w{n}_a"][o, r] * t[f"hada_w{n}_b"][r, span] for r in range(3)) for n in (1, 2))
        return (one * two).view(kernel)  # pyright: ignore
    return kronecker_by_hand(t, o, i, weight)


def kronecker_by_hand(t: dict[str, Tensor], o: int, i: int, weight: Tensor) -> Tensor:
    rows, columns = weight.shape[0] // 3, weight.shape[1] // 4
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        core, a, b = t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"]
        w2 = torch.zeros(rows, columns, *weight.shape[2:], dtype=torch.float64)
        for p in range(2):
            for q in range(2):
                w2 += a[p][:, None, None, None] * core[p, q] * b[q][None, :, None, None]
    else:
        w2 = (t["lokr_w2_a"] @ t["lokr_w2_b"]).view(rows, columns, *weight.shape[2:])
    return w1[o // rows, i // columns] * w2[o % rows, i % columns]


MAKERS: list[Callable[[tuple[int, ...]], Delta]] = [
    *(plain, tucker, loha, loha_of_cores, lokr, lokr_of_a_core, lokr_of_whole_factors, full),
    *(dora_of_rows, dora_of_columns),
]
CASES = [
    (make, shape)
    for make in MAKERS
    for shape in (LINEAR, CONVOLUTION)
    if shape == CONVOLUTION or make not in (tucker, loha_of_cores, lokr_of_a_core)
]


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_each_form_is_its_formula(make: Callable[[tuple[int, ...]], Delta], shape: tuple[int, ...]):
    delta, weight = make(shape), torch.randn(shape)
    found = delta.of(weight)
    assert found.shape == weight.shape
    torch.testing.assert_close(found.double(), by_hand(delta, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_a_change_fits_its_own_layer_alone(make: Callable[[tuple[int, ...]], Delta], shape: tuple[int, ...]):
    delta, (out, width, *kernel) = make(shape), shape
    assert delta.fits(shape)
    assert not delta.fits((width, out, *kernel))
    assert not delta.fits((out, width + 1, *kernel))
    assert not delta.fits((out + 1, width, *kernel))


def test_the_lengths_must_fit_too():
    delta = dora_of_rows(LINEAR)
    assert not Delta("x", {**delta.tensors, "dora_scale": torch.ones(5, 1)}, 2.0).fits(LINEAR)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_baking_at_full_rank_loses_nothing(make: Callable[[tuple[int, ...]], Delta], shape: tuple[int, ...]):
    delta, weight = make(shape), torch.randn(shape)
    made = baked(delta, weight, 12)
    assert made.lost < 1e-6
    assert made.delta.is_plain
    assert made.delta.fits(shape)
    change = delta.of(weight)
    assert made.change == pytest.approx(float(change.norm()), rel=1e-4)
    torch.testing.assert_close(made.delta.of(weight), change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_baking_at_a_low_rank_loses_what_singular_values_say(
    make: Callable[[tuple[int, ...]], Delta], shape: tuple[int, ...]
):
    delta, weight = make(shape), torch.randn(shape)
    made = baked(delta, weight, 2)
    values = torch.linalg.svdvals(delta.of(weight).flatten(1).double())
    assert made.lost == pytest.approx(float(values[2:].norm() / values.norm()), abs=1e-5)
    left = delta.of(weight) - made.delta.of(weight)
    assert made.rest == pytest.approx(float(left.norm()), rel=1e-3, abs=1e-4)
    assert float(made.delta.down.norm()) == pytest.approx(float(made.delta.up.norm()), rel=1e-3)


@pytest.mark.parametrize("strength", [0.5, -2.0, 0.0])
@pytest.mark.parametrize(("make", "shape"), CASES)
def test_a_change_at_another_strength_is_that_multiple_of_it(
    make: Callable[[tuple[int, ...]], Delta], shape: tuple[int, ...], strength: float
):
    delta, weight = make(shape), torch.randn(shape)
    if delta.form == "dora":
        with pytest.raises(ValueError, match="the change of a DoRA is not in proportion"):
            delta.times(strength)
        return
    made = delta.times(strength)
    assert (made.form, made.alpha) == (delta.form, delta.alpha)
    torch.testing.assert_close(made.of(weight), strength * delta.of(weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_factors_hold_the_whole_change(make: Callable[[tuple[int, ...]], Delta], shape: tuple[int, ...]):
    delta, weight = make(shape), torch.randn(shape)
    found = factors(delta)
    if make not in (plain, tucker, loha, lokr):
        assert found is None
        return
    assert found is not None
    up, down = found
    torch.testing.assert_close((up @ down).view(shape), delta.of(weight, torch.float64), rtol=1e-7, atol=1e-7)


def test_plain_changes_side_by_side_are_their_sum():
    parts = [(plain(CONVOLUTION), 0.5), (tucker(CONVOLUTION), -2.0)]
    weight, made = torch.randn(CONVOLUTION), joined(parts)
    assert made is not None
    assert (made.rank, made.scale) == (8, 1.0)
    expected = sum(strength * delta.of(weight) for delta, strength in parts)
    torch.testing.assert_close(made.of(weight), expected, rtol=1e-5, atol=1e-5)
    assert joined([*parts, (full(CONVOLUTION), 1.0)]) is None


@pytest.mark.parametrize("shape", [LINEAR, CONVOLUTION])
def test_a_sum_of_all_forms_is_baked(shape: tuple[int, ...]):
    makers = [make for make, own in CASES if own == shape]
    parts, weight = [(make(shape), 0.25 * number - 1) for number, make in enumerate(makers)], torch.randn(shape)
    made = baked_sum(parts, weight, 512)
    expected = sum(strength * delta.of(weight, torch.float64) for delta, strength in parts)
    torch.testing.assert_close(made.delta.of(weight, torch.float64), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("make", [plain, full])
def test_an_energy_is_kept_by_the_least_rank(make: Callable[[tuple[int, ...]], Delta], energy: float):
    delta, weight = make(LINEAR), torch.randn(LINEAR)
    made = baked(delta, weight, energy=energy)
    squares = torch.linalg.svdvals(delta.of(weight, torch.float64)) ** 2
    kept = squares.cumsum(0) / squares.sum()
    most = {plain: 4, full: 8}[make]
    assert made.delta.rank == min(most, int((kept < energy).sum()) + 1)
    assert made.lost**2 <= 1 - energy + 1e-9


def test_of_nothing_an_energy_takes_one_rank():
    assert baked(lora("x", torch.randn(4, 8), torch.zeros(12, 4), 4.0), torch.randn(LINEAR), energy=0.9).delta.rank == 1


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
@pytest.mark.parametrize("rank", [3, 8])
def test_a_matrix_is_decomposed_as_the_library_does_it(shape: tuple[int, int], rank: int):
    matrix = torch.randn(shape[0], rank, dtype=torch.float64) @ torch.randn(rank, shape[1], dtype=torch.float64)
    u, s, v = matrix_svd(matrix)
    expected = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(s, expected, rtol=1e-6, atol=1e-6 * float(expected[0]))
    torch.testing.assert_close((u * s) @ v, matrix, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(u[:, :rank].T @ u[:, :rank], torch.eye(rank, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_nothing_is_baked_of_nothing():
    made = baked(lora("x", torch.randn(4, 8), torch.zeros(12, 4), 4.0), torch.randn(LINEAR), 2)
    assert (made.change, made.rest, made.lost) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("rank", [4, 10])
def test_factors_whose_parts_cancel_are_written_anew(rank: int):
    """As those of a young PiSSA; the rank may be more than the layer has."""
    up, down = torch.randn(12, rank, dtype=torch.float64), torch.randn(rank, 8, dtype=torch.float64)
    noise = 1e-4 * torch.randn_like(up)
    long_down, long_up = torch.cat([down, down]), torch.cat([up + noise, -up], 1)
    new_down, new_up = refactored(long_down, long_up)
    assert (new_down.shape, new_up.shape) == (long_down.shape, long_up.shape)
    torch.testing.assert_close(new_up @ new_down, noise @ down, rtol=1e-7, atol=1e-12)
    assert new_up.norm() < 0.1 * long_up.norm()
