"""A sparse weight's gradient on a processor: at its places alone, and picked out of the dense product, in random order.

    python scripts/bench/sampled.py [--sizes 384,768,2048] [--shares 0.01,0.02,0.05,0.1] [--rounds 9] [--out results/bench]

Writes sampled.md and sampled.json. Exit status: 0; 2 for a wrong call."""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from _main import call, machine, said, write
from _measure import alternate
from overhead import about

from lorafactory import kernels
from lorafactory.errors import UserError

POSITIONS = 768  # 16 rows of 48 tokens


def dense(g: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return (g.T @ x)[rows, columns]


FORMS = {"ours": kernels.sampled, "dense": dense}


def row(d: int, share: float, rounds: int) -> dict[str, Any]:
    flat = torch.randperm(d * d)[: round(share * d * d)].sort().values
    given = torch.randn(POSITIONS, d), torch.randn(POSITIONS, d), flat // d, flat % d
    exact = dense(given[0].double(), given[1].double(), *given[2:])
    errors = {n: float((f(*given).double() - exact).norm() / exact.norm()) for n, f in FORMS.items()}
    found = alternate({n: lambda x, f=f: f(*x) for n, f in FORMS.items()}, [given], rounds)
    ratio = statistics.median(o / t for o, t in zip(found["ours"], found["dense"], strict=True))
    return {"d": d, "share": share, "error": errors, "seconds": {n: statistics.median(s) for n, s in found.items()},
            "ratio": ratio}  # fmt: skip


def page(found: dict[str, Any]) -> str:
    lines = ["# The gradient of a sparse weight at its places", "",
             f"Written by `{found['command']}`. A share of the entries of g^T x [d, d], g and x [{POSITIONS}, d], float32. "
             f"Medians of {found['rounds']} rounds, each in another order; a ratio is the median of the rounds' ratios, below 1 "
             "where ours is faster. Error: by norm, against float64.", "",
             *machine(found), "",
             "| d | share | ours, ms | dense, ms | / dense | error, ours | dense |",
             "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for r in found["rows"]:
        ms = " | ".join(f"{r['seconds'][n] * 1e3:.2f}" for n in FORMS)
        errors = " | ".join(f"{r['error'][n]:.0e}" for n in FORMS)
        lines.append(f"| {r['d']} | {r['share']:g} | {ms} | {r['ratio']:.2f} | {errors} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="384,768,2048")
    parser.add_argument("--shares", default="0.01,0.02,0.05,0.1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 3:
        raise UserError(f"--rounds {chosen.rounds}: a median needs at least 3")
    load = os.getloadavg()[0]
    torch.manual_seed(0)
    sizes, shares = [int(n) for n in chosen.sizes.split(",")], [float(s) for s in chosen.shares.split(",")]
    rows = [row(d, s, chosen.rounds) for d in sizes for s in shares]
    command = said("sampled", arguments)
    found = {"schema": 1, "command": command, "environment": about(), "load": load, "threads": torch.get_num_threads(),
             "rounds": chosen.rounds, "rows": rows}  # fmt: skip
    write(chosen.out, "sampled", found, page(found))
    print(page(found))
    return 0


if __name__ == "__main__":
    call(main)
