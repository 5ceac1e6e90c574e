"""Whether the rows of a table may be compared: nothing mixed, every method acted, and who is really better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import Any

from ..errors import UserError
from ..registry import nearest
from .cells import Cell, Run
from .spec import Spec

TIMED = ("seconds", "train_seconds", "steps_per_second", "peak_bytes")  # costs that depend on the processor
FEWEST = 3  # seeds of a paired test: two scores on a finite test split agree too easily
# What must be one thing in the whole table, and the records' word for it. `allow_mixed` lists exceptions: one of these
# names, `data`, `method`, or a setting (train.steps) or group of settings (train).
FACETS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "device": lambda record: record["environment"].get("device"),
    "cpu": lambda record: record["environment"].get("cpu"),
    "threads": lambda record: record["environment"].get("threads"),
    "packages": lambda record: " ".join(
        f"{name} {record['environment'].get('packages', {}).get(name)}" for name in ("torch", "transformers")
    ),
    "base": lambda record: " ".join(
        str(record["base"][key]) for key in ("fingerprint", "dtype", "processor") if key in record["base"]
    ),
    "kernels": lambda record: (record.get("kernels") or {}).get("chosen", "auto"),
}


def check(spec: Spec, runs: list[Run]) -> list[str]:
    """Raises UserError if the runs must not stand in one table; returns a line a mixture that the spec allows."""
    known = {key for run in runs for key in run.settings}
    _spelled(spec, known)
    done = [run for run in runs if run.record["status"] == "ok"]
    timed = any(name in TIMED for name in spec.costs)
    notes = []
    for facet, read in FACETS.items():
        if timed or facet not in ("cpu", "threads"):
            notes += _one(spec, facet, f"the table mixes {facet}", [(run, read(run.record)) for run in done])
    for task in dict.fromkeys(column.task for column in spec.tasks):
        same = [run for run in runs if run.record["task"] == task]
        finished = [run for run in done if run.record["task"] == task]
        notes += _one(spec, "data", f"{task} mixes data", [(run, _data(run.record)) for run in finished])
        shared = {key for run in same for key in run.settings if not key.startswith("variant.")}
        notes += _settings(spec, f"{task}: rows were trained under different rules", same, shared)
    for label in dict.fromkeys(label_of(spec, run) for run in runs):
        own = [run for run in runs if label_of(spec, run) == label]
        mine = {key for run in own for key in run.settings if key.startswith("variant.")}
        notes += _settings(spec, f"row {label} mixes settings", own, mine)
    if "method" not in spec.allow_mixed:
        for run in done:
            _acted(run)
    return notes


def label_of(spec: Spec, run: Run) -> str:
    """What the run's row is called: the variant, and the settings that split it into rows."""
    parts = [f"{key.rpartition('.')[2]}={run.settings[key]}" for key in spec.split if key in run.settings]
    return " ".join([run.record["variant"], *parts])


def _data(record: dict[str, Any]) -> Any:
    return {key: record["data"].get(key) for key in ("fingerprint", "sizes")}


def _settings(spec: Spec, what: str, runs: list[Run], keys: Iterable[str]) -> list[str]:
    notes = []
    for key in sorted(set(keys) - set(spec.settings())):
        allowed = next((a for a in spec.allow_mixed if key == a or key.startswith(f"{a}.")), key)
        notes += _one(spec, allowed, f"{what}: {key}", [(run, run.settings.get(key)) for run in runs])
    return notes


def _one(spec: Spec, facet: str, what: str, seen: list[tuple[Run, Any]]) -> list[str]:
    found: dict[str, Run] = {}
    for run, value in seen:
        found.setdefault(str(value), run)
    if len(found) < 2:
        return []
    told = ", ".join(sorted(found))
    if facet in spec.allow_mixed:
        return [f"{what}: {told} (the spec allows it)"]
    one, other = (found[key].where for key in sorted(found)[:2])
    cure = "make them alike, choose by `where` or `model`, divide by `split`, or list it under select.over"
    raise UserError(f"{what}: {told} ({one}, {other}): {cure}, or `allow_mixed: [{facet}]`")


def _acted(run: Run) -> None:
    """A method that counts what it does, and did nothing, is not the method that the row claims."""
    counters = run.record["optimizer"].get("method") or {}
    numbers = [n for n in counters.values() if isinstance(n, int | float) and not isinstance(n, bool)]
    if numbers and not any(numbers):
        told = ", ".join(f"{key} {n}" for key, n in counters.items())
        raise UserError(f"{run.record['variant']} never acted ({told}) in {run.where}: train longer or change its "
                        "settings, or `allow_mixed: [method]`")  # fmt: skip


def _spelled(spec: Spec, known: set[str]) -> None:
    """Every setting that the spec names is one of the records'."""
    groups = {key[:i] for key in known for i, letter in enumerate(key) if letter == "."}
    for key in (*spec.select.over, *spec.split):
        if key not in known:
            raise UserError(f"table {spec.name}: no record has a setting {key!r}; {nearest(key, known)}")
    for key in spec.allow_mixed:
        if key not in {*FACETS, "data", "method"} | known | groups:
            raise UserError(f"table {spec.name}: allow_mixed cannot name {key!r}; "
                            f"{nearest(key, {*FACETS, 'data', 'method'} | known)}")  # fmt: skip


def paired(one: dict[int, float], other: dict[int, float]) -> float:
    """Two-sided p of a paired t-test over the seeds that both have. 1 where it can say nothing: fewer than FEWEST
    seeds, or differences that are all equal (on a test split of a few hundred rows that is chance, not certainty)."""
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if len(differences) < FEWEST or max(differences) - min(differences) < 1e-12:
        return 1.0
    from scipy.special import stdtr

    n = len(differences)
    t = fmean(differences) / (stdev(differences) / math.sqrt(n))
    return 2 * float(stdtr(n - 1, -abs(t)))


def holm(ps: list[float]) -> list[float]:
    """Adjusted for as many comparisons as there are (Holm 1979)."""
    adjusted, least = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - place) * ps[i]))
        adjusted[i] = least
    return adjusted


def rank(cells: dict[str, Cell], level: float) -> str:
    """Mark the best row bold if it differs from every other row by `paired` under `holm`; else say why not."""
    scored = {label: cell for label, cell in cells.items() if cell.values}
    if len({cell.tried for cell in scored.values() if cell.tried}) > 1:
        return "no row is ranked: tuning budgets differ"
    if len(scored) < 2:
        return "no row is ranked: nothing to compare"
    best = max(scored, key=lambda label: (scored[label].mean, label))
    others = [label for label in scored if label != best]
    seeds = min(len(scored[best].values.keys() & scored[label].values.keys()) for label in others)
    if seeds < FEWEST:
        return f"no row is ranked: {seeds} shared seeds, a paired test takes {FEWEST}"
    adjusted = holm([paired(scored[best].values, scored[label].values) for label in others])
    worst = max(range(len(others)), key=lambda i: (adjusted[i], others[i]))
    scored[best].bold = adjusted[worst] < level
    if scored[best].bold:
        return f"{best} is ahead of every other row (adjusted p ≤ {adjusted[worst]:.2g})"
    return f"no row is bold: {best} is not told apart from {others[worst]} (adjusted p {adjusted[worst]:.2g})"
