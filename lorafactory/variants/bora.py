from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Decomposition, Delta, Wrapper, exact
from ..registry import DecompositionConfig, register


class BoRADelta(Wrapper):
    """W = diag(r) V diag(c), r = rows / rho, c = columns / kappa; magnitudes rows [d_out] and columns [d_in] trained

    A row or column of W0 that is all zero has no direction: there the norm counts as 1 and the magnitude starts at 1."""

    def __init__(self, inner: Delta, site):
        super().__init__(inner)
        self.constant, self.columns_first = True, False
        w = site.base.weight.detach()
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        for name, dim in (("rows", 1), ("columns", 0)):
            norm = w.norm(dim=dim)
            self.register_buffer(f"some_{name}", norm > 0, persistent=False)
            self.register_parameter(name, nn.Parameter(torch.where(norm > 0, norm, 1.0)))

    def norm(self, m, name):
        """The norms of m's rows or columns."""
        norm = m.norm(dim=1 if name == "rows" else 0)
        return torch.where(getattr(self, f"some_{name}") & (norm > 0), norm, 1.0)

    def norms(self, base):
        """rho [d_out], kappa [d_in]."""
        v = self.inner.weight(base).to(self.rows.dtype)
        if self.columns_first:
            kappa = self.norm(v, "columns")
            return self.norm(v * (self.columns / kappa), "rows"), kappa
        rho = self.norm(v, "rows")
        return rho, self.norm((self.rows / rho)[:, None] * v, "columns")

    def gains(self, base):
        """r, c."""
        with exact(), torch.set_grad_enabled(torch.is_grad_enabled() and not self.constant):
            rho, kappa = self.norms(base)
        return self.rows / rho, self.columns / kappa

    def weight(self, base):
        r, c = self.gains(base)
        return r[:, None] * self.inner.weight(base) * c

    def forward(self, x, base):
        if x.dtype != self.rows.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, base)  # c x in a narrow dtype would lose a c near 1
        r, c = self.gains(base)
        x, b = c * x, self.bias(base)
        base_part, update = self.split(x, base, base(x))
        y = r * (base_part + update)
        return y if b is None else y + b

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

    Cost: V [d_out, d_in] is formed, without being kept, and read twice in every forward pass; then one pass over the
    input, one over the output. Beside a base of another dtype W0 is multiplied twice."""

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
