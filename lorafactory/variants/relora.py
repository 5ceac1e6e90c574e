from dataclasses import dataclass
from typing import Optional

import torch

from ..adapter.restarting import Restarting, RestartingConfig
from ..errors import UserError
from ..registry import register

SHARE = {"random": 0.999, "magnitude": 0.9, "zero": 1.0, "none": 0.0}  # of the moments' entries that go


@register("relora")
class ReLoRA(Restarting):
    """ReLoRA: every T steps W0 <- W0 + s B A, then A, B start afresh; the sum of such updates has a high rank.

    Lialin et al. 2023. The base stays as it is: the update joins the pair's frozen past. Then the optimiser's moments
    are pruned (Adam's step count stays) and the learning rate rises from 0 again, to where train.schedule stands. The
    authors' code masks each moment on its own; a first moment that survives its second makes steps some thirty times
    too long, so ours keeps or drops both. Their ramp aims at the schedule's value at its end, ours follows it.
    Pre-training with it starts from a warmed-up full-rank checkpoint; fine-tuning has one.

    Cost: a step reads min(rank (restarts + 1), full rank) ranks; `every` beyond the run's steps is plain LoRA, and the
    counter `restarts` says so."""

    paper = "ReLoRA, arXiv 2307.05695"

    @dataclass
    class Config(RestartingConfig):
        """every: optimiser steps between restarts, or below 1 as a share of the run's (the paper: 2000 to 5000 steps of
        pre-training); warmup: steps from 0 to the full rate after a restart, or below 1 as a share of `every`; prune:
        which entries of the moments go, random, magnitude (the smallest of the first moment), zero (all) or none;
        pruned: their share (null: 0.999 of random, 0.9 of magnitude)."""

        prune: str = "random"
        pruned: Optional[float] = None  # noqa: UP045  OmegaConf

        def check(self):
            super().check()
            self.check_choices(prune=SHARE)
            if self.pruned is not None and self.prune not in ("random", "magnitude"):
                raise UserError(f"pruned is {self.pruned}, but prune={self.prune} fixes the share: drop one of them")
            if self.pruned is not None and not 0 <= self.pruned <= 1:
                raise UserError(f"pruned is {self.pruned}; it is a share, in [0, 1]")

    def restart(self, low, state):
        low.fold()
        for p in (low.A, low.B, low.gate):
            self.prune(state.get(p, {}))

    def prune(self, state) -> None:
        """Zeroes a share of one parameter's moments, the same entries of each."""
        share = SHARE[self.config.prune] if self.config.pruned is None else self.config.pruned
        moments = [t for _, t in sorted(state.items()) if torch.is_tensor(t) and t.dim() > 0]
        if not moments:
            return
        by = moments[0].abs() if self.config.prune == "magnitude" else torch.rand_like(moments[0])
        gone = torch.zeros(by.numel(), dtype=torch.bool, device=by.device)
        gone[by.flatten().argsort()[: round(share * by.numel())]] = True
        for t in moments:
            t.masked_fill_(gone.view_as(t), 0)
