"""Gates that a soft threshold closes: which budgets share it, the thresholds' schedules, and dropping what is closed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .adapter import LowRank
from .adapter.low_rank import Moved

SCHEDULES = ("none", "linear", "log", "exp")


@torch.no_grad()
def soft_threshold(gate: Tensor, threshold: float) -> None:
    """In place argmin_u (u - gate)^2 / 2 + threshold |u| = sign(gate) max(|gate| - threshold, 0)."""
    gate.copy_(gate.sign() * (gate.abs() - threshold).clamp_min(0))


def levels(schedule: str, start: float, most: float, count: int) -> list[float]:
    """Thresholds from start to most: evenly spaced (linear), so that their exponentials are (log), their logarithms (exp)."""
    if schedule == "none":
        return [start]
    ways: dict[str, tuple[Callable[[float], float], Callable[[float], float]]]
    ways = {"linear": (float, float), "log": (math.exp, math.log), "exp": (math.log, math.exp)}
    to, back = ways[schedule]
    low, high = to(start), to(most)
    return [back(low + (high - low) * i / (count - 1)) for i in range(count)]


def active(pairs: Iterable[LowRank]) -> int:
    """Ranks whose gate is not zero."""
    return sum(int(low.gate.count_nonzero()) for low in pairs if low.gate is not None)


def drop_idle(pairs: Iterable[LowRank]) -> Moved:
    """Ranks whose gate is zero go, which leaves the function as it is. Returns LowRank.keep's for the optimiser."""
    moved: Moved = {}
    for low in pairs:
        if low.gate is not None and not low.gate.all():
            moved |= low.keep(low.gate.detach().nonzero().flatten())
    return moved
