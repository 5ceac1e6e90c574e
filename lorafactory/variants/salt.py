from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter import Singular, Structure, linear
from ..adapter.ranked import fitting
from ..errors import UserError
from ..registry import StructureConfig, register

RELUS = ("all", "diagonal")


class SALTDelta(Singular):
    """W = U relu(Z) V^T; Z = diag(gain * S1 + offset) on the k1 largest singular values, diag(S2) + X Y on the k2 others;
    gain, offset [k1], X [k2, rank], Y [rank, k2] trained"""

    def __init__(self, site, k1: int, k2: int, rank: int, c):
        super().__init__(site, k1 + k2, c.save_basis)
        self.k1, self.k2, self.everywhere = k1, k2, c.relu == "all"
        self.gain, self.offset = nn.Parameter(site.new(k1, fill=1.0)), nn.Parameter(site.new(k1))
        self.X, self.Y = nn.Parameter(site.new(k2, rank)), nn.Parameter(site.new(rank, k2))
        if k2:
            nn.init.kaiming_uniform_(self.X, nonlinearity="relu")

    def trained(self):
        return {"gain": (self.k1,), "offset": (self.k1,), "X": (self.k2, "r"), "Y": ("r", self.k2)}

    def top(self):
        """What is added to S1, [k1]."""
        s = self.S[: self.k1]
        return torch.relu(self.gain * s + self.offset) - s

    def rest(self):
        """What is added to diag(S2), [k2, k2], where all of Z goes through the ReLU."""
        s = self.S[self.k1 :].diag()
        return torch.relu(s + self.X @ self.Y) - s

    def clipped(self):
        """What is added to S2 + X Y, [k2], where only Z's diagonal does."""
        new = self.S[self.k1 :] + (self.X * self.Y.T).sum(1)
        return torch.relu(-new)

    def randomize(self):
        nn.init.normal_(self.gain)
        nn.init.normal_(self.Y)

    def left(self):
        u1, u2 = self.U[:, : self.k1], self.U[:, self.k1 :]
        below = u2 @ self.rest() if self.everywhere else u2 @ self.X @ self.Y + u2 * self.clipped()
        return torch.cat([u1 * self.top(), below], 1)

    def core(self, z):
        z1, z2 = z[..., : self.k1], z[..., self.k1 :]
        below = linear(z2, self.rest()) if self.everywhere else linear(z2, self.Y, self.X) + self.clipped() * z2
        return torch.cat([(self.top() * z1).to(below.dtype), below], -1)


@register("salt")
class SALT(Structure):
    """SALT: W = U relu(Z) V^T, W0 = U diag(S) V^T, Z = [diag(a * S1 + c), 0; 0, diag(S2) + X Y].

    The k1 = ratio k largest singular values are scaled and shifted, and X Y [k2, k2] of rank `rank` is added between the
    other singular vectors.

    Elsayed et al. 2025. Y is zero at first (the authors' SAM 2 code; their first started X and Y at 0.01 N(0, 1), not at
    W0), X is U(-sqrt(6 / rank), sqrt(6 / rank)), which is what their Kaiming call draws: it ignores its `a`. Their ReLU is
    of the whole of Z. At zero its derivative is zero, so X Y learns first on its diagonal alone, and below zero never off
    it; relu=diagonal, ours, keeps singular values from changing sign and no more. Convolutions, which they adapt as
    matrices, are not sites here.

    Cost: k (d_in + d_out) products a position and k2^2 more, or 2 k2 rank with relu=diagonal; U and V in memory, twice the
    layer; an SVD of every layer at the start and at loading. The checkpoint has a mark of U and V, or with save_basis
    both."""

    paper = "SALT, arXiv 2503.16055"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """ratio: the share of singular values that are scaled and shifted, at least one; rank: of X Y; relu: of all of Z or
        of its diagonal; penalty: times |a * S1 + c - S1| + |X Y| of every layer; save_basis: keep U and V in the
        checkpoint, else their mark."""

        ratio: float = 0.5
        rank: int = 8
        relu: str = "all"
        penalty: float = 0.0
        save_basis: bool = False

        def check(self):
            if not 0 <= self.ratio <= 1:
                raise UserError(f"ratio is {self.ratio}; it must lie in [0, 1]")
            self.check_least(1, "rank")
            self.check_choices(relu=RELUS)
            if self.penalty < 0:
                raise UserError(f"penalty is {self.penalty}; it must not be negative")

    def build(self, site, make):
        k, c = min(site.d_out, site.d_in), self.config
        k1 = max(1, int(c.ratio * k))
        rank = fitting(c.rank, k - k1, site) if k > k1 else 1  # without others X and Y are empty
        return SALTDelta(site, k1, k - k1, rank, c)

    def penalises(self):
        return self.config.penalty > 0

    def penalty(self):
        if not self.penalises():
            return 0.0
        found = [d for _, d in self.adapter.inside(SALTDelta)]
        moved = [((d.gain - 1) * d.S[: d.k1] + d.offset).norm() + (d.X @ d.Y).norm() for d in found]
        return self.config.penalty * sum(moved)
