"""Charts as inline SVG in the colours of the page's theme (CSS variables); no scripts, no fonts, no dates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360, 200
Range = tuple[float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 26


@dataclass(frozen=True)
class Series:
    """A named line of (x, y) points; `style` is a CSS class: "train", "validation", …"""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: a name, a value and a remark."""

    name: str
    value: float
    note: str = ""


@dataclass(frozen=True)
class Dot:
    """A value with its error bar; `emphasis` marks our own score."""

    name: str
    value: float
    error: float = 0.0
    emphasis: bool = False


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers that divide [low, high] into about `count` steps."""
    if not high > low:
        return [low]
    magnitude = 10.0 ** math.floor(math.log10((high - low) / count))
    step = min((magnitude * f for f in (1, 2, 2.5, 5, 10)), key=lambda size: abs((high - low) / size - count))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> str:
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.1e}"
    return f"{value:.4g}"


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(text)}</text>'


def line_chart(series: Sequence[Series], label: str, x_name: str = "step") -> str:
    """Draw lines over steps; the highest 2 % of the values are cut off, since a first peak would flatten the rest.

    Points that aren't finite are left out. Raises ValueError when nothing is left to draw.
    """
    kept = [[(x, y) for x, y in s.points if math.isfinite(x) and math.isfinite(y)] for s in series]
    everything = [point for points in kept for point in points]
    if not everything:
        raise ValueError("no finite points to draw")
    x_low, x_high = min(x for x, _ in everything), max(x for x, _ in everything)
    values = sorted(y for _, y in everything)
    y_low, y_high = values[0], values[min(len(values) - 1, int(0.98 * len(values)))]
    y_high = y_high if y_high > y_low else y_low + max(abs(y_low), 1e-6)
    pad = 0.06 * (y_high - y_low)
    y_low, y_high = y_low - pad, y_high + pad

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = min(max((y - y_low) / (y_high - y_low), 0), 1)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_frame((x_low, x_high), (y_low, y_high), place, x_name)]
    for one, points in zip(series, kept, strict=True):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
        parts.append(f'<polyline points="{path}" class="line {one.style}"/>')
        if one.style == "validation":
            parts.extend(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" class="dot validation"/>'
                for px, py in map(lambda p: place(*p), points)
            )
    return _svg(_WIDTH, _HEIGHT, label, parts)


def _frame(x_range: Range, y_range: Range, place: Callable[[float, float], tuple[float, float]], x_name: str) -> str:
    """Draw grid lines and tick labels of both axes."""
    parts = []
    for value in ticks(*y_range):
        _, y = place(x_range[0], value)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(_LEFT - 6, y + 3.5, _label(value), "end"))
    for value in ticks(*x_range):
        x, _ = place(value, y_range[0])
        parts.append(_text(x, _HEIGHT - 9, _label(value), "middle"))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT + 1, x_name, "end"))
    return "".join(parts)


def funnel_chart(bars: Sequence[Bar], label: str) -> str:
    """Draw horizontal bars, the first one at full width, with count and share of the first."""
    whole = max(bars[0].value, 1e-9)
    row, left, width = 34, 190, 720
    room = width - left - 170
    parts = []
    for number, bar in enumerate(bars):
        top = 6 + number * row
        size = max(2.0, room * bar.value / whole)
        share = f"{100 * bar.value / whole:.0f} %"
        parts.append(_text(left - 10, top + 17, bar.name, "end", "name"))
        parts.append(f'<rect x="{left}" y="{top}" width="{size:.1f}" height="24" rx="4" class="bar"/>')
        parts.append(_text(left + size + 8, top + 17, f"{bar.value:,.0f}  ({share})", "start", "value"))
        if bar.note:
            parts.append(_text(width - 4, top + 17, bar.note, "end"))
    return _svg(width, 12 + len(bars) * row, label, parts)


def dot_plot(dots: Sequence[Dot], label: str, x_name: str) -> str:
    """Draw values with error bars on one logarithmic axis, smallest first; raises ValueError when none is positive."""
    shown = sorted((dot for dot in dots if dot.value > 0 and math.isfinite(dot.value)), key=lambda dot: dot.value)
    if not shown:
        raise ValueError("no positive values to draw")
    low = math.log10(min(max(dot.value - 2 * dot.error, dot.value / 2) for dot in shown)) - 0.08
    high = math.log10(max(dot.value + 2 * dot.error for dot in shown)) + 0.08
    left, width, row = 190, 720, 34
    room = width - left - 110

    def place(value: float) -> float:
        return left + room * min(max((math.log10(max(value, 1e-12)) - low) / (high - low), 0), 1)

    bottom = 8 + len(shown) * row
    parts = []
    for value in _log_ticks(low, high):
        x = place(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}" class="grid"/>')
        parts.append(_text(x, bottom + 14, _label(value), "middle"))
    for number, dot in enumerate(shown):
        y = 8 + number * row + row / 2
        style = "own" if dot.emphasis else "control"
        parts.append(_text(left - 12, y + 4, dot.name, "end", "name own" if dot.emphasis else "name"))
        start, end = place(dot.value - 2 * dot.error), place(dot.value + 2 * dot.error)
        parts.append(f'<line x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}" class="error {style}"/>')
        parts.append(f'<circle cx="{place(dot.value):.1f}" cy="{y}" r="6" class="mark {style}"/>')
        parts.append(_text(width - 4, y + 4, f"{_label(dot.value)} ± {dot.error:.2g}", "end", "value"))
    parts.append(_text(left, bottom + 30, x_name))
    return _svg(width, bottom + 36, label, parts)


def _log_ticks(low: float, high: float) -> list[float]:
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    found = [f * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for f in factors]
    return [value for value in found if low <= math.log10(value) <= high]


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height + 4:g}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
