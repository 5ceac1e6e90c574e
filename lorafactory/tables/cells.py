"""From records to cells: which point of the grid a row is given, and which runs count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from ..errors import UserError
from ..record import settings
from ..registry import nearest
from .spec import Select, Spec, TaskColumn

SICK = ("diverged", "failed", "collapsed", "undefined")  # counted, never averaged


@dataclass
class Run:
    """A record and what the table needs of it again and again. settings: {dotted key: value}, as in its id."""

    record: dict[str, Any]
    where: str
    scratch: bool = False
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = settings(self.record["config"])

    def point(self, over: Iterable[str]) -> tuple[Any, ...]:
        return tuple(self.settings.get(key) for key in over)


@dataclass
class Cell:
    """values: {seed: score} of the healthy runs at the selected point; seen: all seeds run there. sick: {kind: how many}
    over all points tried. edge: settings whose selected value is the outermost one tried. costs: {name: {seed: value}}
    of the same runs."""

    values: dict[int, float] = field(default_factory=dict)
    expected: int = 0
    point: dict[str, Any] = field(default_factory=dict)
    tried: int = 0
    edge: tuple[str, ...] = ()
    untuned: bool = False
    bold: bool = False
    sick: dict[str, int] = field(default_factory=dict)
    costs: dict[str, dict[int, float]] = field(default_factory=dict)
    command: str = ""
    seen: frozenset[int] = frozenset()

    @property
    def mean(self) -> float | None:
        return fmean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


def state(run: Run, select: Select, metric: str) -> str:
    """ok, or one of SICK. collapsed: it answers the same for every row; undefined: its metric has no value there."""
    if run.record["status"] != "ok":
        return run.record["status"]
    chosen, scored = value(run, "selection", select.by), value(run, "test", metric)
    if any(run.record["metrics"][split].get("constant_prediction") for split in ("selection", "test")):
        return "collapsed"
    return "undefined" if chosen is None or scored is None else "ok"


def value(run: Run, split: str, metric: str) -> float | None:
    """The metric of a finished run. Raises UserError if the task does not have it."""
    metrics = run.record["metrics"]
    own = metrics.get("selects", metrics["primary"]) if split == "selection" else metrics["primary"]
    name = own if metric == "primary" else metric
    if name not in metrics[split]:
        known = [key for key, item in metrics[split].items() if not isinstance(item, bool | str)]
        raise UserError(f"{run.record['task']} has no metric {name!r} on {split}; {nearest(name, known)} ({run.where})")
    return metrics[split][name]


def cell(runs: list[Run], column: TaskColumn, spec: Spec, expected: int) -> Cell:
    """The cell of one row and task."""
    points: dict[tuple[Any, ...], dict[int, Run]] = {}
    for run in runs:
        seeds = points.setdefault(run.point(spec.select.over), {})
        seed = run.record["seed"]
        if seed in seeds:
            both = f"{seeds[seed].where} and {run.where} are two runs of one cell and seed"
            raise UserError(f"{both}; tell them apart by `where`, `split` or `select.over`")
        seeds[seed] = run
    states = {run.where: state(run, spec.select, column.metric) for run in runs}
    made = Cell(expected=expected, tried=len(points))
    made.sick = {kind: count for kind, count in sorted(Counter(states.values()).items()) if kind != "ok"}

    def healthy(seeds: dict[int, Run]) -> dict[int, Run]:
        return {seed: run for seed, run in sorted(seeds.items()) if states[run.where] == "ok"}

    best = _best({point: healthy(seeds) for point, seeds in points.items()}, spec)
    if best is None:
        made.command = min(runs, key=lambda run: (run.record["seed"], run.where)).record["command"] if runs else ""
        return made
    chosen = healthy(points[best])
    wanted = spec.seeds if isinstance(spec.seeds, tuple) else chosen
    chosen = {seed: run for seed, run in chosen.items() if seed in wanted}
    made.values = {seed: value(run, "test", column.metric) or 0.0 for seed, run in chosen.items()}
    made.seen = frozenset(points[best])
    made.point = dict(zip(spec.select.over, best, strict=True))
    made.edge = tuple(key for i, key in enumerate(spec.select.over) if _outermost(best[i], {p[i] for p in points}))
    made.costs = {name: _costs(chosen, name) for name in dict.fromkeys((*spec.costs, spec.plot)) if name}
    made.command = next(iter(healthy(points[best]).values())).record["command"]
    return made


def _best(points: dict[tuple[Any, ...], dict[int, Run]], spec: Spec) -> tuple[Any, ...] | None:
    """Most healthy seeds first, then the best mean on the selection split: a point whose bad seeds fell away must not
    win by the good ones that are left. Ties go to the smaller point."""
    select, sign = spec.select, 1 if spec.select.mode == "max" else -1
    among = select.seeds or (spec.seeds if isinstance(spec.seeds, tuple) else ())

    def rank(point: tuple[Any, ...]) -> tuple[int, float]:
        scores = [value(run, "selection", select.by) or 0.0 for seed, run in points[point].items()
                  if not among or seed in among]  # fmt: skip
        return len(scores), sign * fmean(scores) if scores else 0.0

    ordered = sorted((p for p in points if rank(p)[0]), key=lambda p: [_order(v) for v in p])
    return max(ordered, key=rank) if ordered else None


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number, value if number else 0.0, str(value)


def _outermost(chosen: Any, tried: set[Any]) -> bool:
    numbers = {v for v in tried if isinstance(v, int | float) and not isinstance(v, bool)}
    return len(numbers) > 1 and chosen in (min(numbers), max(numbers))


def _costs(runs: dict[int, Run], name: str) -> dict[int, float]:
    found = {}
    for seed, run in runs.items():
        cost = run.record["cost"]
        if name not in cost:
            raise UserError(f"no cost {name!r}; {nearest(name, cost)} ({run.where})")
        if cost[name] is not None:
            found[seed] = float(cost[name])
    return found


def across(cells: list[Cell], read: Callable[[Cell], dict[int, float]] = lambda cell: cell.values) -> Cell:
    """The mean over a row's tasks, seed by seed, for the seeds that all of them share; empty if one task has none."""
    values = [read(cell) for cell in cells]
    shared = set.intersection(*map(set, values)) if values else set()
    made = Cell({seed: fmean(v[seed] for v in values) for seed in sorted(shared)})
    made.expected = max((cell.expected for cell in cells), default=0)
    made.tried = sum(cell.tried for cell in cells)
    return made
