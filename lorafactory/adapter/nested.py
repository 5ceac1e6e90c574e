"""Nested: budgets that train pairs of factors so that their first ranks alone are an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, List, Optional  # noqa: UP035  as in registry

import torch
from torch import Tensor

from ..errors import UserError
from ..registry import BudgetConfig
from .low_rank import LowRank
from .part import Part, Stage, Step

SIGMA: dict[str, Callable[[int], float]] = {"rank": lambda r: 1 / r, "sqrt": lambda r: r**-0.5, "none": lambda r: 1.0}


@dataclass
class NestedConfig(BudgetConfig):
    """ranks: the truncations that train, none above the largest rank; scaling: how the scale of a truncation goes with its
    rank, rank (1 / r), sqrt (1 / sqrt(r)) or none; keep: the rank that is left in the end (null: all); scored: the
    truncations that a run scores (null: 1, 2, 4, ... and the whole)."""

    ranks: Optional[List[int]] = None  # noqa: UP006, UP045
    scaling: str = "rank"
    keep: Optional[int] = None  # noqa: UP045
    scored: Optional[List[int]] = None  # noqa: UP006, UP045

    def check(self) -> None:
        self.check_choices(scaling=SIGMA)
        self.check_least(1, "keep")
        for name in ("ranks", "scored"):
            given = getattr(self, name)
            if given is not None and (len(set(given)) < len(given) or any(r < 1 for r in given)):
                raise UserError(f"{name} is {list(given)}; it takes different ranks, from 1")
        if self.ranks == []:
            raise UserError("ranks is []: nothing would train; null: all of them")


class Nested(Part):
    """The truncation to r: s_r B[:, :r] A[:r], s_r = s sigma(r) / sigma(rank), s the scale of the whole. A step trains the
    sum of some truncations, B diag(P) A with P_i the sum of their s_r with r >= i; a pair of a lower rank counts as that.

    Only training sees P. Before the first step and after the end nothing is nested: what is saved and merged is the
    whole, or, with `keep`, a truncation, a plain pair of that rank."""

    Config: ClassVar[type]
    nested_steps: Tensor
    now: ClassVar[str]  # the buffer that says what trains now, 0: nothing; a name of its own: another must not load it
    axis, needs, does = "budget", frozenset({"low_rank"}), frozenset({"trains truncations"})

    def attach(self) -> None:
        self.register_buffer(self.now, torch.zeros((), dtype=torch.long))
        self.register_buffer("nested_steps", torch.zeros((), dtype=torch.long))
        self.register_load_state_dict_post_hook(_masked)

    def training_ranks(self) -> list[int]:
        """The truncations whose sum trains now."""
        raise NotImplementedError

    def choose(self) -> int:
        """What `now` is for the next step."""
        return 1

    def rank(self) -> int:
        """Of the largest pair."""
        return max((low.rank for _, low in self.adapter.low_ranks()), default=0)

    def share(self, low: LowRank, rank: int) -> float:
        """s_r / s."""
        sigma = SIGMA[self.config.scaling]
        return sigma(min(rank, low.rank)) / sigma(low.rank)

    def weights(self, low: LowRank, ranks: list[int]) -> Tensor:
        """P / s, [rank]."""
        at = torch.arange(low.rank)
        return torch.stack([self.share(low, r) * (at < r) for r in ranks]).sum(0)

    def mask(self) -> None:
        on = bool(getattr(self, self.now))
        for _, low in self.adapter.low_ranks():
            low.set_mask(self.weights(low, self.training_ranks()) if on and low.rank else None)

    def turn(self, to: int) -> None:
        getattr(self, self.now).fill_(to)
        self.mask()

    def begin(self, stage: Stage) -> None:
        if self.adapter.started and not stage.index:
            return
        c, most = self.config, self.rank()
        for name, given in (("ranks", c.ranks), ("scored", c.scored), ("keep", c.keep and [c.keep])):
            if not stage.index and given and max(given) > most:
                raise UserError(f"{name} has {max(given)}, and no pair has more than {most} ranks")
        self.turn(self.choose())

    def after_step(self, step: Step) -> None:
        self.nested_steps += 1
        self.turn(self.choose())

    def end(self, stage: Stage) -> bool:
        was = bool(getattr(self, self.now))
        self.turn(0)
        cut = self.config.keep is not None and self.rank() > self.config.keep
        if cut:
            self.truncate(self.config.keep)
        return was or cut

    def truncate(self, rank: int) -> None:
        """To the first `rank` ranks, for good."""
        for _, low in self.adapter.low_ranks():
            if rank < low.rank:
                low.scale.mul_(self.share(low, rank))
                low.keep(torch.arange(rank, device=low.A.device))

    def truncations(self) -> dict[int, Callable[[], Any]]:
        most, scored = self.rank(), self.config.scored
        powers = [2**i for i in range(most.bit_length())]
        return {r: partial(self.truncate, r) for r in (scored if scored is not None else [*powers, most]) if r <= most}

    def counters(self) -> dict[str, float]:
        return {"nested_steps": int(self.nested_steps), "rank_total": sum(low.rank for _, low in self.adapter.low_ranks())}


def _masked(part: Any, _: Any) -> None:
    """After loading."""
    part.mask()
