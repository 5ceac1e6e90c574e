"""Score against cost, a panel a task: one marker a row, named beside it, spread over seeds as a bar. Black on white."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from .labels import nearest, place
from .render import cost, cost_label

if TYPE_CHECKING:
    from .build import Table
    from .cells import Cell

SHAPES = "osD^vPX<>phd*H8"
FILLS = ("black", "white", "0.65")  # shape and fill together tell 45 rows apart
PANEL = (6.0, 4.4)  # inches
DPI = 200
DODGE = 22.0  # pixels at most that points of equal cost are set apart, all together
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "pdf.fonttype": 42, "axes.linewidth": 0.8}  # fmt: skip


def draw(table: Table) -> dict[str, bytes]:
    """{".png": ..., ".pdf": ...}; equal tables give equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(column.label, {row.label: row.cells[column.label] for row in table.rows}) for column in table.spec.tasks]
    means = {row.label: row.mean for row in table.rows if row.mean is not None}
    if means:
        panels.append(("mean over tasks", {k: _with_cost(c, table, k) for k, c in means.items()}))
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        named = []
        looks = _looks([row.label for row in table.rows])
        for ax, (title, cells) in zip(axes, panels, strict=False):
            named.append((ax, _panel(ax, title, cells, looks, table)))
        for ax in axes[len(panels) :]:
            ax.remove()
        figure.draw_without_rendering()  # the layout must stand before pixels are counted
        figure.set_layout_engine("none")
        for ax, points in named:
            _name(ax, points)
        made = {}
        for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None, "Creator": None,
                                                                         "Producer": None})):  # fmt: skip
            out = io.BytesIO()
            figure.savefig(out, format=suffix[1:], dpi=DPI, metadata=metadata)
            made[suffix] = out.getvalue()
    return made


def _with_cost(mean: Cell, table: Table, label: str) -> Cell:
    from .cells import Cell, across

    row = next(row for row in table.rows if row.label == label)
    x = across(list(row.cells.values()), lambda cell: cell.costs.get(table.spec.plot, {}))
    return Cell(mean.values, mean.expected, costs={table.spec.plot: x.values})


