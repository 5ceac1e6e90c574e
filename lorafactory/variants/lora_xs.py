import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from .. import linalg
from ..adapter import Additive, Base, Elastic, linear
from ..adapter.bank import checksum
from ..adapter.ranked import Ranked, RankedConfig
from ..errors import UserError
from ..registry import register

OF_WEIGHT, OF_CHANCE = ("top", "bottom"), ("random_svd", "random")


def uniform(like: torch.Tensor, n: int) -> torch.Tensor:
    return torch.empty_like(like).uniform_(-1, 1) / math.sqrt(n)


def triplets(w: torch.Tensor, rank: int, which: str = "top", niter: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(A = Sigma Q^T [rank, d_in], B = P [d_out, rank]) of w = P Sigma Q^T. The largest entry of every column of P is
    positive: an SVD leaves the signs open, and R would mean something else under others."""
    u, s, vt = linalg.truncated_svd(w, min(w.shape) if which == "bottom" else rank, niter)
    u, s, vt = u[:, -rank:], s[-rank:], vt[-rank:]
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return (s * sign[0])[:, None] * vt, u * sign


class LoRAXSDelta(Elastic, Additive):
    """W = W0 + s B R A; R [rank, rank] trained, A [rank, d_in] and B [d_out, rank] frozen and the layer's own"""

    base: Base

    def __init__(self, site, rank: int, scale: float, c):
        super().__init__()
        self.__dict__["base"] = site.base
        self.d_in, self.d_out, self.dropout, self.c = site.d_in, site.d_out, c.dropout, c
        self.R = nn.Parameter(site.new(rank, rank).normal_(0, c.core_std))
        self.register_buffer("A", site.new(rank, site.d_in), persistent=c.save_factors)
        self.register_buffer("B", site.new(site.d_out, rank), persistent=c.save_factors)
        self.register_buffer("scale", site.new(fill=scale))
        if not c.save_factors:
            self.register_buffer("checksum", torch.zeros(rank, dtype=torch.long, device=self.A.device))

    def shapes(self):
        factors = {"A": ("r", self.d_in), "B": (self.d_out, "r")} if self.c.save_factors else {"checksum": ("r",)}
        return {"R": ("r", "r"), "scale": (), **factors}

    @property
    def rank(self):
        return len(self.R)

    def drawn(self, rank: int):
        """A and B, of the weight or at random."""
        w = self.base.weight.detach().to(self.R.dtype)
        if self.c.factors in OF_WEIGHT:
            return triplets(w, rank, self.c.factors, self.c.niter)
        if self.c.factors == "random_svd":
            return triplets(uniform(w, self.d_in), rank)
        return uniform(w[:rank], rank), uniform(w[:, :rank], self.d_out)

    def hold(self, rank: int):
        self.A, self.B = (t.contiguous() for t in self.drawn(rank))
        if not self.c.save_factors:
            self.checksum = checksum(rank, self.A, self.B.mT).to(self.A.device)

    def complaints(self, saved):
        bad = super().complaints(saved)
        if bad or self.c.save_factors:
            return bad
        rank = len(saved["R"])
        a, b = self.drawn(rank)
        if torch.equal(checksum(rank, a, b.mT), saved["checksum"].cpu()):
            return []
        return ["checksum: the SVD of the weight is another one on this machine: train with save_factors=true"]

    def allocate(self, saved):
        super().allocate(saved)
        if not self.c.save_factors:
            self.hold(len(saved["R"]))

    def factors(self):
        return self.B @ (self.scale * self.R), self.A

    def randomize(self):
        nn.init.normal_(self.R)

    def thin(self, x):
        return linear(self.drop(x), self.A, self.scale * self.R), self.B


@register("lora_xs")
class LoRAXS(Ranked):
    """LoRA-XS: W = W0 + (alpha / rank) B R A; R [rank, rank] alone trains, B = P_r and A = Sigma_r Q_r^T of W0 = P Sigma Q^T.

    Balazy et al. 2024. Nothing is shared, and the count, rank^2 a layer, does not depend on the layer's size. R starts at
    N(0, core_std^2): near zero, not zero (core_std=0 starts at zero, and trains, for A and B are not). Sigma is in A, as in
    the authors' code, whose other choices of A and B are here, too: the last triplets, those of a random matrix (theirs is
    uniform by d_out, ours, as a fresh layer of PyTorch, by d_in) and plain uniform ones.

    A checkpoint holds A and B: a recomputed SVD may differ in its last digits, or where singular values are near each other
    in its vectors, and R would mean something else. With save_factors=false it holds rank^2 numbers and a checksum a layer;
    the SVD is done again when loading, and where it is not the same to the last bit, that is refused.

    Cost: rank (d_in + rank + d_out) products a position; at the start an SVD of every layer."""

    paper = "LoRA-XS, arXiv 2405.17604"
    gives = frozenset({"additive", "weight"})
    zero_start = False

    @dataclass
    class Config(RankedConfig):
        """factors: top or bottom (the first or last triplets of W0), random_svd (the first of a random matrix) or random;
        niter: 0, an exact SVD; else a randomised one's power iterations; core_std: of R's start."""

        factors: str = "top"
        niter: int = 0
        core_std: float = 1e-5
        save_factors: bool = True

        def check(self):
            super().check()
            self.check_least(0, "niter", "core_std")
            self.check_choices(factors=OF_WEIGHT + OF_CHANCE)
            if self.niter and self.factors != "top":
                raise UserError(f"niter is {self.niter} beside factors={self.factors}: a randomised SVD gives the top alone")
            if not self.save_factors and (self.niter or self.factors in OF_CHANCE):
                raise UserError("save_factors is false beside factors that chance decides: they could not be computed again")

    def build(self, site, make):
        return LoRAXSDelta(site, self.fitting(site), self.scale(site), self.config)

    def begin(self, stage):
        if stage.index == 0 and not self.adapter.started:
            for _, d in self.adapter.inside(LoRAXSDelta):
                d.hold(d.rank)
