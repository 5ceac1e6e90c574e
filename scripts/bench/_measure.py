"""Times of several training steps taken in turn, and the peak memory of one side in a process of its own."""

from __future__ import annotations

import copy
import gc
import random
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from _sides import Side, bare, batches, config_of, dense, layers, norms, ours

from lorafactory import describe, registry
from lorafactory.memory import Peak

WARMUP = 3  # rounds before the first that counts: allocators and optimiser states settle
STEPS = 4  # that a peak is taken over


def hush() -> None:
    """transformers and PEFT warn about their own futures, once a process."""
    for category in (FutureWarning, UserWarning):
        warnings.simplefilter("ignore", category)


def make(side: str, model: Any, spelling: str, rank: int, total: int) -> Side | None:
    """A side on this very model; None: the variant has none such. total: optimiser steps that it will take."""
    torch.manual_seed(0)
    if side in ("bare", "norms"):
        return {"bare": bare, "norms": norms}[side](model)
    config = config_of(spelling, rank)
    if side in ("ours", "dense"):
        return {"ours": ours, "dense": dense}[side](model, config, total)
    from _peft import theirs  # here: the others do without PEFT

    return theirs(model, spelling, config, layers(model, config), total)


def alternate(steps: dict[str, Callable[[Any], Any]], data: list[Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, each round in another order: what disturbs the machine disturbs all alike, and
    none always finds the caches as one and the same other left them."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for r in range(WARMUP + rounds):
            for name in order.sample([*steps], len(steps)):
                began = time.perf_counter()
                steps[name](data[r % len(data)])
                seconds[name].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return {name: s[WARMUP:] for name, s in seconds.items()}


def started(side: str, base: Any, spelling: str, rank: int, rounds: int) -> tuple[Side | None, float]:
    """A side on a copy of the base, and the seconds that its start took."""
    model = copy.deepcopy(base)
    began = time.perf_counter()
    made = make(side, model, spelling, rank, WARMUP + rounds)
    return made, time.perf_counter() - began


def peak(side: str, model: str, spelling: str, rank: int, size: tuple[int, int], threads: int) -> int:
    """Bytes that this process grows by, beyond the loaded model, while the side starts and takes STEPS steps."""
    hush()
    registry.discover()
    torch.set_num_threads(threads)
    base = describe.base_model(model)
    if side == "theirs":
        import _peft  # noqa: F401  its modules are not the method's memory
    data = batches(base, size)
    for p in base.parameters():
        p.detach().sum()  # weights are mapped until they are read
    measured = Peak(torch.device("cpu"))
    made = make(side, base, spelling, rank, STEPS)
    for batch in data[:STEPS]:
        made.step(batch)  # type: ignore[union-attr]
    grown = measured.read()
    if not grown:
        raise RuntimeError("this system does not tell a process its peak memory (VmHWM in /proc/self/status)")
    return grown


class Apart:
    """peak() in a new process each time, forked from one that has only imported what all of them need."""

    def __enter__(self) -> Apart:
        context = get_context("forkserver")
        context.set_forkserver_preload(["torch", "peft", "lorafactory", "transformers.models.bert.modeling_bert"])
        self.pool = ProcessPoolExecutor(1, context, max_tasks_per_child=1)
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def peak(self, side: str, model: str, spelling: str, rank: int, size: tuple[int, int]) -> int:
        return self.pool.submit(peak, side, model, spelling, rank, size, torch.get_num_threads()).result()
