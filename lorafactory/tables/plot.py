"""Score against cost, a panel a task: one marker a row, named beside it, spread over seeds as a bar. Black on white."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from .axes import cost_axis, score_axis
from .labels import nearest, place
from .render import cost, cost_label

if TYPE_CHECKING:
    from .build import Table
    from .cells import Cell

SHAPES = "os^DvP<X>d*ph"
FILLS = ("black", "white", "0.7")  # 13 shapes and 3 fills in turn: 39 rows look different
PANEL = (6.4, 4.8)  # inches
DPI = 200
UNIT = DPI / 100  # the layout counts in hundredths of an inch
AWAY = 11.0  # from here on a name needs a line to its point
STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False, "pdf.fonttype": 42, "axes.linewidth": 0.8}  # fmt: skip


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
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user prefers
        matplotlib.rcParams.update(STYLE)
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
            _name(ax, points, looks)
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
    common = {"linestyle": "none", "color": "black", "markersize": 5.5, "markeredgewidth": 0.9, "zorder": 3}
    return {label: {**common, "marker": SHAPES[i % len(SHAPES)], "markerfacecolor": FILLS[i % len(FILLS)]}
            for i, label in enumerate(labels)}  # fmt: skip


def _panel(ax: Any, title: str, cells: dict[str, Cell], looks: dict[str, Any], table: Table) -> list[tuple[str, Any]]:
    """Draws axes, markers and bars; returns (name, (x, y, spread)) of each."""
    spec = table.spec
    points = {}
    for label, cell in cells.items():
        paid = cell.costs.get(spec.plot, {})
        if cell.mean is not None and paid:
            x = sum(paid.values()) / len(paid)
            points[label] = (x, cell.mean * spec.scale, (cell.spread or 0.0) * spec.scale)
    absent = [label for label in cells if label not in points]
    ax.set_title(title + (f"   (no score: {', '.join(absent)})" if absent else ""), fontsize=9.5, loc="left", wrap=True)
    paid_for = "trainable parameters of the adapter" if spec.plot == "adapter_parameters" else cost_label(spec.plot)
    ax.set_xlabel(paid_for)
    ax.set_ylabel("score on test" + (f" × {spec.scale:g}" if spec.scale != 1 else "") + "  (bar: ± sd over seeds)")
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    if not points:
        return []
    left = cost_axis(ax, [x for x, _, _ in points.values()], lambda x: cost(spec.plot, x))
    score_axis(ax, [(y - spread, y + spread) for _, y, spread in points.values()])
    placed, true = [], {k: (x or left, y) for k, (x, y, _) in points.items()}
    apart = _apart(ax, true)
    if any(not math.isclose(x, true[label][0], rel_tol=1e-6) for label, x in apart.items()):
        ax.set_xlabel(f"{paid_for}  (points that touch are set apart)")
    for label, x in apart.items():
        _, y, spread = points[label]
        ax.errorbar(x, y, spread or None, color="0.5", elinewidth=0.8, capsize=2, zorder=2)
        ax.plot(x, y, **looks[label])
        placed.append((label, (x, y, spread)))
    return placed


def _apart(ax: Any, points: dict[str, tuple[float, float]]) -> dict[str, float]:
    """x of each point; of points that would cover one another, every second and third moves by a marker's width."""
    pixels = {label: ax.transData.transform(xy) / UNIT for label, xy in points.items()}
    columns = (0.0, 7.0, -7.0)
    moved: dict[str, tuple[float, float]] = {}
    for label, (x, y) in sorted(pixels.items(), key=lambda item: (item[1][1], item[0])):
        near = [at for at in moved.values() if abs(at[1] - y) < 8]
        free = [x + c for c in columns if all(abs(at[0] - x - c) >= 7 for at in near)]
        moved[label] = (free[0] if free else x + columns[len(near) % 3], y)
    return {label: ax.transData.inverted().transform((moved[label][0] * UNIT, moved[label][1] * UNIT))[0]
            for label in points}  # fmt: skip


def _name(ax: Any, points: list[tuple[str, Any]], looks: dict[str, Any]) -> None:
    """A name beside each marker; where it had to move away, a line leads to it and the marker stands before it, too."""
    texts = [ax.text(0, 0, label, fontsize=8, transform=None, zorder=4, va="bottom") for label, _ in points]
    boxes = [text.get_window_extent() for text in texts]
    sizes = [(box.width / UNIT + 9, box.height / UNIT) for box in boxes]
    at = [tuple(ax.transData.transform((x, y)) / UNIT) for _, (x, y, _) in points]
    obstacles = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    for _, (x, y, spread) in points:
        (middle, bottom), (_, top) = ax.transData.transform([(x, y - spread), (x, y + spread)]) / UNIT
        obstacles.append((middle - 1, bottom, middle + 1, top))
    frame = ax.get_window_extent()
    inside = (frame.x0 / UNIT + 3, frame.y0 / UNIT + 3, frame.x1 / UNIT + 6, frame.y1 / UNIT + 4)
    back = ax.figure.transFigure.inverted()
    free = {"transform": ax.figure.transFigure, "clip_on": False}
    for (label, _), text, point, box in zip(points, texts, at, place(at, sizes, obstacles, inside), strict=True):
        end = nearest(point, box)
        away = math.dist(point, end) > AWAY
        text.set_transform(ax.figure.transFigure)
        text.set_position(back.transform(((box[0] + 9 * away + 4.5 * (not away)) * UNIT, box[1] * UNIT)))
        if away:
            (x0, y0), (x1, y1) = back.transform([(point[0] * UNIT, point[1] * UNIT), (end[0] * UNIT, end[1] * UNIT)])
            ax.plot([x0, x1], [y0, y1], color="0.6", linewidth=0.6, zorder=1.5, **free)
            x, y = back.transform(((box[0] + 4) * UNIT, (box[1] + box[3]) / 2 * UNIT))
            ax.plot(x, y, **{**looks[label], "markersize": 4, "zorder": 4}, **free)
