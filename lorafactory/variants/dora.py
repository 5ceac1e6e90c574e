import torch
import torch.nn as nn

from ..adapter import Base, Decomposition, Delta, Site, Wrapper
from ..registry import register


class DoRADelta(Wrapper):
    """W = diag(m / c) V; m [d_out] trained, c [d_out] the norms of V's rows, constant in the backward pass"""

    def __init__(self, inner: Delta, site: Site):
        super().__init__(inner)
        dtype = torch.promote_types(site.base.weight.dtype, torch.float32)
        self.magnitude = nn.Parameter(site.base.weight.detach().to(dtype).norm(dim=1))

    @torch.no_grad()
    def norm(self, base: Base) -> torch.Tensor:
        """c. With V = W0 + B A, without forming B A: c_i^2 = |W0_i|^2 + 2 <B_i, (W0 A^T)_i> + B_i A A^T B_i^T

        A row that is all zero has no direction: its norm counts as 1, so that the row is LoRA's and finite."""
        with torch.autocast(base.weight.device.type, enabled=False):
            factors = self.inner.factors()
            if factors is None:
                c = self.inner.weight(base).to(self.magnitude.dtype).norm(dim=1)
            else:
                b, a = factors
                w = base.weight.to(a.dtype)
                square = w.square().sum(1) + 2 * (b * (w @ a.T)).sum(1) + (b @ (a @ a.T) * b).sum(1)
                c = square.clamp_min(0).sqrt()
            return torch.where(c > 0, c, 1.0)

    def gain(self, base: Base) -> torch.Tensor:
        return self.magnitude / self.norm(base)

    def weight(self, base):
        return self.gain(base)[:, None] * self.inner.weight(base)

    def update(self, x, base, y):
        # (g - 1) y + g u: near g = 1, where training starts and mostly stays, no digits cancel
        g = self.gain(base)
        base_part, update = self.split(x, base, y)
        return self.joined((g - 1) * base_part + g * update, base)


@register("dora")
class DoRA(Decomposition):
    """DoRA: W = diag(m / |V|) V, V = W0 + update; magnitude m [d_out] trained, starting at the norms of W0's rows.

    Liu et al. 2024, eq. 5; the norm is a constant in the backward pass (sec. 4.3). The paper writes column norms of
    W [d_in, d_out]; its code, and we, take the norm of each output's row. V is any structure's weight: over `vera` it
    is DVoRA. Fast path: the factored norm (arXiv 2603.22276) where the inner update has factors."""

    paper = "DoRA, arXiv 2402.09353"
    delta = DoRADelta
