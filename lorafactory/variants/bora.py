from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Decomposition, Delta, Wrapper, alike, length
from ..kernels import squares
from ..registry import DecompositionConfig, register


class BoRADelta(Wrapper):
    """W = diag(r) V diag(c), r = rows / rho, c = columns / kappa; magnitudes rows [d_out] and columns [d_in] trained

    A row or column of W0 that is all zero has no direction: there the norm counts as 1 and the magnitude starts at 1."""

    def __init__(self, inner: Delta, site):
        super().__init__(inner)
        self.columns_first = False
        w = site.base.weight.detach()
        for axis, name in enumerate(("columns", "rows")):
            square = squares(w, axis)
            self.register_buffer(f"some_{name}", square > 0, persistent=False)
            self.register_parameter(name, nn.Parameter(length(square)))

    def norm(self, base, axis, weights=None):
        """The norms of V's rows (axis 1) or columns (axis 0), the squares weighted."""
        return length(self.sqnorm(base, axis, weights), self.some_rows if axis else self.some_columns)

    def norms(self, base):
        """rho [d_out], kappa [d_in]."""
        if self.columns_first:
            kappa = self.norm(base, 0)
            return self.norm(base, 1, (self.columns / kappa).square()), kappa
        rho = self.norm(base, 1)
        return rho, self.norm(base, 0, (self.rows / rho).square())

    def gains(self, base):
        """r, c."""
        rho, kappa = self.steady(lambda: self.norms(base), base.module)
        return self.rows / rho, self.columns / kappa

    def weight(self, base):
        r, c = self.gains(base)
        return r[:, None] * self.inner.weight(base) * c

    def forward(self, x, base):
        if not alike(x, self.rows):
            return super().forward(x, base)  # c x in a narrow dtype would lose a c near 1
        r, c = self.gains(base)
        return self.rescaled(c * x, base, r)

    def update(self, x, base, y):
        # with x' = x + (c - 1) x: r V x' - W0 x, and near r = c = 1 no digits cancel
        r, c = self.gains(base)
        moved = (c - 1) * x
        more = F.linear(moved.to(x.dtype), base.weight.to(x.dtype))
        base_part = y if base.bias is None else y - base.bias
        _, update = self.split(x + moved, base, y + more)
        return self.joined((r - 1) * base_part + r * (more + update), base)


@register("bora")
class BoRA(Decomposition):
    """BoRA: W = diag(m_r / rho) V diag(m_c / kappa), V = W0 + update; magnitudes m_r [d_out] and m_c [d_in] trained.

    Wang et al. 2024: DoRA on both sides. rho are the norms of V's rows, kappa those of the columns of diag(m_r / rho) V, so
    W's columns have length |m_c|; that rows come first is what two independent implementations have, `columns_first` is
    the other order. There is no official code: that the norms are constants in the backward pass, as in DoRA, is inferred.
    Both magnitudes start at the norms of W0. (Block-diversified BoRA is another method.)

    Cost: the norms once an optimiser step (kernels.sqnorm, twice), then one pass over the input, one over the output.
    Beside a base of another dtype W0 is multiplied twice."""

    paper = "BoRA, arXiv 2412.06441"
    delta = BoRADelta
    minds = frozenset({"scales rows"})  # m_r / rho undoes it

    @dataclass
    class Config(DecompositionConfig):
        """detach_norm: rho and kappa are constants in the backward pass; columns_first: W's rows have length |m_r|."""

        detach_norm: bool = True
        columns_first: bool = False

    def build(self, site, make):
        delta = super().build(site, make)
        if isinstance(delta, BoRADelta):
            delta.constant, delta.columns_first = self.config.detach_norm, self.config.columns_first
        return delta
