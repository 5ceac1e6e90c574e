"""Training-step time and peak memory of every variant beside the bare model and PEFT's same variant.

    python scripts/bench/overhead.py [--model minilm] [--variants lora,dora+pissa] [--batch 16x48] [--rounds 20]
                                     [--out results/bench]

Writes overhead.md and overhead.json; of another model than MiniLM, overhead_<model>.md and .json. Exit status: 0; 1 if a
variant failed (it is in the table); 2 for a wrong call. Stop it at will: every row is written as it is measured, and a
call with the same settings, code and machine goes on from there."""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _main import call, said, write
from _measure import STEPS, WARMUP, Apart, alternate, hush, make, started
from _page import page
from _peft import COUNTERPARTS
from _sides import ADAMW, ROWS, TOKENS, Side, batches, config_of, layers

from lorafactory import describe, registry
from lorafactory.environment import environment
from lorafactory.errors import UserError

COMPOSITES = ("dora+pissa",)
LONG = 60  # seconds: a start that searches is not made once more for the dense form


def spread(values: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"median": statistics.median(values), "low": cuts[0], "high": cuts[-1]}


def ratios(a: list[float], b: list[float]) -> dict[str, float]:
    """Of the two steps of each round."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def timed(base: Any, plain: dict[str, Side], spelling: str, c: argparse.Namespace) -> dict[str, Any]:
    """One variant's sides in turn with the plain ones."""
    wanted = ["ours", "dense", *(["theirs"] if spelling in COUNTERPARTS else [])]
    sides: dict[str, tuple[Side, float]] = {}
    for name in wanted:
        if name == "dense" and sides["ours"][1] > LONG:
            continue
        side, seconds_ = started(name, base, spelling, c.rank, c.rounds)
        if side is not None:
            sides[name] = side, seconds_
    steps = {name: side.step for name, side in plain.items()} | {name: side.step for name, (side, _) in sides.items()}
    seconds = alternate(steps, batches(base, c.batch), c.rounds)
    return {
        "layers": len(layers(base, config_of(spelling, c.rank))),
        "trainable": {name: side.trainable for name, (side, _) in sides.items()},
        "start_seconds": {name: s for name, (_, s) in sides.items()},
        "step_seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "time": {name: ratios(seconds["ours"], seconds[name]) for name in steps if name != "ours"},
    }


def weighed(apart: Apart, spelling: str, c: argparse.Namespace, bare: int) -> dict[str, Any]:
    sides = ["ours", *(["theirs"] if spelling in COUNTERPARTS else [])]
    peaks = {"bare": bare, **{side: apart.peak(side, c.model, spelling, c.rank, c.batch) for side in sides}}
    return {"peak_bytes": peaks, "memory": {k: peaks["ours"] / v for k, v in peaks.items() if k != "ours"}}


def measure(spellings: list[str], c: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """One row a variant, after those that there are; one that fails has an `error` instead of numbers."""
    base = describe.base_model(c.model)
    plain = {side: make(side, copy.deepcopy(base), "", c.rank, 0) for side in ("bare", "norms")}
    left = [s for s in spellings if s not in {r["variant"] for r in rows}]
    with Apart() as apart:
        least = apart.peak("bare", c.model, "", c.rank, c.batch) if left else 0
        all_rows = len(rows) + len(left)
        for spelling in left:
            print(f"{len(rows) + 1}/{all_rows} {spelling}", file=sys.stderr, flush=True)
            row: dict[str, Any] = {"variant": spelling}
            if spelling in COUNTERPARTS:
                row["counterpart"], row["note"] = COUNTERPARTS[spelling].label, COUNTERPARTS[spelling].note
            try:
                row |= timed(base, plain, spelling, c) | weighed(apart, spelling, c, least)
            except Exception as e:  # whatever a variant raises: it is shown, and the others are measured
                row["error"] = f"{type(e).__name__}: {' '.join(str(e).split())}"
                print(f"  {row['error']}", file=sys.stderr)
            rows = [*rows, row]
            yield rows


def earlier(file: Path, settings: dict[str, Any], environment: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a stopped call left, if it was this one's: same settings, code and machine."""
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    ran = found["environment"]
    same = all(found["settings"].get(k) == v for k, v in settings.items() if k != "load_before")
    return found["rows"] if same and ran == environment | {"commit": ran["commit"], "dirty": ran["dirty"]} else []


def default_variants() -> list[str]:
    """Every registered name by axis, and the composites."""
    return [n for axis in registry.AXES for n in registry.names(axis)] + list(COMPOSITES)


def batch(given: str) -> tuple[int, int]:
    rows, tokens = map(int, given.split("x"))
    if rows < 1 or tokens < 1:
        raise ValueError
    return rows, tokens


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="preset of configs/model with a text classification head")
    parser.add_argument("--variants", default="", help="spellings, comma-separated (default: all names and dora+pissa)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=batch, default=(ROWS, TOKENS), help=f"rows x tokens (default: {ROWS}x{TOKENS})")
    parser.add_argument("--rounds", type=int, default=20, help=f"that count, after {WARMUP} that do not")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 5:
        raise UserError(f"--rounds {chosen.rounds}: a spread needs at least 5")
    return chosen


def main(arguments: list[str]) -> int:
    chosen = parse(arguments)
    hush()
    registry.discover()
    spellings = [s for s in chosen.variants.split(",") if s] or default_variants()
    for spelling in spellings:
        config_of(spelling, chosen.rank)
    settings = {"model": chosen.model, "rank": chosen.rank, "rounds": chosen.rounds, "warmup": WARMUP, "steps": STEPS,
                "batch": list(chosen.batch), "optimizer": ADAMW, "load_before": os.getloadavg()[0]}  # fmt: skip
    name = "overhead" if chosen.model == "minilm" else f"overhead_{Path(chosen.model).name}"
    found = {"schema": 1, "command": said("overhead", arguments), "settings": settings,
             "environment": about()}  # fmt: skip
    rows = before = earlier(chosen.out / f"{name}.json", settings, found["environment"])
    for rows in measure(spellings, chosen, before):
        write(chosen.out, name, {**found, "rows": rows}, page({**found, "rows": rows}))
    print(f"wrote {chosen.out / name}.md and {name}.json")
    return int(any("error" in r for r in rows))


def about() -> dict[str, Any]:
    """Where it was measured: as a record has it, and the processor's matrix instructions."""
    flags = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), "").split()
    wide = sorted(f for f in flags if f.startswith(("amx", "avx2", "avx512", "avx_vnni")))
    return environment() | {"matrix_instructions": wide}


if __name__ == "__main__":
    call(main)
