"""Spec and records -> Table."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..record import is_scratch, read_all
from ..registry import nearest
from . import fair
from .cells import SICK, Cell, Run, across, cell
from .notes import notes
from .spec import Spec


@dataclass
class Row:
    """cells: one a task, by the column's label; mean: over them; costs: of the selected points, a mean over tasks."""

    label: str
    variant: str
    cells: dict[str, Cell]
    mean: Cell | None = None
    costs: dict[str, Cell] = field(default_factory=dict)
    sick: dict[str, int] = field(default_factory=dict)


@dataclass
class Table:
    """beside: {what was not trained: {column label: its test score, None if undefined}}: always answering the most frequent
    class; the base as it came."""

    spec: Spec
    rows: list[Row]
    beside: dict[str, dict[str, float | None]]
    notes: list[str]
    left_out: list[str]

    def missing(self) -> Iterator[str]:
        """Commands that run the listed seeds which a selected point lacks: tune on one seed, then score on all."""
        wanted = self.spec.seeds if isinstance(self.spec.seeds, tuple) else ()
        for made in (c for row in self.rows for c in row.cells.values() if c.point):
            if absent := [str(seed) for seed in wanted if seed not in made.seen]:
                words = [w for w in shlex.split(made.command) if not w.startswith("seed=")]
                yield shlex.join([*words[:2], "-m", *words[2:], f"seed={','.join(absent)}"])

    def commands(self) -> Iterator[tuple[Row, str, str]]:
        """(row, column label, command that makes one of its runs again)."""
        for row in self.rows:
            for label, made in row.cells.items():
                if made.command:
                    yield row, label, made.command


def build(spec: Spec, results: str | Path, scratch: bool = False) -> Table:
    """Raises UserError where there are no records, or such as must not stand in one table."""
    runs, left_out = gather(spec, Path(results), scratch)
    mixed = fair.check(spec, runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(fair.label_of(spec, run), []).append(run)
    order = spec.rows or sorted({run.record["variant"] for run in runs})
    expected = _expected(spec, groups)
    rows = []
    for variant in order:
        own = [label for label in groups if groups[label][0].record["variant"] == variant]
        for label in sorted(own, key=lambda label: _by_number(spec, groups[label][0])) or [variant]:
            rows.append(_row(label, variant, groups.get(label, []), spec, expected))
    ranked = _mark(spec, rows)
    table = Table(spec, rows, _beside(spec, runs), [], left_out)
    table.notes = notes(table, runs, mixed, ranked)
    return table


def gather(spec: Spec, results: Path, scratch: bool) -> tuple[list[Run], list[str]]:
    """The records that the spec asks for, each id once, and a line for every file that was left out."""
    found: list[Run] = []
    left_out: list[str] = []
    for place in ("runs", "scratch") if scratch else ("runs",):
        for experiment in spec.experiments:
            records, broken = read_all(results / place / experiment)
            left_out += broken
            for path, record in records.items():
                where = path.relative_to(results).as_posix()
                if place == "runs" and is_scratch(record) and not scratch:
                    left_out.append(f"{where} is a failed run or one of changed code: read by --with-scratch only")
                else:
                    found.append(Run(record, where, place == "scratch" or is_scratch(record)))
    known = {key for run in found for key in run.settings}
    for key, _ in spec.where if found else ():
        if key not in known:
            raise UserError(f"table {spec.name}: no record has a setting {key!r}; {nearest(key, known)}")
    tasks = {column.task for column in spec.tasks}
    listed = {*spec.seeds, *spec.select.seeds} if isinstance(spec.seeds, tuple) else set()
    runs = [run for run in found if run.record["task"] in tasks
            and (not spec.rows or run.record["variant"] in spec.rows)
            and (not spec.model or run.record["model"] == spec.model)
            and (not listed or run.record["seed"] in listed)
            and all(run.settings.get(key) == value for key, value in spec.where)]  # fmt: skip
    if not runs:
        raise UserError(_nothing(spec, results, len(found)))
    return _once(runs), left_out


def _once(runs: list[Run]) -> list[Run]:
    """One run an id. A committed record goes before one in scratch, a finished one before a failed one; two that are
    still equal must agree in their metrics, and the first by path stands."""
    kept: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (run.scratch, run.record["status"] == "failed", run.where)):
        first = kept.setdefault(run.record["id"], run)
        alike = (first.scratch, first.record["status"] == "failed") == (run.scratch, run.record["status"] == "failed")
        if alike and first.record.get("metrics") != run.record.get("metrics"):
            raise UserError(f"{first.where} and {run.where} have one id and different metrics: delete the wrong one")
    return sorted(kept.values(), key=lambda run: run.where)


