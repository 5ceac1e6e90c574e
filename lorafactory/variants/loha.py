from dataclasses import dataclass

import torch.nn as nn

from .. import linalg
from ..adapter import exact, linear, numbers
from ..adapter.lycoris import Lycoris, LycorisConfig, LycorisDelta, uniform
from ..kernels import Once, held
from ..registry import register

STARTS = ("uniform", "normal")


class LoHaDelta(LycorisDelta):
    """W = W0 + s (B1 A1) * (B2 A2), entry by entry; B1, B2 [d_out, rank] and A1, A2 [rank, d_in] trained"""

    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}

    def __init__(self, site, rank: int, scale: float, c):
        super().__init__(site.new(fill=scale), c)
        self.d_in, self.d_out, self.once = site.d_in, site.d_out, Once()
        self.B1, self.A1 = nn.Parameter(site.new(site.d_out, rank)), nn.Parameter(site.new(rank, site.d_in))
        self.B2, self.A2 = nn.Parameter(site.new(site.d_out, rank)), nn.Parameter(site.new(rank, site.d_in))
        if c.start == "normal":
            nn.init.normal_(self.B1, std=0.1)
            nn.init.normal_(self.A1)
            nn.init.normal_(self.A2)  # B2 is zero
        else:
            for p in (self.B1, self.A1, self.B2):  # A2 is zero
                uniform(p)

    def shapes(self):
        left, right = (self.d_out, "r"), ("r", self.d_in)
        return {"B1": left, "A1": right, "B2": left, "A2": right, "scale": ()}

    @property
    def rank(self):
        return len(self.A1)

    def factors(self):
        return linalg.hadamard(self.B1 * self.scale, self.A1, self.B2, self.A2)

    def randomize(self):
        uniform(self.B2)
        uniform(self.A2)

    def dense(self, b1, a1, b2, a2):
        return (b1 * self.scale @ a1) * (b2 @ a2)

    def gradients(self, g, b1, a1, b2, a2):
        """Of three dense matrices backward keeps one, and forms two again."""
        g = g * self.scale
        g1, g2 = g * (b2 @ a2), g * (b1 @ a1)
        return g1 @ a1.T, b1.T @ g1, g2 @ a2.T, b2.T @ g2

    def weight(self, base):
        return base.weight + self.dense(self.B1, self.A1, self.B2, self.A2)

    def product(self, x):
        if self.rank**2 * (self.d_in + self.d_out) < self.d_in * self.d_out:
            b, a = self.factors()
            return linear(x, a, b)
        with exact():
            pairs = self.B1, self.A1, self.B2, self.A2
            update = held(self.once, self.dense, self.gradients, pairs, lambda: numbers(self))
        return linear(x, update)


@register("loha")
class LoHa(Lycoris):
    """LoHa: W = W0 + (alpha / rank) (B1 A1) * (B2 A2), entry by entry, all four trained: an update of rank up to rank^2.

    Hyeon-Woo et al. 2021 (FedPara), prop. 1, as an adapter: Yeh et al. 2023 (LyCORIS, arXiv 2309.14859). It is LoRA where
    B2 A2 is all ones. One tensor is zero at first: A2, the others uniform (PEFT), or B2, the others normal (LyCORIS). The
    four count what a LoRA of twice the rank counts.

    Cost: the product is a pair of rank rank^2 (Khatri-Rao), so rank^2 (d_in + d_out) products a position; where that is
    more than d_in d_out the update [d_out, d_in] is formed instead, once an optimiser step (kernels.held), as LyCORIS and
    PEFT always do, in every pass."""

    paper = "FedPara, arXiv 2108.06098"
    gives = frozenset({"additive", "weight"})
    kind = "LOHA"

    @dataclass
    class Config(LycorisConfig):
        """start: uniform (PEFT's; A2 zero) or normal (LyCORIS': B1 ~ N(0, 0.01), A1, A2 ~ N(0, 1), B2 zero)."""

        rank_dropout_scale: bool = True
        start: str = "uniform"

        def check(self):
            super().check()
            self.check_choices(start=STARTS)

    def build(self, site, make):
        return LoHaDelta(site, self.fitting(site), self.scale(site), self.config)