def _looks(labels: list[str]) -> dict[str, dict[str, Any]]:
    return {label: {"marker": SHAPES[i % len(SHAPES)], "markerfacecolor": FILLS[i // len(SHAPES) % len(FILLS)]}
            for i, label in enumerate(labels)}  # fmt: skip


def _panel(ax: Any, title: str, cells: dict[str, Cell], looks: dict[str, Any], table: Table) -> list[tuple[str, Any]]:
    """Draws markers and bars; returns (name, (x, y, spread)) of each."""
    spec = table.spec
    points = {}
    for label, cell in cells.items():
        paid = cell.costs.get(spec.plot, {})
        if cell.mean is not None and paid:
            x = sum(paid.values()) / len(paid)
            points[label] = (x, cell.mean * spec.scale, (cell.spread or 0.0) * spec.scale)
    absent = [label for label in cells if label not in points]
    ax.set_title(title + (f"   (no score: {', '.join(absent)})" if absent else ""), fontsize=9.5, loc="left", wrap=True)
    ax.set_xlabel(cost_label(spec.plot))
    ax.set_ylabel("score on test" + (f" × {spec.scale:g}" if spec.scale != 1 else ""))
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    if not points:
        return []
    left = _scale(ax, [x for x, _, _ in points.values()], spec.plot)
    low, high = min(y - s for _, y, s in points.values()), max(y + s for _, y, s in points.values())
    pad = 0.1 * (high - low) or 1.0
    ax.set_ylim(low - pad, high + pad)
    placed = []
    for label, x in _apart(ax, {k: (x or left, y) for k, (x, y, _) in points.items()}).items():
        _, y, spread = points[label]
        ax.errorbar(x, y, spread or None, color="0.45", elinewidth=0.8, capsize=2, zorder=2)
        ax.plot(x, y, linestyle="none", color="black", markersize=6, markeredgewidth=0.9, zorder=3, **looks[label])
        placed.append((label, (x, y, spread)))
    return placed


def _scale(ax: Any, xs: list[float], name: str) -> float:
    """A log axis; rows without any cost stand left of a break, at the x that is returned."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    positive = [x for x in xs if x > 0] or [1.0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    width = max(high - low, 0.6)
    zero = 10 ** (low - 0.25 * width)
    start = low - (0.37 if 0 in xs else 0.12) * width
    ax.set_xscale("log")
    ax.set_xlim(10**start, 10 ** (high + 0.14 * width))
    powers = [10.0**k for k in range(math.ceil(low - 0.1 * width), math.floor(high + 0.14 * width) + 1)]
    if len(powers) < 2:
        powers = sorted({m * 10.0**k for k in range(math.floor(low) - 1, math.ceil(high) + 1) for m in (1, 2, 5)})
        powers = [p for p in powers if low - 0.1 * width <= math.log10(p) <= high + 0.14 * width]
    ticks = ([zero] if 0 in xs else []) + powers
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x == zero and 0 in xs else cost(name, x)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(FixedLocator([]))
    if 0 in xs:
        at = (0.37 - 0.19) / (0.37 + 1.14 * 1.0) if high > low else 0.15
        ax.plot([at - 0.008, at + 0.008], [0, 0], transform=ax.transAxes, color="white", linewidth=3, clip_on=False,
                zorder=5)  # fmt: skip
        for shift in (-0.008, 0.008):
            ax.plot([at + shift - 0.005, at + shift + 0.005], [-0.018, 0.018], transform=ax.transAxes, color="black",
                    linewidth=0.8, clip_on=False, zorder=6)  # fmt: skip
    return zero


def _apart(ax: Any, points: dict[str, tuple[float, float]]) -> dict[str, float]:
    """x of each point, those that would stand on one another set slightly apart, in the order of their scores."""
    pixels = {label: ax.transData.transform(xy) for label, xy in points.items()}
    moved: dict[str, float] = {}
    waiting = sorted(points, key=lambda label: (pixels[label][0], label))
    while waiting:
        first = waiting[0]
        group = [label for label in waiting if pixels[label][0] - pixels[first][0] < 6 * DPI / 100]
        waiting = waiting[len(group) :]
        group.sort(key=lambda label: (pixels[label][1], label))
        step = min(8.0, DODGE / max(1, len(group) - 1)) * DPI / 100
        for i, label in enumerate(group):
            x = pixels[label][0] + (i - (len(group) - 1) / 2) * step
            moved[label] = ax.transData.inverted().transform((x, pixels[label][1]))[0]
    return {label: moved[label] for label in points}


def _name(ax: Any, points: list[tuple[str, Any]]) -> None:
    """A name beside each marker, with a line to it where it had to move away."""
    unit = DPI / 100
    texts = [ax.text(0, 0, label, fontsize=8, transform=None, zorder=4) for label, _ in points]
    sizes = [(box.width / unit, box.height / unit) for box in (text.get_window_extent() for text in texts)]
    at = [tuple(ax.transData.transform((x, y)) / unit) for _, (x, y, _) in points]
    obstacles = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    for _, (x, y, spread) in points:
        (left, bottom), (_, top) = ax.transData.transform([(x, y - spread), (x, y + spread)]) / unit
        obstacles.append((left - 1, bottom, left + 1, top))
    frame = ax.get_window_extent()
    inside = (frame.x0 / unit + 3, frame.y0 / unit + 3, frame.x1 / unit + 6, frame.y1 / unit + 4)
    back = ax.figure.transFigure.inverted().transform
    for text, point, box in zip(texts, at, place(at, sizes, obstacles, inside), strict=True):
        text.set_transform(ax.figure.transFigure)
        text.set_position(back((box[0] * unit, box[1] * unit)))
        text.set_verticalalignment("bottom")
        end = nearest(point, box)
        if math.dist(point, end) > 11:
            start = back((point[0] * unit, point[1] * unit))
            tip = back((end[0] * unit, end[1] * unit))
            ax.plot([start[0], tip[0]], [start[1], tip[1]], transform=ax.figure.transFigure, color="0.55",
                    linewidth=0.6, zorder=1.5, clip_on=False)  # fmt: skip
