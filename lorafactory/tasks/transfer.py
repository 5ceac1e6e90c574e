"""What one learner keeps and carries over from task to task, from the matrix of its scores.

matrix[i][j]: the score on task j, larger is better, after the learner has trained on tasks 0 to i; None: not scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float | None]]


def average(matrix: Matrix) -> float:
    """Mean over all T tasks after the last one: 1/T sum_j R[T, j] (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, ACC)."""
    return _mean(matrix[-1])


def backward_transfer(matrix: Matrix) -> float:
    """What later tasks did to earlier ones: 1/(T-1) sum_{j<T} R[T, j] - R[j, j] (Lopez-Paz & Ranzato 2017, BWT). Below 0:
    forgotten."""
    last = len(matrix) - 1
    return _mean([_less(matrix[last][j], matrix[j][j]) for j in range(last)])


def forgetting(matrix: Matrix) -> float:
    """How far earlier tasks fell from their best: 1/(T-1) sum_{j<T} max_{i<T} R[i, j] - R[T, j] (Chaudhry et al. 2018,
    arXiv 1801.10112, the forgetting measure), the max over what was scored. Smaller is better."""
    last = len(matrix) - 1
    best = [max((r[j] for r in matrix[:last] if r[j] is not None), default=None) for j in range(last)]  # type: ignore[type-var]
    return _mean([_less(best[j], matrix[last][j]) for j in range(last)])


def forward_transfer(matrix: Matrix, untrained: Sequence[float | None]) -> float:
    """What earlier tasks did for one not yet seen: 1/(T-1) sum_{j>1} R[j-1, j] - b_j, b the scores before any training
    (Lopez-Paz & Ranzato 2017, FWT). It tells of the head, too: where each task has its own, both are chance."""
    return _mean([_less(matrix[j - 1][j], untrained[j]) for j in range(1, len(matrix))])


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Sequence[float | None]) -> float:
    """NaN where there is nothing to average, or a value is missing."""
    found = [math.nan if v is None else v for v in values]
    return fmean(found) if found else math.nan
