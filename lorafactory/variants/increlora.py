import math
from dataclasses import dataclass
from functools import partial
from typing import Optional

import torch

from .. import linalg
from ..adapter import Part
from ..errors import UserError
from ..registry import BudgetConfig, register

RESERVE = 1e-5  # the gate of a rank in waiting
SCALES = ("rank", "fixed")


@register("increlora")
class IncreLoRA(Part):
    """IncreLoRA: update = s B diag(gate) A; every pair starts at rank 1, and the most important ones grow up to a budget.

    Zhang et al. 2023. variant.rank is what the pairs have on average in the end, so the budget is LoRA's of that rank.
    Importance of a pair: I = sum |dW * dL/dW| / sqrt(d_out d_in) at every step, smoothed as in AdaLoRA; score I U. In equal
    intervals from `warmup` to `until` (shares of the steps, in place of their warm-up and interval in steps) the `top`
    pairs grow by `count` ranks, the last ones by what is left. Advance learning: each pair has `count` ranks in reserve,
    whose A and B train behind a gate of 1e-5; growing frees their gates, and new ones wait. The reserve goes when the
    budget is spent. A pair that grows starts its moments afresh, where the authors' new tensors have a count of steps of
    their own. s = alpha / ranks of the pair now, as their code has it, so growing shrinks the old ranks; or fixed.

    The penalty is the mean of |A A^T - I| and |B^T B - I| over the pairs, those in reserve included; in their code each new
    rank is a tensor of its own, so it keeps norms at 1 and turns nothing apart. dW is the pair's, dL/dW the layer's: under a
    decomposition or experts that of their sum, and before dropout. Cost: while it grows, the product that gives the weight's
    gradient, and its memory, a layer and step."""

    paper = "IncreLoRA, arXiv 2308.12043"
    axis, needs, does = "budget", frozenset({"low_rank", "additive"}), frozenset({"penalty on the factors"})
    minds = frozenset({"mixes ranks"})  # gates from zero between orthogonal factors: the form of an SVD

    @dataclass
    class Config(BudgetConfig):
        """start: ranks of a pair at first; count: by how many a pair grows (null: half of the average in the end); top: how
        many pairs grow at once (null: a sixth, more in a run too short for that); warmup, until: shares of the steps;
        advance: whether there is a reserve; scale: rank (alpha / ranks now) or fixed (alpha / variant.rank); penalty: times
        the deviation from orthonormal factors; beta1, beta2: of the smoothed importance and its uncertainty."""

        start: int = 1
        count: Optional[int] = None  # noqa: UP045  OmegaConf
        top: Optional[int] = None  # noqa: UP045
        warmup: float = 0.1
        until: float = 0.5
        advance: bool = True
        scale: str = "rank"
        penalty: float = 0.1
        beta1: float = 0.85
        beta2: float = 0.85

        def check(self):
            self.check_least(1, "start", "count", "top")
            self.check_least(0, "penalty")
            self.check_shares("beta1", "beta2")
            self.check_choices(scale=SCALES)
            if not 0 <= self.warmup < self.until <= 1:
                raise UserError(f"warmup={self.warmup} and until={self.until} are shares of the steps, the first the smaller")

    def pairs(self):
        return [low for _, low in self.adapter.low_ranks()]

    def attach(self):
        lows, c = self.pairs(), self.config
        for low in lows:
            low.add_gate(0.0, unit_norm=True)
        target = sum(low.rank for low in lows)
        if c.start * len(lows) >= target:
            raise UserError(f"start is {c.start}, and variant.rank leaves nothing to grow to: lower the one or raise the other")
        self.__dict__.update(target=target, gathered={})
        self.count = c.count or max(1, round(target / len(lows) / 2))
        self.register_buffer("active", torch.tensor([low.rank for low in lows]))
        self.register_buffer("alphas", torch.zeros(len(lows)))
        self.register_buffer("smoothed", torch.zeros(2, len(lows)))  # I and U
        for key in dict.fromkeys(site.key for site, _ in self.adapter.low_ranks()):  # once, however many experts it has
            self.adapter.deltas[key].register_forward_hook(partial(self.watch, key))

    def begin(self, stage):
        if stage.index or self.adapter.started:
            return
        for i, low in enumerate(self.pairs()):
            self.alphas[i] = low.scale * low.rank
            self.active[i] = min(self.config.start, low.rank)
            low.resize(int(self.active[i]) + self.reserve())
        self.settle()

    def reserve(self):
        return self.count if self.config.advance else 0

    def growing(self):
        return int(self.active.sum()) < self.target

    @torch.no_grad()
    def settle(self):
        """The gates in reserve, and the scales."""
        for i, (low, k) in enumerate(zip(self.pairs(), self.active.tolist(), strict=True)):
            low.gate[k:] = RESERVE
            if self.config.scale == "rank":
                low.scale.copy_(self.alphas[i] / k)

    # importance

    def watch(self, key, delta, args, y):
        """Gather dL/dW of a layer, summed over micro-batches, in training mode; in no other are pairs told apart."""
        if not torch.compiler.is_compiling() and self.training and y.requires_grad and self.growing():
            x = args[0].detach()
            y.register_hook(lambda g: self.gather(key, g.flatten(0, -2).float().T @ x.flatten(0, -2).float()))

    def gather(self, key, gradient):
        self.gathered[key] = self.gathered[key] + gradient if key in self.gathered else gradient

    def importance(self, step):
        """I [pairs], the same in every process."""
        gradients, found = {}, []
        for site, low in self.adapter.low_ranks():
            if site.key not in gradients:
                own = self.gathered.get(site.key)
                gradients[site.key] = step.sum(torch.zeros(site.d_out, site.d_in, device=low.A.device) if own is None else own)
            found.append((low.product() * gradients[site.key]).abs().sum() / math.sqrt(site.d_out * site.d_in))
        return torch.stack(found).to(self.smoothed)

    def before_step(self, step):
        if not self.growing():
            return
        if self.training and not step.sum(torch.tensor(float(len(self.gathered)), device=self.smoothed.device)):
            raise UserError(f"{self.name} saw no gradient of the layers while it grows: train.compile hides them")
        start, stop = self.phases(step.total)
        if stop - start < self.rounds(step.total):
            raise UserError(
                f"{step.total} steps leave {stop - start} between warmup={self.config.warmup} and until={self.config.until} "
                f"for {self.rounds(step.total)} rounds of growth: raise top={self.config.top} or count={self.count}"
            )
        now, (i, u), c = self.importance(step), self.smoothed, self.config
        self.gathered.clear()
        if now.isfinite().all():  # a step that half precision overflowed in tells nothing
            i.lerp_(now, 1 - c.beta1)
            u.lerp_((now - i).abs(), 1 - c.beta2)

    # growth

    def phases(self, total):
        return round(self.config.warmup * total), round(self.config.until * total)

    def rounds(self, total):
        """How many it takes from the start to the budget."""
        start, stop = self.phases(total)
        missing = self.missing()
        if self.config.top:
            return math.ceil(missing / self.config.top)
        least = math.ceil(missing / len(self.pairs()))
        return max(least, min(stop - start, math.ceil(missing / max(1, round(len(self.pairs()) / 6)))))

    def top(self, total):
        """How many pairs grow in a round."""
        return self.config.top or math.ceil(self.missing() / self.rounds(total))

    def missing(self):
        """Portions of `count` ranks between the start and the budget."""
        return (self.target - sum(min(self.config.start, k) for k in self.most())) / self.count

    def most(self):
        return [min(site.d_in, site.d_out) for site, _ in self.adapter.low_ranks()]

    def after_step(self, step):
        start, stop = self.phases(step.total)
        n, t = self.rounds(step.total), step.index + 1
        if self.growing() and (t in {start + round((k + 1) * (stop - start) / n) for k in range(n)} or t > stop):
            step.rebuild_optimizer(self.grow(self.top(step.total)))
        if self.config.advance and self.growing():
            for low, k in zip(self.pairs(), self.active.tolist(), strict=True):
                low.gate[k:] = RESERVE  # the reserve takes its step back, so that its moments are those of its gradients

    def grow(self, top):
        """The `top` highest scores, each `count` ranks more while there is budget. Returns what moved, for the optimiser."""
        lows, scores = self.pairs(), self.smoothed.prod(0)
        able = [i for i in scores.argsort(descending=True, stable=True).tolist() if self.active[i] < self.most()[i]]
        for i in able[:top]:
            low, left = lows[i], self.target - int(self.active.sum())
            more = min(self.count, left, self.most()[i] - int(self.active[i]))
            self.active[i] += more
            low.grow(max(0, int(self.active[i]) + self.reserve() - low.rank))
        self.settle()
        return {} if self.growing() else self.drop_reserve()

    def drop_reserve(self):
        moved = {}
        for low, k in zip(self.pairs(), self.active.tolist(), strict=True):
            if low.rank > k:
                moved |= low.keep(torch.arange(k, device=low.A.device))
        return moved

    def end(self, stage):
        return bool(self.drop_reserve())  # whose gates of 1e-5 counted, if little

    def penalises(self):
        return self.config.penalty > 0

    def penalty(self):
        if not self.penalises():
            return 0.0
        return self.config.penalty * linalg.mean_off_orthonormal([m for low in self.pairs() for m in (low.A, low.B.T)])

    def counters(self):
        grown = int((self.active > self.config.start).sum())
        return {"rank_total": int(self.active.sum()), "rank_target": self.target, "grown_pairs": grown}
