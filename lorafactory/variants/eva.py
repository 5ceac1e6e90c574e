from dataclasses import dataclass

import torch

from .. import linalg, probe
from ..adapter import Init
from ..errors import UserError
from ..registry import InitConfig, register


class Components:
    """The leading k principal directions of rows [n, d] that come in batches: incremental PCA (Ross et al. 2008).

    v [k, d]: the directions; s [k]: the singular values of all centred rows along them; total: the sum of all their
    squares. Nothing else of a batch is kept. turned [k]: |cosine| of each direction with the one a batch before."""

    def __init__(self, k, niter):
        self.k, self.niter, self.needed = k, niter, k  # needed: how many of them have to settle
        self.n, self.mean, self.total = 0, 0.0, 0.0
        self.s = self.v = self.turned = None

    def add(self, x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        n, mean = len(x), x.mean(0)
        shift = (mean - self.mean) * (self.n * n / (self.n + n)) ** 0.5
        old = [] if self.v is None else [self.s[:, None] * self.v, shift[None]]
        _, self.s, v = linalg.truncated_svd(torch.cat([*old, x - mean]), self.k, self.niter)
        same = self.v is not None and self.v.shape == v.shape
        self.turned = (self.v * v).sum(1).abs() if same else torch.zeros_like(self.s)
        self.v = v
        self.total += float((x - mean).double().square().sum() + shift.double().square().sum())
        self.mean = self.mean + (mean - self.mean) * (n / (self.n + n))
        self.n += n

    def settled(self, tau):
        return tau < 1 and self.turned is not None and bool((self.turned[: self.needed] >= tau).all())

    def explained(self):
        """Share of the variance along each direction, [k], largest first."""
        return self.s.double().square() / max(self.total, 1e-300)


@register("eva")
class EVA(Init):
    """EVA: A = leading principal directions of the layer's own inputs [tokens, d_in]; ranks go where they explain most.

    Paischer et al. 2024, algorithm 1. Ranks are pooled by explained-variance ratio: their sum stays, a layer gets from
    none to rho x rank. s = alpha / rank stays. A layer is done when the directions that it would get turn by less than
    the cosine tau in a batch. Layers that read one tensor (query, key, value) share one PCA; padding is left out. The
    PCA is incremental, as the authors': a covariance would take d_in^2 numbers a layer, its eigenvectors d_in^3
    operations a batch. PEFT skips batches smaller than the rank and goes round the data until all is settled."""

    paper = "EVA, arXiv 2410.07170"
    also = ("budget",)
    needs = frozenset({"low_rank", "input"})
    data = True

    @dataclass
    class Config(InitConfig):
        batches: int = 16  # at most
        rho: float = 2.0  # no layer gets more than rho x rank; 1: all get the same
        tau: float = 0.99  # 1: no layer is ever done
        whiten: bool = False  # divide directions by the root of their singular values
        niter: int = 4  # of a randomised SVD; 0: the exact one

        def check(self):
            if self.batches < 1 or self.rho < 1 or not 0 < self.tau <= 1 or self.niter < 0:
                raise UserError(
                    f"batches={self.batches}, rho={self.rho}, tau={self.tau}, niter={self.niter}: "
                    "batches and rho are at least 1, tau lies in (0, 1], niter is at least 0"
                )

    def start(self, stage):
        c = self.config
        found = self.components(stage)
        shares, budget = self.shares(found), self.budget()
        if sum(shares.values()) < budget:
            raise UserError(f"the batches hold {sum(shares.values())} directions for {budget} ranks: give more or larger ones")
        for site, low in self.adapter.low_ranks():
            pca, r = found[site.name], shares[site.name]
            size = pca.s[:r].clamp_min(1e-6 * float(pca.s[0])).sqrt() if c.whiten else torch.ones_like(pca.s[:r])
            low.start((pca.v[:r] / size[:, None]).to(low.A))

    def components(self, stage):
        """site name -> Components; one and the same for sites that read one tensor."""
        c, found, last = self.config, {}, [None, ""]
        k = max(self.most().values())

        def use(name, x):
            if x is not last[0]:
                last[:] = x, name
            pca = found.setdefault(name, found.get(last[1]) or Components(k, c.niter))
            if name == last[1] and not pca.settled(c.tau):
                pca.add(x)

        def done():
            if len(found) < len(self.most()):
                return False
            shares = self.shares(found)
            for pca in found.values():
                pca.needed = max(shares[n] for n in found if found[n] is pca)
            return all(pca.settled(c.tau) for pca in found.values())

        probe.each_input(stage, c.batches, use, done)
        return found

    def most(self):
        """site name -> the rank that it may get."""
        return {s.name: min(round(self.config.rho * low.rank), s.d_in, s.d_out) for s, low in self.adapter.low_ranks()}

    def budget(self):
        return sum({s.name: low.rank for s, low in self.adapter.low_ranks()}.values())

    def shares(self, found):
        """site name -> the rank that it gets: of all layers' directions the best, as many as there were ranks."""
        ratios = [found[n].explained()[:m].cpu() for n, m in self.most().items()]
        pooled = torch.cat(ratios)
        kept = torch.zeros_like(pooled, dtype=torch.bool)
        kept[pooled.argsort(descending=True, stable=True)[: self.budget()]] = True
        return dict(zip(self.most(), (int(part.sum()) for part in kept.split([len(r) for r in ratios])), strict=True))

    def counters(self):
        return {"layers_without_rank": sum(low.rank == 0 for _, low in self.adapter.low_ranks()),
                "rank_total": sum(low.rank for _, low in self.adapter.low_ranks())}  # fmt: skip
