"""What a table must say of itself: how it was selected, what its marks mean, what it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .cells import Cell, Run
from .fair import FEWEST

if TYPE_CHECKING:
    from .build import Row, Table

EDGE, UNTUNED, BOLD = "†", "‡", "*"


def notes(table: Table, runs: list[Run], mixed: list[str], ranked: list[str]) -> list[str]:
    """One sentence or two a line, in the order in which a reader wants them."""
    said = [_scores(table), _selection(table), *_marks(table)]
    sick = [f"{row.label}: {sick_of(row)}" for row in table.rows if row.sick]
    if sick:
        said.append(f"Runs counted, never averaged, over all points tried: {'; '.join(sick)}.")
    said += _gaps(table)
    if ranked:
        said.append(f"Ranking by a paired t-test over shared seeds of the best row against each other one, Holm-"
                    f"corrected, level {table.spec.bold:g}, {FEWEST} seeds or more. {' '.join(ranked)}")  # fmt: skip
    said += [f"Mixed: {line}." for line in mixed]
    said += _made_of(table, runs)
    unclean = sum(run.scratch for run in runs)
    if unclean:
        said.append(f"NOT FOR PUBLICATION: {unclean} of {len(runs)} runs are from scratch (failed, or made by "
                    "uncommitted code).")  # fmt: skip
    if table.left_out:
        said.append(f"Left out {len(table.left_out)}: {'; '.join(table.left_out)}.")
    return said


def sick_of(row: Row) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in row.sick.items())


def point_of(cell: Cell) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in cell.point.items())


def all_cells(table: Table) -> Iterable[Cell]:
    for row in table.rows:
        yield from row.cells.values()


def _scores(table: Table) -> str:
    scale = f" × {table.spec.scale:g}" if table.spec.scale != 1 else ""
    seeds = sorted({seed for cell in all_cells(table) for seed in cell.values})
    told = f"seed{'s' if len(seeds) != 1 else ''} {', '.join(map(str, seeds))}" if seeds else "no seed"
    return f"Score on the test split{scale}: mean ± sample standard deviation over {told}."


def _selection(table: Table) -> str:
    select, spec = table.spec.select, table.spec
    counts = {row.label: {c.tried for c in row.cells.values() if c.tried} for row in table.rows}
    most = max((max(c) for c in counts.values() if c), default=0)
    if not select.over or most <= 1:
        return "Tuning budget: one point per row; nothing was selected here."
    metric = "primary metric" if select.by == "primary" else select.by
    seeds = select.seeds or (spec.seeds if isinstance(spec.seeds, tuple) else ())
    over = f"seeds {', '.join(map(str, seeds))}" if seeds else "the seeds"
    best = "highest" if select.mode == "max" else "lowest"
    return (f"Chosen per row and task: {', '.join(select.over)}, by the {best} mean {metric} on the selection split "
            f"over {over}, among the points with the most healthy runs.")  # fmt: skip


def _marks(table: Table) -> list[str]:
    cells = list(all_cells(table))
    said = []
    if any(c.edge for c in cells):
        said.append(f"{EDGE} the selected point is at the edge of its grid: a wider one may do better.")
    if any(c.untuned for c in cells):
        said.append(f"{UNTUNED} untuned: one point was tried, more in other rows.")
    if any(c.values and len(c.values) != c.expected for c in cells):
        said.append("(n/m) n seeds where m are expected.")
    if any(c.bold for c in cells) or any(row.mean and row.mean.bold for row in table.rows):
        said.append(f"Bold ({BOLD} in plain text): better than every other row.")
    return said


def _gaps(table: Table) -> list[str]:
    said = []
    empty = [row.label for row in table.rows if not any(c.tried for c in row.cells.values())]
    if empty:
        said.append(f"No records at all: {', '.join(empty)}.")
    if any(row.mean is not None and not row.mean.values for row in table.rows):
        said.append("A row that lacks a task has no mean and no costs.")
    return said


def _made_of(table: Table, runs: list[Run]) -> list[str]:
    done = [run for run in runs if run.record["status"] == "ok"]
    if not done:
        return []

    def each(read: Any) -> str:
        return ", ".join(sorted({str(read(run.record)) for run in done}))

    lines = []
    for column in table.spec.tasks:
        own = [run for run in done if run.record["task"] == column.task]
        for run in own[:1]:
            data, metrics = run.record["data"], run.record["metrics"]
            sizes = ", ".join(f"{split} {size}" for split, size in data.get("sizes", {}).items())
            metric = metrics["primary"] if column.metric == "primary" else column.metric
            lines.append(f"{column.label}: {metric}; {sizes}; data {data.get('fingerprint')}")
    packages = ("torch", "transformers")
    versions = each(lambda r: " ".join(f"{p} {r['environment'].get('packages', {}).get(p)}" for p in packages))
    return [
        f"{'. '.join(lines)}.",
        f"Base {each(lambda r: r['model'])} ({each(lambda r: r['base'].get('fingerprint'))}), {versions}, "
        f"{each(lambda r: r['environment'].get('device'))} ({each(lambda r: r['environment'].get('cpu'))}, "
        f"{each(lambda r: r['environment'].get('threads'))} threads), "
        f"code {each(lambda r: str(r['environment'].get('commit'))[:12])}.",
    ]
