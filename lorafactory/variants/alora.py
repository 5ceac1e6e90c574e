import contextlib
from dataclasses import dataclass

import torch

from .. import probe
from ..adapter import Part
from ..errors import UserError
from ..registry import BudgetConfig, register


@register("alora")
class ALoRA(Part):
    """ALoRA: at intervals the ranks whose ablation hurts least are pruned, and the pairs that lost none get their places.

    Liu et al. 2024. AB-LoRA scores rank k of a pair by the loss of the model without it less that of the model with no
    other rank: IS = S(M) - S(M without k) + S(M with k alone), S = -loss, of which the first term is one for all. `rounds`
    times, at equal distances from `warmup` to `until` (shares of the steps), the `pruned` share of all ranks with the lowest
    scores goes; the pairs without any among them share that many new ones evenly, A as in LoRA and B = 0, so that the sum
    of ranks stays and growing alone changes no output. s = alpha / rank at the start.

    Inferred, for no code is known: rounds, shares, who gets the remainder (the pairs whose best rank scores highest). A
    pair that only lost ranks keeps its moments; one that grew starts them afresh (LowRank.grow tells why). Where every pair
    lost a rank, those that lost fewest count as important. Scores are taken on the run's first training batches, in
    evaluation mode: a run of ours has no other labelled rows that it may look at. Cost: 2 ranks batches forward passes a
    round."""

    paper = "ALoRA, arXiv 2403.16187"
    axis, needs = "budget", frozenset({"low_rank"})
    data = True

    @dataclass
    class Config(BudgetConfig):
        """rounds: how often (at most once a step); warmup, until: shares of the steps; pruned: share of all ranks a round;
        batches: to score on."""

        rounds: int = 8
        warmup: float = 0.1
        until: float = 0.8
        pruned: float = 0.05
        batches: int = 1

        def check(self):
            self.check_least(1, "rounds", "batches")
            if not 0 <= self.warmup < self.until <= 1:
                raise UserError(f"warmup={self.warmup} and until={self.until} are shares of the steps, the first the smaller")
            if not 0 < self.pruned < 1:
                raise UserError(f"pruned is {self.pruned}; it must lie in (0, 1)")

    def begin(self, stage):
        if not self.adapter.started:  # there must be batches: scores are taken on them while it trains
            next(probe.lazily(stage, 1))

    def pairs(self):
        return [low for _, low in self.adapter.low_ranks()]

    def attach(self):
        self.register_buffer("moved", torch.zeros((), dtype=torch.long))
        self.register_buffer("done", torch.zeros((), dtype=torch.long))

    def due(self, total):
        """After how many steps the rounds are."""
        c = self.config
        start, stop = round(c.warmup * total), round(c.until * total)
        return {start + round((k + 1) * (stop - start) / c.rounds) for k in range(c.rounds)} - {0}

    def before_step(self, step):
        if not self.due(step.total):
            c = self.config
            raise UserError(f"{step.total} steps leave none between warmup={c.warmup} and until={c.until}")

    def after_step(self, step):
        if step.index + 1 in self.due(step.total):
            step.rebuild_optimizer(self.reallocate(self.scores(step.stage)))

    # AB-LoRA

    def scores(self, stage):
        """One tensor [rank] a pair: what the loss gains by rank k, without the others and at their side."""
        pairs, data = self.pairs(), list(probe.lazily(stage, self.config.batches))
        with gated(pairs) as gates, probe.evaluating(stage):
            def loss():
                return sum(float(stage.loss(b)) for b in data) / len(data)

            found = [torch.zeros(low.rank) for low in pairs]
            for one in (False, True):  # without rank k, with it alone
                for g in gates:
                    g.fill_(0.0 if one else 1.0)
                for s, g in zip(found, gates, strict=True):
                    for k in range(len(g)):
                        g[k] = 1.0 if one else 0.0
                        s[k] += -loss() if one else loss()
                        g[k] = 0.0 if one else 1.0
        return found

    def reallocate(self, scores):
        """Prune and grow. Returns what the optimiser's state becomes."""
        pairs = self.pairs()
        pooled = torch.cat(scores)
        count = min(max(1, round(self.config.pruned * len(pooled))), len(pooled) - 1)
        gone = torch.zeros_like(pooled, dtype=torch.bool)
        gone[pooled.argsort(stable=True)[:count]] = True
        lost = gone.split([len(s) for s in scores])
        gained = self.shares(count, [int(g.sum()) for g in lost], scores)
        moved = {}
        for low, g, n in zip(pairs, lost, gained, strict=True):
            if g.any():
                moved |= low.keep((~g).nonzero().flatten().to(low.A.device))
            if n:
                low.grow(n)
        self.moved += count
        self.done += 1
        return moved

    def shares(self, count, lost, scores):
        """How many ranks each pair gets: those that lost fewest in turn, the best rank first, as far as a layer can hold."""
        pairs = self.pairs()
        room = [min(low.A.shape[1], low.B.shape[0]) - low.rank + k for low, k in zip(pairs, lost, strict=True)]
        order = sorted(range(len(pairs)), key=lambda i: -float(max(scores[i], default=-torch.inf)))
        gained = [0] * len(pairs)
        for fewest in sorted(set(lost)):
            turn = [i for i in order if lost[i] == fewest]
            while sum(gained) < count and any(gained[i] < room[i] for i in turn):
                for i in [i for i in turn if gained[i] < room[i]][: count - sum(gained)]:
                    gained[i] += 1
        return gained

    def counters(self):
        total = sum(low.rank for low in self.pairs())
        return {"reallocations": int(self.done), "ranks_moved": int(self.moved), "rank_total": total}


@contextlib.contextmanager
def gated(pairs):
    """Every rank behind a mask of 1, while it lasts."""
    for low in pairs:
        low.set_mask(torch.ones_like(low.A[:, 0]), always=True)
    try:
        yield [low.mask for low in pairs]
    finally:
        for low in pairs:
            low.set_mask(None)
