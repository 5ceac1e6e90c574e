"""Seeded stratified splits of a source's own splits."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from ..errors import UserError
from . import SPLITS


def draw(labels: np.ndarray, size: int, seed: list[int]) -> np.ndarray:
    """`size` positions in rising order, without replacement, every class in its proportion (largest remainder)."""
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (size / len(labels))
    share = np.floor(exact + 1e-9).astype(int)
    share[np.argsort(share - exact, kind="stable")[: size - share.sum()]] += 1
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in zip(classes, share, strict=True)]
    return np.sort(np.concatenate(drawn))


def places(selection: str, test: str, raw: Any, source: str) -> dict[str, str]:
    """Which source split each of SPLITS is drawn from. Raises UserError for one that is not there."""
    found = {"train": "train", "selection": selection, "test": test}
    for ours, theirs in found.items():
        if theirs not in raw:
            hint = f"; task.{ours}_split=train draws a part of train" if ours != "train" else ""
            raise UserError(f"{source} has no {theirs} split for {ours}; it has {', '.join(raw)}{hint}")
    return found


def divide(strata: dict[str, np.ndarray], of: dict[str, str], config: Any, source: str) -> dict[str, np.ndarray]:
    """Rows of its place for each of SPLITS, test first, then selection, so that neither depends on how many rows train.

    strata: source split -> each row's stratum; of: ours -> source split; config: a Task.Config with *_size,
    *_share and split_seed. Raises UserError where a place has too few rows."""
    rows, free = {}, {place: np.arange(len(s)) for place, s in strata.items()}
    for i, ours in enumerate(reversed(SPLITS)):
        place = of[ours]
        left, size = free[place], getattr(config, f"{ours}_size")
        if size == 0 and ours != "train" and place == of["train"]:
            size = max(1, round(getattr(config, f"{ours}_share") * len(strata[place])))
        if not len(left) or size > len(left):
            raise UserError(f"task.{ours}_size={size}, but {source} has {len(left)} rows left for {ours}")
        drawn = draw(strata[place][left], size, [config.split_seed, i]) if size else np.arange(len(left))
        rows[ours], free[place] = left[drawn], np.delete(left, drawn)
    return rows


def overlaps(texts: dict[str, list[Any]]) -> dict[str, int]:
    """'a/b' -> how many rows of split b have a text that split a holds, too; for every pair in order."""
    held = {split: set(rows) for split, rows in texts.items()}
    return {f"{a}/{b}": sum(t in held[a] for t in texts[b]) for a, b in combinations(texts, 2)}
