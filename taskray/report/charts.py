"""Charts as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 380, 222
LEFT, RIGHT, TOP, BOTTOM = 42, 14, 10, 38
MAX_POINTS = 240


@dataclass(frozen=True)
class Line:
    """One curve. ``style`` is a CSS class: ``c0`` … ``c5``, or ``base`` for the baseline. ``faint``
    draws it in the background. ``peak``: thinning keeps the maximum of each group of points
    instead of the mean."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "c0"
    faint: bool = False
    peak: bool = False


@dataclass(frozen=True)
class Axis:
    """A range with its ticks, on a linear or logarithmic scale."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """The position of a value: 0 at ``low``, 1 at ``high``."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str = "steps",
    percent: bool = False,
    zero: bool = False,
    note: str = "",
) -> str:
    """A ``<figure>``, with a legend if there are several curves.

    ``x``: ``steps`` or ``seconds``. ``percent``: fractions on an axis from 0 to 100 %.
    ``zero``: the axis starts at 0. Empty where no line has a point.
    """
    lines = [_thin(line) for line in lines if len(line.xs)]
    if not lines:
        return ""
    all_x = [v for line in lines for v in line.xs]
    all_y = [v for line in lines for v in line.ys]
    unit, divisor = ("min", 60.0) if x == "seconds" and max(all_x) > 300 else (x, 1.0)
    horizontal = _linear(0.0, max(all_x) / divisor or 1.0, extend=False)
    if percent:
        vertical = Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
    else:
        vertical = _vertical(min(all_y), max(all_y), zero)
    parts = [_axes(horizontal, vertical, unit, percent)]
    for line in sorted(lines, key=lambda li: (not li.faint, li.style != "base")):
        points = [
            (_px(horizontal, a / divisor), _py(vertical, b))
            for a, b in zip(line.xs, line.ys, strict=True)
        ]
        parts.append(_polyline(line, points))
    drawing = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" data-x="{escape(x)}">{"".join(parts)}</svg>'
    )
    caption = f'<span class="note">{escape(note)}</span>' if note else ""
    return (
        f"<figure><figcaption>{escape(title)}{caption}</figcaption>{drawing}"
        f"{_legend(lines)}</figure>"
    )


def smoothed(line: Line) -> list[Line]:
    """A noisy curve as two: the curve, faint, and its running mean. Short curves are unchanged."""
    window = len(line.ys) // 24
    if window < 2:
        return [line]
    ys = []
    for i in range(len(line.ys)):
        part = line.ys[max(0, i - window) : i + window + 1]
        ys.append(sum(part) / len(part))
    return [replace(line, faint=True), replace(line, ys=ys)]


def _thin(line: Line) -> Line:
    """The line with at most MAX_POINTS points: means (or maxima) of neighbours."""
    size = math.ceil(len(line.xs) / MAX_POINTS)
    if size < 2:
        return line
    groups = [slice(i, i + size) for i in range(0, len(line.xs), size)]
    xs = [sum(line.xs[g]) / len(line.xs[g]) for g in groups]
    ys = [max(line.ys[g]) if line.peak else sum(line.ys[g]) / len(line.ys[g]) for g in groups]
    return replace(line, xs=xs, ys=ys)


def _vertical(low: float, high: float, zero: bool) -> Axis:
    if zero:
        low = min(low, 0.0)
    if low > 0 and high / low > 30:
        return _logarithmic(low, high)
    return _linear(low, high)


def _linear(low: float, high: float, extend: bool = True) -> Axis:
    if high - low <= 1e-12 * max(abs(high), abs(low)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if not extend:
        last = math.floor(high / step + 1e-9)
    ticks = tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1] if extend else high, ticks)


def _logarithmic(low: float, high: float) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, round((last - first) / 4))
    ticks = tuple(10.0**e for e in range(first, last + 1, stride))
    return Axis(10.0**first, 10.0**last, ticks, log=True)


def _px(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _py(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _axes(horizontal: Axis, vertical: Axis, unit: str, percent: bool) -> str:
    parts = []
    for tick in vertical.ticks:
        y = _py(vertical, tick)
        label = f"{tick * 100:.0f} %" if percent else compact(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" class="ty">{label}</text>')
    base = HEIGHT - BOTTOM
    for tick in horizontal.ticks:
        at = _px(horizontal, tick)
        parts.append(f'<text x="{at:.1f}" y="{base + 16}" class="tx">{compact(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 5}" class="tx">{unit}</text>')
    return "".join(parts)


def _polyline(line: Line, points: Sequence[tuple[float, float]]) -> str:
    kind = f"{line.style} faint" if line.faint else line.style
    if len(points) == 1:
        cx, cy = points[0]
        return f'<circle class="dot {kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"/>'
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    data = ""
    if not line.faint:  # the values shown under the pointer
        xs = " ".join(compact(v) for v in line.xs)
        ys = " ".join(compact(v) for v in line.ys)
        data = f' data-name="{escape(line.name)}" data-xs="{xs}" data-ys="{ys}"'
    return f'<polyline class="line {kind}" points="{path}"{data}/>'


def _legend(lines: Sequence[Line]) -> str:
    named = list(dict.fromkeys((line.name, line.style, line.faint) for line in lines))
    named = [n for n in named if not n[2] or (n[0], n[1], False) not in named]
    if len(named) < 2:
        return ""
    items = "".join(
        f'<li class="{style}{" faint" if faint else ""}">{escape(name)}</li>'
        for name, style, faint in named
    )
    return f'<ul class="legend">{items}</ul>'


def dot_chart(
    title: str, rows: Sequence[tuple[str, Sequence[float], bool]], *, percent: bool = False
) -> str:
    """One row for each variant: seeds as faint dots, the mean as a dot, ± one standard deviation as
    a bar. ``rows``: label, values, whether it is the best."""
    shown = [(label, values, best) for label, values, best in rows if values]
    if not shown:
        return ""
    scale = 100.0 if percent else 1.0
    everything = [v * scale for _, values, _ in shown for v in values]
    axis = _linear(min(everything), max(everything))
    height = 28 * len(shown) + 28
    left, right = 132, 24

    def at(value: float) -> float:
        return left + axis.place(value * scale) * (WIDTH - left - right)

    parts = []
    for tick in axis.ticks:
        x = at(tick / scale)
        parts.append(f'<path class="grid" d="M{x:.1f} 6V{height - 22}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" class="tx">{compact(tick)}</text>')
    for i, (label, values, best) in enumerate(shown):
        y, style = 20 + 28 * i, "c0" if best else "base"
        mean = sum(values) / len(values)
        short = label if len(label) <= 20 else label[:19] + "…"
        parts.append(
            f'<text x="{left - 12}" y="{y + 4}" class="ty name">{escape(short)}'
            f"<title>{escape(label)}</title></text>"
        )
        if len(values) > 1:
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
            low, high = max(at(mean - std), left - 6), min(at(mean + std), WIDTH - right + 6)
            parts.append(f'<path class="line {style}" d="M{low:.1f} {y}H{high:.1f}"/>')
        parts += [
            f'<circle class="dot {style} faint" cx="{at(v):.1f}" cy="{y}" r="3"/>' for v in values
        ]
        parts.append(f'<circle class="dot {style}" cx="{at(mean):.1f}" cy="{y}" r="4.5"/>')
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def compact(value: float) -> str:
    """A short number for axes and tool tips: ``0.0123``, ``1.5k``, ``-3``."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}"
