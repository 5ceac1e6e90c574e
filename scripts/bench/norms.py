"""The norms of W + B A's rows on a processor: ours, PEFT's way and the dense product, in random order.

    python scripts/bench/norms.py [--sizes 768,2048,4096] [--ranks 8,64,384] [--rounds 7] [--out results/bench]

Writes norms.md and norms.json. Exit status: 0; 2 for a wrong call."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _norms
import torch
from _main import call, machine, said, write
from _measure import alternate
from overhead import about

from lorafactory import kernels
from lorafactory.errors import UserError


@torch.no_grad()
def dense(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.norm(torch.addmm(w.to(a.dtype), b, a), dim=1)


@torch.no_grad()
def ours(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return kernels.sqnorm(w, a, b).sqrt()


FORMS: dict[str, Callable] = {"ours": ours, "dense": dense, "PEFT": torch.no_grad()(_norms.peft)}


def row(d: int, rank: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    w = (torch.randn(d, d) * 0.02).to(dtype)
    a, b = torch.randn(rank, d) * d**-0.5, torch.randn(d, rank) * 0.02
    exact = (w.double() + b.double() @ a.double()).norm(dim=1)
    errors = {n: float(((f(w, a, b).double() - exact) / exact).abs().max()) for n, f in FORMS.items()}
    found = alternate({n: lambda x, f=f: f(*x) for n, f in FORMS.items()}, [(w, a, b)], rounds)
    ratios = {n: statistics.median(o / t for o, t in zip(found["ours"], found[n], strict=True)) for n in ("dense", "PEFT")}
    return {"d": d, "rank": rank, "dtype": str(dtype).removeprefix("torch."), "error": errors,
            "seconds": {n: statistics.median(s) for n, s in found.items()}, "ratio": ratios}  # fmt: skip


def page(found: dict[str, Any]) -> str:
    lines = ["# The norms of the rows of W + B A", "",
             f"Written by `{found['command']}`. W [d, d] in the dtype named, B and A in float32. Medians of {found['rounds']} "
             "rounds, each in another order; a ratio is the median of the rounds' ratios, below 1 where ours is faster. "
             "Error: the largest of a row, relative, against float64.", "",
             *machine(found), "",
             "| W | d | rank | ours, ms | dense, ms | PEFT, ms | / dense | / PEFT | error, ours | dense | PEFT |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for r in found["rows"]:
        ms = " | ".join(f"{r['seconds'][n] * 1e3:.2f}" for n in FORMS)
        errors = " | ".join(f"{r['error'][n]:.0e}" for n in FORMS)
        ratios = f"{r['ratio']['dense']:.2f} | {r['ratio']['PEFT']:.2f}"
        lines.append(f"| {r['dtype']} | {r['d']} | {r['rank']} | {ms} | {ratios} | {errors} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="768,2048,4096")
    parser.add_argument("--ranks", default="8,64,384")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 3:
        raise UserError(f"--rounds {chosen.rounds}: a median needs at least 3")
    sizes, ranks = ([int(n) for n in text.split(",")] for text in (chosen.sizes, chosen.ranks))
    load = os.getloadavg()[0]
    rows = [row(d, r, t, chosen.rounds) for t in (torch.float32, torch.bfloat16) for d in sizes for r in ranks if r <= d]
    command = said("norms", arguments)
    found = {"schema": 1, "command": command, "environment": about(), "load": load, "threads": torch.get_num_threads(),
             "rounds": chosen.rounds, "rows": rows}  # fmt: skip
    write(chosen.out, "norms", found, page(found))
    print(page(found))
    return 0


if __name__ == "__main__":
    call(main)
