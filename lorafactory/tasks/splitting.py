"""Seeded stratified splits."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np


def draw(labels: np.ndarray, size: int, seed: list[int]) -> np.ndarray:
    """`size` positions in rising order, without replacement, every class in its proportion (largest remainder)."""
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (size / len(labels))
    share = np.floor(exact + 1e-9).astype(int)
    share[np.argsort(share - exact, kind="stable")[: size - share.sum()]] += 1
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in zip(classes, share, strict=True)]
    return np.sort(np.concatenate(drawn))


def overlaps(texts: dict[str, list[Any]]) -> dict[str, int]:
    """'a/b' -> how many rows of split b have a text that split a holds, too; for every pair in order."""
    held = {split: set(rows) for split, rows in texts.items()}
    return {f"{a}/{b}": sum(t in held[a] for t in texts[b]) for a, b in combinations(texts, 2)}