def _nothing(spec: Spec, results: Path, other: int) -> str:
    if other:
        return f"table {spec.name}: none of {other} records is of its tasks, rows, model, seeds and `where`"
    what = f"table {spec.name}: no records under {results / 'runs' / spec.experiments[0]}"
    if any(next((results / "scratch" / name).rglob("*.json"), None) for name in spec.experiments):
        return f"{what}; there are some of failed runs or changed code: --with-scratch"
    there = sorted({path.parents[1].name for path in (results / "runs").glob("*/*/*.json")} - set(spec.experiments))
    near = nearest(spec.experiments[0], there) if there else "there are none at all; `lorafactory run` makes them"
    return f"{what}; {near}"


def _expected(spec: Spec, groups: dict[str, list[Run]]) -> int:
    if spec.seeds:
        return len(spec.seeds) if isinstance(spec.seeds, tuple) else spec.seeds
    cells: dict[tuple[str, str], set[int]] = {}
    for label, runs in groups.items():
        for run in runs:
            cells.setdefault((label, run.record["task"]), set()).add(run.record["seed"])
    return max(len(seeds) for seeds in cells.values())


def _row(label: str, variant: str, runs: list[Run], spec: Spec, expected: int) -> Row:
    cells = {}
    for column in spec.tasks:
        cells[column.label] = cell([r for r in runs if r.record["task"] == column.task], column, spec, expected)
    row = Row(label, variant, cells)
    row.sick = {kind: n for kind in SICK if (n := sum(c.sick.get(kind, 0) for c in cells.values()))}
    if spec.mean and len(cells) > 1:
        row.mean = across(list(cells.values()))
    for name in spec.costs:
        row.costs[name] = across(list(cells.values()), lambda c, name=name: c.costs.get(name, {}))  # type: ignore[misc]
    return row


def _by_number(spec: Spec, run: Run) -> list[tuple[bool, Any]]:
    values = [run.settings.get(key) for key in spec.split]
    return [(not isinstance(v, int | float), v if isinstance(v, int | float) else str(v)) for v in values]


def _mark(spec: Spec, rows: list[Row]) -> list[str]:
    """Sets untuned and bold; returns what is to be said of each column's ranking."""
    said = []
    columns = {label: {row.label: row.cells[label] for row in rows} for label in (c.label for c in spec.tasks)}
    for cells in columns.values():
        most = max(c.tried for c in cells.values())
        for c in cells.values():
            c.untuned = c.tried == 1 < most
    means = {row.label: row.mean for row in rows if row.mean is not None}
    if spec.bold:
        for label, cells in (*columns.items(), *([("mean", means)] if means else [])):
            said.append(f"{label}: {fair.rank(cells, spec.bold)}.")
    return said


def _beside(spec: Spec, runs: list[Run]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for column in spec.tasks:
        for run in runs:
            if run.record["task"] == column.task and run.record["status"] == "ok":
                metrics = run.record["metrics"]
                name = metrics["primary"] if column.metric == "primary" else column.metric
                lines = {"(majority class)": run.record["data"].get("majority"), "(untrained)": metrics.get("untrained")}
                for line, scores in lines.items():
                    if scores and name in scores:
                        found.setdefault(line, {})[column.label] = scores[name]
                break
    return found
