"""Detour: an optimiser that lets some parameters take their step in another space, whichever optimiser steps there.
OnWeights: whole weights. OnPairs: those of the low-rank pairs. Preconditioned: only their gradients change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .adapter import LowRank, Part
from .adapter.delta import exact
from .errors import UserError


class Detour(torch.optim.Optimizer):
    """Steps as `inner` does, but for the parameters of own(), which step_own() moves.

    step_own() asks change() what inner makes of a gradient in the other space. inner then sees, in place of the
    parameter, a zero of that gradient's shape; what it leaves there is its step. So momentum and moments live in the
    other space, and any optimiser that treats entries alike will do. The decay of a zero is zero: it is step_own's.

    Groups and state are this optimiser's, lent to inner for the length of a call: inner's own are never read."""

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner = inner
        super().__init__(inner.param_groups, inner.defaults)

    def own(self) -> set[nn.Parameter]:
        """The parameters with a gradient that step_own() moves."""
        raise NotImplementedError

    def step_own(self, groups: dict[nn.Parameter, dict[str, Any]]) -> None:
        """Move them; groups: the options (lr, weight_decay …) of each."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = self.own()
        groups = {p: g for g in self.param_groups for p in g["params"]}
        with exact():
            self._run(p for p in groups if p not in own)
            self.step_own({p: g for p, g in groups.items() if p in own})
        return loss

    def change(self, gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """What inner adds for these gradients: each of its gradient's shape, the learning rate included."""
        kept = {p: (p.data, p.grad) for p in gradients}
        try:
            for p, g in gradients.items():
                p.grad = None  # torch checks a gradient's shape against the parameter's
                p.data = torch.zeros_like(g)
                p.grad = g
            self._run(gradients)
            return {p: p.data for p in gradients}
        finally:
            for p, (data, grad) in kept.items():
                p.grad = None
                p.data = data
                p.grad = grad

    def _run(self, params: Iterable[nn.Parameter]) -> None:
        chosen = set(params)
        self.inner.state = self.state
        self.inner.param_groups = [{**g, "params": [p for p in g["params"] if p in chosen]} for g in self.param_groups]
        self.inner.step()


class OnWeights(Detour):
    """Moves the whole weights that a part's structure trains; all else steps as `inner` does."""

    def __init__(self, inner: torch.optim.Optimizer, part: Part):
        super().__init__(inner)
        self.part = part

    def own(self) -> set[nn.Parameter]:
        return {p for _, p in self.part.adapter.dense() if p.grad is not None}


def fit_weights(part: Part, rank: int) -> None:
    """Raises UserError where a whole weight has less than this rank."""
    for site, p in part.adapter.dense():
        if rank > min(p.shape):
            raise UserError(f"rank {rank} is more than {site.name} {list(p.shape)} can have: "
                            f"at most {min(p.shape)}, or leave it out of target_modules")  # fmt: skip


class OnPairs(Detour):
    """Moves the factors of a part's pairs; all else steps as `inner` does."""

    def __init__(self, inner: torch.optim.Optimizer, part: Part):
        super().__init__(inner)
        self.part = part

    def pairs(self) -> list[LowRank]:
        """Those whose trained factors all have a gradient."""
        found = [low for _, low in self.part.adapter.low_ranks() if low.rank]
        return [low for low in found if all(p.grad is not None for p in (low.A, low.B) if p.requires_grad)]

    def own(self) -> set[nn.Parameter]:
        return {p for low in self.pairs() for p in (low.A, low.B) if p.requires_grad}

    def alike(self) -> list[list[LowRank]]:
        """Pairs of one shape together: what is done to their Gram matrices is done to all at once."""
        found: dict[Any, list[LowRank]] = {}
        for low in self.pairs():
            found.setdefault((low.A.shape, low.B.shape, low.gate is None, low.A.device), []).append(low)
        return list(found.values())


class Preconditioned(OnPairs):
    """Steps as `inner` does, on the gradients that precondition() puts in place of the factors' own for that time."""

    def precondition(self, lows: list[LowRank]) -> dict[nn.Parameter, Tensor]:
        """New gradients for pairs of one shape."""
        raise NotImplementedError

    def step_own(self, groups: dict[nn.Parameter, dict[str, Any]]) -> None:
        kept = {p: p.grad for p in groups}
        try:
            for lows in self.alike():
                for p, g in self.precondition(lows).items():
                    p.grad = g
            self._run(groups)
        finally:
            for p, own in kept.items():
                p.grad = own
