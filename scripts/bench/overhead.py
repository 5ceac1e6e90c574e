"""Step time and peak memory of every variant beside the bare model and beside PEFT's same variant.

    python scripts/bench/overhead.py --out results/bench

Writes overhead.md and overhead.json. A step is forward, backward and optimiser step on a batch of 16 x 48 tokens. The
sides of a variant live in one process and take turns, so that a machine that slows down slows them all; each side's
memory is measured in a process of its own. A variant that fails is listed with its error, and the exit status is 1."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _peft
import _sides
import torch

from lorafactory import registry
from lorafactory.environment import environment
from lorafactory.files import write_whole
from lorafactory.memory import Peak

WARM = 2  # untimed steps of each side, first
FLAGS = ("amx_bf16", "avx512f", "avx2", "neon")


def base(name: str) -> Any:
    """The preset's model with a head of two classes, in memory of its own."""
    from lorafactory import describe, models

    models._loaded.clear()
    return describe.base_model(name)


def side(which: str, model: Any, spelling: str, rank: int, total: int) -> _sides.Side:
    if which == "bare":
        return _sides.bare(model)
    config = _sides.config_of(spelling, rank)
    if which == "ours":
        return _sides.ours(model, config, total)
    return _peft.theirs(model, spelling, config, _sides.layers(model, config), total)


def times(model: str, spelling: str, rank: int, rounds: int) -> dict[str, Any]:
    """Per side the seconds of each round, taken in turns; the order turns round too."""
    which = ["bare", "ours", *(["theirs"] if spelling in _peft.COUNTERPARTS else [])]
    made = {w: side(w, base(model), spelling, rank, WARM + rounds) for w in which}
    data = _sides.batches(base(model))
    seconds: dict[str, list[float]] = {w: [] for w in which}
    for i in range(WARM + rounds):
        for w in which[i % len(which) :] + which[: i % len(which)]:
            began = time.perf_counter()
            made[w].step(data[i % len(data)])
            seconds[w].append(time.perf_counter() - began)
    return {"seconds": {w: s[WARM:] for w, s in seconds.items()}, "trainable": {w: made[w].trainable for w in which}}


def memory(model: str, which: str, spelling: str, rank: int, steps: int = 4) -> int:
    """Bytes at the peak of a few steps beyond the loaded base; run this in a process that did nothing else."""
    loaded = base(model)
    data = _sides.batches(loaded, steps)
    peak = Peak(torch.device("cpu"))
    made = side(which, loaded, spelling, rank, steps)
    for batch in data:
        made.step(batch)
    return peak.read() or 0


def apart(model: str, which: str, spelling: str, rank: int) -> int:
    """memory() in a child."""
    call = [sys.executable, __file__, "--model", model, "--rank", str(rank), "--child", which, spelling]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return int(done.stdout.split()[-1])


def measured(model: str, spelling: str, rank: int, rounds: int) -> dict[str, Any]:
    row = {"variant": spelling, **times(model, spelling, rank, rounds)}
    row["bytes"] = {w: apart(model, w, spelling, rank) for w in row["seconds"]}
    row["counterpart"] = _peft.COUNTERPARTS.get(spelling, ("", None))[0]
    return row


def ratio(row: dict[str, Any], other: str) -> tuple[float, float, float] | None:
    """(median, 10 %, 90 %) of ours / other, round by round."""
    if other not in row["seconds"]:
        return None
    found = sorted(a / b for a, b in zip(row["seconds"]["ours"], row["seconds"][other], strict=True))
    cut = len(found) // 10
    return statistics.median(found), found[cut], found[-1 - cut]


def page(result: dict[str, Any]) -> str:
    env, rows = result["environment"], result["rows"]
    lines = [
        "# Overhead of every variant",
        "",
        f"{result['model']}, batch {_sides.ROWS} x {_sides.TOKENS} tokens, float32, rank {result['rank']} where there is one, "
        "all linear layers unless the variant has targets of its own, AdamW.",
        "",
        f"{env['cpu']} ({', '.join(result['instructions']) or 'no matrix instructions named'}), {env['threads']} threads, "
        f"torch {env['packages']['torch']}, peft {env['packages'].get('peft', '-')}, commit {env['commit']}"
        f"{' with changes' if env['dirty'] else ''}.",
        "",
        f"Step: time of ours as a ratio, median of {result['rounds']} rounds in which the sides take turns, 10 % and 90 % in "
        "brackets; below 1 ours is faster. *bare*: the model training its head alone. Memory: peak over a few steps beyond the "
        "loaded base, each side in a process of its own.",
        "",
        "| variant | trainable | step / bare | counterpart | step / counterpart | memory | counterpart's memory |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    slower = []
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['variant']} | failed: {row['error']} | | | | | |")
            continue
        against = ratio(row, "theirs")
        if against is not None and against[0] > 1:
            slower.append(f"{row['variant']} ({against[0]:.2f})")
        cells = [
            row["variant"], f"{row['trainable']['ours']:,}", _shown(ratio(row, "bare")), row["counterpart"] or "–",
            _shown(against), _mib(row["bytes"].get("ours")), _mib(row["bytes"].get("theirs")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    bare = [row["bytes"]["bare"] for row in rows if "bytes" in row]
    lines += ["", f"The bare model takes {_mib(int(statistics.median(bare))) if bare else '–'}.", ""]
    lines += [f"Slower than the counterpart by the median: {', '.join(slower) or 'none'}."]
    return "\n".join([*lines, "", "Again: `python scripts/bench/overhead.py --out results/bench`.", ""])


def _shown(found: tuple[float, float, float] | None) -> str:
    return "–" if found is None else f"{found[0]:.2f} ({found[1]:.2f}–{found[2]:.2f})"


def _mib(found: int | None) -> str:
    return "–" if found is None else f"{found / 2**20:.0f} MiB"


def instructions() -> list[str]:
    found = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return [f for f in FLAGS if re.search(rf"\b{f}\b", found)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--variants", default="", help="comma-separated; default: every name, and dora+pissa")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "VARIANT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if chosen.child:
        print(memory(chosen.model, *chosen.child, chosen.rank))
        return 0
    rows = []
    for spelling in chosen.variants.split(",") if chosen.variants else [*registry.names(), "dora+pissa"]:
        try:
            rows.append(measured(chosen.model, spelling, chosen.rank, chosen.rounds))
        except Exception as e:  # one variant that cannot run is a row of the table, not the end of it
            rows.append({"variant": spelling, "error": f"{type(e).__name__}: {e}"})
        print(f"{spelling}: {rows[-1].get('error') or _shown(ratio(rows[-1], 'theirs') or ratio(rows[-1], 'bare'))}", flush=True)
    result = {
        "model": chosen.model, "rank": chosen.rank, "rounds": chosen.rounds, "instructions": instructions(),
        "environment": environment(), "rows": rows,
    }  # fmt: skip
    write_whole(chosen.out / "overhead.json", (json.dumps(result, indent=1) + "\n").encode())
    write_whole(chosen.out / "overhead.md", page(result).encode())
    print(chosen.out / "overhead.md")
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
