"""Seconds to switch adapters in place on one base: merge() and unmerge() of each, and a bare LoRA fuse, taken in turn.

    python scripts/bench/switching.py [--model smollm2] [--variants shira,lora] [--rank 8] [--rounds 5]

Prints a Markdown table. Exit status: 0; 1 if a base was not brought back bit for bit; 2 for a wrong call."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _main import call
from _measure import hush

from lorafactory import Adapted, attach, describe, registry
from lorafactory.adapter import LowRank

WARMUP = 1


def adapted(base: Any, spelling: str, rank: int) -> Adapted:
    """On a copy of the base, away from its start."""
    made = attach(copy.deepcopy(base), spelling, rank=rank, seed=0).eval()
    with torch.no_grad():
        for p in made.adapter.parameters():
            p.normal_(0, 1e-2)
    return made


@torch.no_grad()
def fused(model: Adapted, sign: float) -> None:
    """W + B A or W - B A in place, as merge scripts do it: nothing is checked, and rounding stays behind."""
    for site, low in model.adapter.inside(LowRank):
        b, a = low.factors()
        site.base.weight.addmm_(b, a, alpha=sign)


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measured(models: dict[str, Adapted], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(on, off) of each in every round; what disturbs the machine disturbs all alike."""
    calls: dict[str, tuple[Callable, Callable]] = {n: (m.merge, m.unmerge) for n, m in models.items()}
    for n, m in models.items():
        if any(m.adapter.low_ranks()):
            calls[f"{n}, bare fuse"] = (lambda m=m: fused(m, 1.0), lambda m=m: fused(m, -1.0))
    found: dict[str, list[tuple[float, float]]] = {n: [] for n in calls}
    for r in range(WARMUP + rounds):
        order = [*calls][r % len(calls) :] + [*calls][: r % len(calls)]
        for n in order:
            found[n].append((seconds(calls[n][0]), seconds(calls[n][1])))
    return {n: s[WARMUP:] for n, s in found.items()}


def restored(model: Adapted, base: Any) -> bool:
    model.merge()
    model.unmerge()
    theirs, mine = dict(base.named_parameters()), dict(model.model.named_parameters())
    return all(torch.equal(theirs[n], p) for n, p in mine.items())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--variants", default="shira,lora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help=f"that count, after {WARMUP} that does not")
    chosen = parser.parse_args(arguments)
    hush()
    registry.discover()
    base = describe.base_model(chosen.model)
    models = {n: adapted(base, n, chosen.rank) for n in chosen.variants.split(",")}
    exact = {n: restored(m, base) for n, m in models.items()}
    times = measured(models, chosen.rounds)
    print(f"{chosen.model}, rank {chosen.rank}, {torch.get_num_threads()} threads, median of {chosen.rounds} rounds\n")
    print("| adapter | on, s | off, s | base restored bit for bit |\n|---|---|---|---|")
    for n, found in times.items():
        on, off = (statistics.median(s) for s in zip(*found, strict=True))
        print(f"| {n} | {on:.3f} | {off:.3f} | {'yes' if exact.get(n) else 'no'} |")
    return int(not all(exact.values()))


if __name__ == "__main__":
    call(main)
