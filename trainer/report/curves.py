"""Curves as SVG: lines that stretch with the page, and letters that do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..events import Scored, Validated
from ..story import CurvePoint, comparable

_TICKS = 5


@dataclass(frozen=True)
class Line:
    name: str
    points: tuple[tuple[float, float], ...]
    """(x, y); where y is no number, the line has a gap."""
    kind: str
    """The class of its colour."""

    def named(self, name: str) -> Line:
        return replace(self, name=name)


def losses(points: Sequence[CurvePoint], validations: Sequence[Validated] = ()) -> list[Line]:
    """That of each step, the moving average, and that of validation where it measured the same as the newest."""
    lines = [
        Line("each step", tuple((point.step, point.loss) for point in points), "faint"),
        Line("smoothed", tuple((point.step, point.smoothed) for point in points), "first"),
    ]
    if same := comparable(validations):
        lines.append(Line("validation", tuple((measured.step, measured.loss) for measured in same), "second"))
    return lines


def scores_by_step(scores: Sequence[Scored]) -> list[Line]:
    """Style gained, prompt kept and copying."""
    each = (("style", "first"), ("prompt", "second"), ("copying", "third"))
    return [Line(name, tuple((one.step, getattr(one, name)) for one in scores), kind) for name, kind in each]


def rates(points: Sequence[CurvePoint]) -> list[Line]:
    """The learning rate of each part; of a step that trained another part only there is none."""
    parts = sorted({part for point in points for part in point.lr})
    colours = ("first", "second", "third", "fourth")
    return [
        Line(part, tuple((point.step, point.lr.get(part, math.nan)) for point in points), colours[number % 4])
        for number, part in enumerate(parts)
    ]


def loss_sentence(points: Sequence[CurvePoint]) -> str:
    """What the curve of the loss shows."""
    first, last = points[0].smoothed, points[-1].smoothed
    how = "rose" if last > 1.02 * first else "fell" if last < 0.98 * first else "stayed"
    numbers = f"near {last:.3g}" if how == "stayed" else f"from {first:.3g} to {last:.3g}"
    return f"Loss {how} {numbers} (smoothed). It is noisy here; trust the previews."


def rates_sentence(points: Sequence[CurvePoint]) -> str:
    """What the curves of the learning rates show."""
    told = [f"{part}: {rate:.3g} now, {max(point.lr.get(part, 0) for point in points):.3g} at most"
            for part, rate in sorted(points[-1].lr.items())]  # fmt: skip
    return f"Learning rates. {'; '.join(told)}."


def chart(lines: Sequence[Line], told: str, y_name: str, x_name: str = "step") -> str:
    """Lines over common axes, with ticks at round numbers and both axes named. Names and `told` are HTML already; no
    chart if no line has a number."""
    numbers = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not numbers:
        return ""
    across, up = _scale([x for x, _ in numbers]), _scale([y for _, y in numbers])
    drawn = "".join(_polyline(line, across, up) for line in lines)
    legend = "".join(f'<li><span class="key {line.kind}"></span>{line.name}</li>' for line in lines)
    return (
        f'<figure class="chart"><figcaption>{y_name}</figcaption><div class="plot">'
        f'<svg role="img" aria-label="{told}" width="100%" height="100%">{"".join(_grid(across, up))}'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">'
        f'{drawn}</svg></svg></div><p class="axis">{x_name}</p><ul class="legend">{legend}</ul></figure>'
    )


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """An axis between two round numbers, or between the numbers there are."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


def _scale(values: Sequence[float]) -> _Scale:
    """From 0 where that is near, so that a small change does not look like a large one."""
    low, high = min(values), max(values)
    low = 0.0 if 0 <= low < 0.6 * high else low
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    apart = _round_up((high - low) / _TICKS)
    ticks = [n * apart for n in range(math.ceil(low / apart), math.floor(high / apart + 1e-9) + 1)]
    return _Scale(low, high, tuple(ticks))


def _round_up(size: float) -> float:
    """The next of 1, 2, 2.5, 5 and 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return power * next(step for step in (1, 2, 2.5, 5, 10) if step * power >= size * (1 - 1e-9))


def _grid(across: _Scale, up: _Scale) -> Iterator[str]:
    for tick in up.ticks:
        y = f"{100 - 100 * up.share(tick):.2f}%"
        yield f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>'
        yield f'<text x="-6" y="{y}" text-anchor="end" dominant-baseline="middle">{tick:.4g}</text>'
    for tick in across.ticks:
        x = f"{100 * across.share(tick):.2f}%"
        yield f'<line class="tick" x1="{x}" x2="{x}" y1="100%" y2="100%"/>'
        yield f'<text x="{x}" y="100%" dy="1.3em" text-anchor="middle">{tick:,.6g}</text>'
    yield '<line class="edge" x1="0" x2="100%" y1="100%" y2="100%"/>'


def _polyline(line: Line, across: _Scale, up: _Scale) -> str:
    """One path; a new stroke begins after a gap, and a stroke of one point is a dot."""
    path, is_down = [], False
    for x, y in line.points:
        if math.isfinite(y):
            path.append(f"{'L' if is_down else 'M'}{1000 * across.share(x):.1f} {1000 - 1000 * up.share(y):.1f}")
            path += [] if is_down else ["h.01"]
        is_down = math.isfinite(y)
    return f'<path class="{line.kind}" d="{"".join(path)}"/>'
