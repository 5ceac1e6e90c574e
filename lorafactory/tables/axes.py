"""The two axes of a plot: cost on a log scale with room for 0, score with at most one empty stretch left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

WORTH = 0.4  # share of the scores' range that is empty before it is left out


def cost_axis(ax: Any, xs: Sequence[float], text: Callable[[float], str]) -> float:
    """Log scale over the positive xs. Zeros stand left of a break, at the x that is returned."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

    positive = [math.log10(x) for x in xs if x > 0] or [0.0]
    low, high, zeros = min(positive), max(positive), min(xs) <= 0
    width = max(high - low, 0.6)
    zero, start, end = low - 0.25 * width, low - (0.37 if zeros else 0.12) * width, high + 0.14 * width
    ax.set_xscale("log")
    ax.set_xlim(10**start, 10**end)
    ticks = [10.0**k for k in range(math.ceil(low - 0.1 * width), math.floor(end) + 1)]
    if len(ticks) < 2:
        digits = [m * 10.0**k for k in range(math.floor(low) - 1, math.ceil(high) + 1) for m in (1, 2, 5)]
        ticks = [x for x in digits if low - 0.1 * width <= math.log10(x) <= end]
    shown = [(x, text(x)) for x in ticks]
    if zeros:
        shown.insert(0, (10**zero, "0"))
        _break(ax, (low - 0.16 * width - start) / (end - start), vertical=False)
    ax.xaxis.set_major_locator(FixedLocator([x for x, _ in shown]))
    ax.xaxis.set_major_formatter(FixedFormatter([label for _, label in shown]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    return 10**zero


def score_axis(ax: Any, spans: Sequence[tuple[float, float]]) -> None:
    """Linear over the spans (low, high). Where most of it is one empty stretch, that is left out, marked by a break."""
    low, high = min(bottom for bottom, _ in spans), max(top for _, top in spans)
    size = high - low or 1.0
    gap = _widest_gap(spans)
    if gap is None or gap[1] - gap[0] < WORTH * size:
        ax.set_ylim(low - 0.1 * size, high + 0.1 * size)
        return
    from matplotlib.ticker import FixedLocator, MaxNLocator

    kept = size - (gap[1] - gap[0])
    pad = 0.15 * kept or 0.05 * size
    bottom, top, cut = low - pad, high + pad, (gap[0] + pad, gap[1] - pad)
    if cut[1] <= cut[0]:
        ax.set_ylim(bottom, top)
        return
    left_out = cut[1] - cut[0] - 0.4 * pad  # what is cut is drawn as high as 0.4 pads

    knots = [bottom - 10 * size, *cut, top + 10 * size]
    drawn = [knots[0], cut[0], cut[1] - left_out, knots[3] - left_out]

    def forward(y: Any) -> Any:
        return np.interp(y, knots, drawn)

    def inverse(v: Any) -> Any:
        return np.interp(v, drawn, knots)

    ax.set_yscale("function", functions=(forward, inverse))
    ax.set_ylim(bottom, top)
    even = MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(0, forward(top) - forward(bottom))
    step = float(even[1] - even[0])
    ticks = [k * step for k in range(math.ceil(bottom / step), math.floor(top / step) + 1)]
    ax.yaxis.set_major_locator(FixedLocator([y for y in ticks if not cut[0] - step / 4 < y < cut[1] + step / 4]))
    middle = (forward(cut[0]) + forward(cut[1])) / 2
    _break(ax, (middle - forward(bottom)) / (forward(top) - forward(bottom)), vertical=True)


def _widest_gap(spans: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    ordered, gaps = sorted(spans), []
    reached = ordered[0][1]
    for low, high in ordered[1:]:
        if low > reached:
            gaps.append((reached, low))
        reached = max(reached, high)
    return max(gaps, key=lambda gap: gap[1] - gap[0], default=None)


def _break(ax: Any, at: float, vertical: bool) -> None:
    """Two strokes across an axis at this share of its length; along it where vertical, a dotted line, too."""
    box = ax.get_window_extent()
    width, height = box.width / ax.figure.dpi, box.height / ax.figure.dpi
    along, across = (0.06 / height, 0.07 / width) if vertical else (0.06 / width, 0.07 / height)

    def line(ts: list[float], ns: list[float], **style: Any) -> None:
        xs, ys = (ns, ts) if vertical else (ts, ns)
        ax.plot(xs, ys, transform=ax.transAxes, clip_on=False, **style)

    if vertical:
        line([at, at], [0, 1], color="0.7", linewidth=0.8, linestyle=(0, (1, 3)), zorder=0.9)
    line([at - along / 2, at + along / 2], [0, 0], color="white", linewidth=3, zorder=5)
    for shift in (-along / 2, along / 2):
        stroke = [at + shift - along / 3, at + shift + along / 3]
        line(stroke, [-across, across], color="black", linewidth=0.8, zorder=6)
