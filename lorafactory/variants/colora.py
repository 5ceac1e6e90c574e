import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from .. import probe
from ..adapter import Part, Stage
from ..errors import UserError
from ..registry import BudgetConfig, register

log = logging.getLogger(__name__)


def tuned(stage: Stage, steps: int, lr: float) -> dict[str, Tensor]:
    """What full fine-tuning of the adapted layers alone would add to their weights: `steps` steps of Adam, a batch each,
    round and round; 0: one plain gradient step. The base stays as it is."""
    if not steps:
        return {n: -lr * g for n, g in probe.gradients(stage, 1).items()}
    sites = {s.name: s for s in stage.model.adapter.sites}
    moved = {n: torch.zeros(s.d_out, s.d_in, requires_grad=True) for n, s in sites.items()}
    optimizer, done = torch.optim.Adam(moved.values(), lr), 0
    while done < steps:
        for one in probe.one_by_one(stage, steps - done):
            now = {n: d.detach() for n, d in moved.items()}
            for n, g in probe.gradients(one, 1, now).items():
                moved[n].grad = g
            optimizer.step()
            done += 1
    return {n: d.detach() for n, d in moved.items()}


def attributions(stage: Stage, moved: dict[str, Tensor], batches: int, points: int) -> Iterator[dict[str, Tensor]]:
    """FAIG (Xie et al. 2021) of each batch: site name -> D * the mean of dL/dW at W0 + (k / points) D, k = 0, ..., points
    - 1, [d_out, d_in]: D's contribution to the change of the loss, entry by entry."""
    for one in probe.one_by_one(stage, batches):
        sums = {n: torch.zeros_like(d) for n, d in moved.items()}
        for k in range(points):
            for n, g in probe.gradients(one, 1, {n: k / points * d for n, d in moved.items()}).items():
                sums[n] += g / points
        yield {n: d * sums[n] for n, d in moved.items()}


def allotted(scores: dict[str, float], sizes: dict[str, tuple[int, int]], share: float, beta: float,
             alpha: float | None, least: float | None = None, most: float | None = None) -> dict[str, int]:  # fmt: skip
    """Ranks from contributions: layer i trains about delta_i = alpha c_i^beta of its weights, c_i = score / the largest, from
    least to most. alpha None: the largest with which all layers together train no more than `share` of theirs."""
    largest = max(scores.values())
    c = {n: (s / largest if largest > 0 else 1.0) ** beta for n, s in scores.items()}

    def ranks(a: float) -> dict[str, int]:
        delta = {n: min(max(a * c[n], least or 0.0), most or math.inf) for n in sizes}
        return {n: min(max(1, round(delta[n] * p * q / (p + q))), p, q) for n, (p, q) in sizes.items()}

    if alpha is not None:
        return ranks(alpha)
    budget = share * sum(p * q for p, q in sizes.values())
    low, high = 0.0, 1.0
    while high < 1e12 and _count(ranks(high), sizes) <= budget:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _count(ranks(middle), sizes) <= budget else (low, middle)
    return ranks(low)


def _count(ranks: dict[str, int], sizes: dict[str, tuple[int, int]]) -> int:
    return sum(r * sum(sizes[n]) for n, r in ranks.items())


@register("colora")
class CoLoRA(Part):
    """CoLoRA: a layer's rank is set by its contribution to the task, r_i about alpha c_i^beta d_out d_in / (d_out + d_in).

    Park et al. 2024, for image restoration. c_i is the mean over the layer's weights of |FAIG|: the change D of a short
    full fine-tuning, times the mean gradient on the way from W0 to W0 + D, by the left endpoints, averaged over batches and
    divided by the largest (the authors take images; a batch stands for one here). Inferred, as the paper's rule is not
    disclosed: alpha spends `share` of the adapted layers' weights (more where the least rank of 1 in each takes more), and
    s is the structure's, or `scale`. The fine-tuning moves adapted layers alone, the head stays; nothing of it is kept. The
    authors adapt convolutions too: here linear layers. Their pre-training on degraded pictures is task.degraded.

    Cost: before training, `steps` + `points` x `batches` forward and backward passes, and two numbers a weight."""

    paper = "CoLoRA, arXiv 2408.01099"
    axis, needs = "budget", frozenset({"low_rank", "input"})
    data = True

    @dataclass
    class Config(BudgetConfig):
        """share: of the adapted layers' weights, that the pairs have together; alpha: in place of share, the rank's factor;
        beta: exponent of the contribution, 0: none; steps: of the fine-tuning (0: one plain gradient step), lr: its rate;
        batches: that contributions are averaged over, at most; points: on the way; scale: s of every layer (null: alpha /
        rank of the structure); least, most: bounds of what a layer trains, as a share of its weights (null: none, inferred)."""

        share: float = 0.07
        alpha: Optional[float] = None  # noqa: UP045  OmegaConf
        beta: float = 1.0
        steps: int = 20
        lr: float = 1e-4
        batches: int = 4
        points: int = 20
        scale: Optional[float] = None  # noqa: UP045
        least: Optional[float] = None  # noqa: UP045
        most: Optional[float] = None  # noqa: UP045

        def check(self):
            self.check_least(1, "batches", "points")
            self.check_least(0, "steps", "beta")
            self.check_positive("share", "alpha", "lr", "scale", "least", "most")
            if self.least is not None and self.most is not None and self.least > self.most:
                raise UserError(f"least is {self.least}, above most={self.most}")
            if self.share >= 1:
                raise UserError(f"share is {self.share}; it is a share of the weights, below 1")
            if self.alpha is not None and self.share != type(self).share:
                raise UserError(f"share is {self.share}, but alpha={self.alpha} sets the ranks: leave one out")

    def attach(self):
        self.register_buffer("contributions", torch.zeros(len(self.sites())))  # of the sites, in their order

    def sites(self):
        """Those that have pairs."""
        return list({s.name: s for s, _ in self.adapter.low_ranks()}.values())

    def begin(self, stage):
        if stage.index or self.adapter.started:
            return
        c, sites = self.config, self.sites()
        moved, total, count = tuned(stage, c.steps, c.lr), torch.zeros(len(sites)), 0
        for found in attributions(stage, moved, c.batches, c.points):
            total += torch.tensor([float(found[s.name].abs().mean()) for s in sites])
            count += 1
        scores = (total / count).tolist()
        self.contributions.copy_(torch.tensor(scores))
        by_name = {s.name: score for s, score in zip(sites, scores, strict=True)}
        ranks = allotted(by_name, {s.name: (s.d_out, s.d_in) for s in sites}, c.share, c.beta, c.alpha, c.least, c.most)
        for site, low in self.adapter.low_ranks():
            low.resize(ranks[site.name])
            if c.scale is not None:
                low.scale.fill_(c.scale)
        log.info("ranks by contribution: %s", ranks)

    def counters(self):
        ranks = [low.rank for _, low in self.adapter.low_ranks()]
        return {"rank_total": sum(ranks), "rank_least": min(ranks, default=0), "rank_most": max(ranks, default=0)}
