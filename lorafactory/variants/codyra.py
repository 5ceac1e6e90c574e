import math
from dataclasses import dataclass

import torch

from ..adapter import Part
from ..gates import active, drop_idle, soft_threshold
from ..registry import BudgetConfig, register


@register("codyra")
class CoDyRA(Part):
    """CoDyRA: update = s B diag(w) A; in the later half of a stage a rising soft threshold closes ranks, then they merge.

    Lu et al. 2024: one stage a task. w starts at N(0, 1), B at 0, and all train together. Dense: the first `dense` share of
    a stage's steps; sparse: after every step w <- sign(w) max(|w| - kappa, 0), kappa one of n values from 0 to `most`, which
    rises every floor(sparse steps / n) steps, counted from the run's first. At the end of a stage the ranks with w = 0 go;
    the next stage freezes the rest into the pair's past (their W <- W + B diag(w) A, with the base read-only) and begins
    with fresh pairs of the first rank. What an earlier stage learnt is never replayed.

    Theirs is alpha = rank (s = 1), Adam's second beta 0.9999, no weight decay. Their code thresholds in place, as SoRA's
    does, so what the shrinking leaves below kappa is set to 0 as well; here it is the proximal step of their objective, L +
    kappa |w|_1. Where a stage has fewer sparse steps than n, theirs never rises; here it rises every step. The loss is
    the task's matter: theirs for CLIP is `task.symmetric` over a stage's own classes, but that the mean over texts counts
    past classes, too, as zeros."""

    paper = "CoDyRA, arXiv 2412.01004"
    axis, needs = "budget", frozenset({"low_rank"})

    @dataclass
    class Config(BudgetConfig):
        """most: the last threshold; dense: share of a stage's steps before the first; values: n, how many from 0 to most."""

        most: float = 5e-3
        dense: float = 0.5
        values: int = 50

        def check(self):
            self.check_shares("dense")
            self.check_least(2, "values")
            self.check_positive("most")

    def pairs(self):
        return [low for _, low in self.adapter.low_ranks()]

    def attach(self):
        for low in self.pairs():
            low.add_gate()
        self.register_buffer("ranks", torch.tensor([low.rank for low in self.pairs()]))  # of every stage's start
        self.register_buffer("stage", torch.zeros((), dtype=torch.long))

    def begin(self, stage):
        if stage.index <= int(self.stage):
            return  # the first, or one that a loaded adapter is in
        for low, rank in zip(self.pairs(), self.ranks.tolist(), strict=True):
            low.fold(rank=rank)
        self.stage.fill_(stage.index)

    def threshold(self, index, total):
        """kappa after the step of this index."""
        c = self.config
        dense = c.dense * total
        if index <= dense:
            return 0.0
        every = max(1, int((total - dense) // c.values))
        rises = index // every - (math.ceil(dense) - 1) // every  # multiples of `every` from the first sparse step on
        return c.most * min(rises, c.values - 1) / (c.values - 1)

    def after_step(self, step):
        if kappa := self.threshold(step.index, step.total):
            for low in self.pairs():
                soft_threshold(low.gate, kappa)

    def end(self, stage):
        drop_idle(self.pairs())
        return False

    def counters(self):
        past = [0 if low.A_past is None else len(low.A_past) for low in self.pairs()]
        return {"ranks_kept": active(self.pairs()), "ranks_past": sum(past), "stages_before": int(self.stage)}
