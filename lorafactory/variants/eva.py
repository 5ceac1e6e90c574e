from dataclasses import dataclass

import torch

from .. import probe
from ..adapter import Init
from ..errors import UserError
from ..registry import InitConfig, register


class Moments:
    """Mean [d] and scatter [d, d] of rows seen in batches, in float64: the exact covariance, whatever the batches."""

    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0
        self.vectors = None  # the leading directions after the last batch

    def add(self, x):
        x = x.double()
        n, mean = len(x), x.mean(0)
        apart = mean - self.mean
        centred = x - mean
        total = self.n + n
        self.scatter = self.scatter + centred.T @ centred + torch.outer(apart, apart) * (self.n * n / total)
        self.mean = self.mean + apart * (n / total)
        self.n = total

    def components(self, k):
        """(variances [k], directions [k, d]), largest first, and the whole variance []."""
        values, vectors = torch.linalg.eigh(self.scatter)
        values = values.flip(0).clamp_min(0)
        return values[:k], vectors.T.flip(0)[:k], values.sum()

    def settled(self, k, tau):
        """Whether the leading directions are those of the batch before."""
        _, vectors, _ = self.components(k)
        before, self.vectors = self.vectors, vectors
        return before is not None and bool(((before * vectors).sum(1).abs() >= tau).all())


@register("eva")
class EVA(Init):
    """EVA: A = leading principal directions of the layer's own inputs [tokens, d_in]; ranks go where they explain most.

    Paischer et al. 2024, algorithm 1. Ranks are pooled by explained-variance ratio: the sum stays rank x layers, a layer
    gets from none to rho x rank. s = alpha / rank stays. The covariance is accumulated exactly, where PEFT updates an
    incremental PCA, so batches smaller than the rank count too; padding is left out."""

    paper = "EVA, arXiv 2410.07170"
    also = ("budget",)
    needs = frozenset({"low_rank", "input"})
    data = True

    @dataclass
    class Config(InitConfig):
        batches: int = 16  # at most
        rho: float = 2.0  # no layer gets more than rho x rank; 1: all get the same
        tau: float = 0.99  # stop when no leading direction turns by more than this cosine; 1: never
        whiten: bool = False  # divide directions by the root of their singular values

        def check(self):
            if self.batches < 1 or self.rho < 1 or not 0 < self.tau <= 1:
                raise UserError(
                    f"batches={self.batches}, rho={self.rho}, tau={self.tau}: batches and rho are at least 1, tau in (0, 1]"
                )

    def start(self, stage):
        c = self.config
        ranks = {site.name: low.rank for site, low in self.adapter.low_ranks()}
        sizes = {site.name: min(site.d_in, site.d_out) for site, _ in self.adapter.low_ranks()}
        most = {n: min(round(c.rho * r), sizes[n]) for n, r in ranks.items()}
        seen = {n: Moments() for n in ranks}

        def use(name, x):
            if name in seen:
                seen[name].add(x)

        def done():
            return c.tau < 1 and all([m.settled(most[n], c.tau) for n, m in seen.items()])

        probe.each_input(stage, c.batches, use, done)
        found = {n: seen[n].components(most[n]) for n in ranks}
        pooled = torch.cat([values / total.clamp_min(1e-300) for values, _, total in found.values()])
        kept = torch.zeros_like(pooled, dtype=torch.bool)
        kept[pooled.argsort(descending=True, stable=True)[: sum(ranks.values())]] = True
        share = dict(zip(found, kept.split([len(v) for v, _, _ in found.values()]), strict=True))
        for site, low in self.adapter.low_ranks():
            values, vectors, _ = found[site.name]
            a = vectors[share[site.name]]
            if c.whiten:
                a = a / values[share[site.name]].sqrt().sqrt().clamp_min(1e-12)[:, None]
            low.start(a.to(low.A.dtype))

    def counters(self):
        return {"layers_without_rank": sum(low.rank == 0 for _, low in self.adapter.low_ranks()),
                "rank_total": sum(low.rank for _, low in self.adapter.low_ranks())}  # fmt: skip
