import logging
import math
from dataclasses import dataclass
from typing import Optional

import torch

from .. import probe
from ..adapter import Part
from ..errors import UserError
from ..registry import BudgetConfig, register

log = logging.getLogger(__name__)
LEAST = 50  # points below which the estimate means nothing


def two_nn(x: torch.Tensor, estimator: str = "fit") -> float:
    """Intrinsic dimension of points x [n, d] from the ratios mu of second to first neighbour distances (Facco et al.
    2017): the slope of -log(1 - F(mu)) over log mu through the origin, the top tenth left out, or n / sum log mu.

    Copies of a point are left out, also where batches of other lengths changed their last digits. Raises UserError for
    fewer than 50 points."""
    x = x.cpu().double()
    apart = torch.cdist(x - x.mean(0), x - x.mean(0))
    distinct = ~(apart <= 1e-5 * apart.mean()).tril(-1).any(1)
    apart = apart[distinct][:, distinct].fill_diagonal_(math.inf)
    n = len(apart)
    if n < LEAST:
        raise UserError(f"{n} different samples are too few to tell their dimension: give at least {LEAST}")
    near = apart.topk(2, largest=False).values
    mu = (near[:, 1] / near[:, 0]).log().sort().values
    if estimator == "mle":
        return float(n / mu.sum())
    k = int(0.9 * n)
    y = -torch.log1p(-torch.arange(1, n + 1, dtype=mu.dtype) / n)[:k]
    return float((mu[:k] * y).sum() / mu[:k].square().sum())


@register("gelora")
class GeLoRA(Part):
    """GeLoRA: every layer of block i gets rank max(d_{i+1} - d_i, 0) + 1, d the intrinsic dimension of hidden states.

    Ed-dib et al. 2024, sec. 4: d_i where the states enter the block, d_{i+1} where they leave it, by TwoNN, once, before
    training. A block is the outermost element of an nn.ModuleList; a layer outside of every one (a pooler, a model that
    has none) is a block of its own, so that the rule decides its rank too. Inferred: dimensions are rounded before they
    are subtracted; up to 2,000 samples; a sample is the mean of its tokens. s = alpha / rank of the config stays for
    every layer; the paper's is 32 (`scale`). Estimates are low in high dimensions and with few samples."""

    paper = "GeLoRA, arXiv 2412.09250"
    axis, needs = "budget", frozenset({"low_rank", "input"})
    data = True

    @dataclass
    class Config(BudgetConfig):
        samples: int = 2000
        pooling: str = "mean"  # of a sample's tokens: mean, cls, last_token
        estimator: str = "fit"  # or mle
        scale: Optional[float] = None  # noqa: UP045  s of every layer; null: alpha / rank

        def check(self):
            self.check_choices(pooling=probe.POOLINGS, estimator=("fit", "mle"))
            if self.samples < LEAST:
                raise UserError(f"samples is {self.samples}; fewer than {LEAST} say nothing about a dimension")
            self.check_positive("scale")

    def attach(self):
        self.register_buffer("dimensions", torch.zeros(len(list(self.adapter.low_ranks())), 2))
        self.register_buffer("samples", torch.zeros((), dtype=torch.long))  # that they were estimated from

    def begin(self, stage):
        if stage.index or self.adapter.started:
            return
        c = self.config
        block_of = {site.name: probe.block(stage.model.model, site.name) for site, _ in self.adapter.low_ranks()}
        states = probe.states(stage, sorted(set(block_of.values())), c.samples, c.pooling)
        dims = {block: [two_nn(x, c.estimator) for x in pair] for block, pair in states.items()}
        self.samples.fill_(len(next(iter(states.values()))[0]))
        for i, (site, low) in enumerate(self.adapter.low_ranks()):
            before, after = dims[block_of[site.name]]
            self.dimensions[i] = torch.tensor([before, after])
            low.resize(min(max(round(after) - round(before), 0) + 1, site.d_in, site.d_out))
            if c.scale is not None:
                low.scale.fill_(c.scale)
            log.info("%s: dimension %.1f to %.1f, rank %d", site.name, before, after, low.rank)

    def counters(self):
        entering, leaving = self.dimensions.double().mean(0).tolist()
        ranks = sum(low.rank for _, low in self.adapter.low_ranks())
        found = {"rank_total": ranks, "dimension_entering": entering, "dimension_leaving": leaving}
        return {**found, "samples": int(self.samples)}
