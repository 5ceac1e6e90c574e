"""Tasks whose splits are seeded, stratified parts of a source's own splits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..errors import UserError
from . import SPLITS, Task


class Drawn(Task):
    """load() calls place(), then divide(), then digest(); describe() tells of all three."""

    source_split: dict[str, str]  # ours -> the source's
    fingerprint: str  # of all rows, as they were divided

    @dataclass
    class Config(Task.Config):
        """subset: the source's configuration (GLUE: cola). test_split, selection_split: a split of the source, or
        `train`: a seeded part of it, of *_size rows, or *_share of all where that is 0."""

        subset: str = ""
        test_split: str = "test"
        selection_split: str = "train"
        test_share: float = 0.2
        selection_share: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            for option in ("test_share", "selection_share"):
                if not 0 < getattr(self, option) < 1:
                    raise UserError(f"task.{option}={getattr(self, option)}: give a part of 1, as 0.2")
            if self.selection_split == self.test_place() != "train":
                raise UserError(f"selection and test are both {self.test_split}: selection must not see scored rows")

        def test_place(self) -> str:
            """What the source calls the split that is scored."""
            return self.test_split

    @property
    def whole_source(self) -> str:
        return "/".join(filter(None, (self.config.source, self.config.subset)))

    def place(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Those of a source's splits that ours are drawn from. Raises UserError for one that is not there."""
        c = self.config
        self.source_split = {"train": "train", "selection": c.selection_split, "test": c.test_place()}
        for ours, theirs in self.source_split.items():
            if theirs not in raw:
                hint = f"; task.{ours}_split=train draws a part of train" if ours != "train" else ""
                raise UserError(f"{self.whole_source} has no {theirs} split for {ours}; it has {', '.join(raw)}{hint}")
        return {s: raw[s] for s in dict.fromkeys(self.source_split.values())}

    def divide(self, strata: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows of its place for each of SPLITS, test first, then selection, so that neither depends on how many rows
        train. strata: source split -> each row's stratum. Raises UserError where a place has too few rows."""
        rows, free = {}, {place: np.arange(len(s)) for place, s in strata.items()}
        for i, ours in enumerate(reversed(SPLITS)):
            place = self.source_split[ours]
            left, size = free[place], getattr(self.config, f"{ours}_size")
            if size == 0 and ours != "train" and place == self.source_split["train"]:
                size = max(1, round(getattr(self.config, f"{ours}_share") * len(strata[place])))
            if not len(left) or size > len(left):
                raise UserError(f"task.{ours}_size={size}, but {self.whole_source} has {len(left)} rows left for {ours}")
            drawn = draw(strata[place][left], size, [self.config.split_seed, i]) if size else np.arange(len(left))
            rows[ours], free[place] = left[drawn], np.delete(left, drawn)
        return rows

    def digest(self, content: Any) -> None:
        """Set the fingerprint; content: all rows by split, fit for JSON."""
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def given(self) -> dict[str, list[Any]]:
        """Split -> what a model is given of each row, which no two splits should share."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """duplicates: rows whose given part the other split holds, too."""
        c, given = self.config, self.given()
        return {
            "name": c.name,
            "kind": c.kind,
            "source": self.whole_source,
            "revision": c.revision,
            "fingerprint": self.fingerprint,
            "sizes": {s: len(given[s]) for s in SPLITS},
            "splits": self.source_split,
            "split_seed": c.split_seed,
            "duplicates": overlaps(given),
        }


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
