from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter import Base, Decomposition, Delta, Site, Wrapper
from ..errors import UserError
from ..registry import DecompositionConfig, register


class DoRADelta(Wrapper):
    """W = diag(m / c) V; m [d_out] trained, c [d_out] the norms of V's rows

    A row of W0 that is all zero has no direction: there c counts as 1 and m starts at 1, so that the row starts as the
    inner delta has it and stays finite."""

    def __init__(self, inner: Delta, site: Site):
        super().__init__(inner)
        self.constant = True  # c, in the backward pass
        dtype = torch.promote_types(site.base.weight.dtype, torch.float32)
        square = site.base.weight.detach().to(dtype).square().sum(1)  # once: the base is read-only
        self.square: torch.Tensor
        self.register_buffer("square", square, persistent=False)
        self.magnitude = nn.Parameter(torch.where(square > 0, square, 1.0).sqrt())

    def squares(self, base: Base) -> torch.Tensor:
        """|V_i|^2 [d_out]. With V = W0 + B A, without forming B A: |W0_i|^2 + 2 <B_i, (W0 A^T)_i> + B_i A A^T B_i^T"""
        with torch.autocast(base.weight.device.type, enabled=False):
            factors = self.inner.factors()
            if factors is None or len(factors[1]) > min(base.shape):  # more ranks than V has: V itself is cheaper
                return self.inner.weight(base).to(self.magnitude.dtype).square().sum(1)
            b, a = factors
            w = base.weight.to(a.dtype)
            return self.square + 2 * (b * (w @ a.T)).sum(1) + (b @ (a @ a.T) * b).sum(1)

    def norm(self, base: Base) -> torch.Tensor:
        """c."""
        square = self.squares(base)
        return torch.where((self.square > 0) & (square > 0), square, 1.0).sqrt()

    def gain(self, base: Base) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.constant):
            c = self.norm(base)
        return self.magnitude / c

    def weight(self, base):
        return self.gain(base)[:, None] * self.inner.weight(base)

    def forward(self, x, base):
        # g (y + u - bias) + bias in two passes; rounded to y's dtype once, at the end
        y, b = base(x), self.bias(base)
        g = self.gain(base)
        v = y.to(g.dtype) + self.inner.update(x, base, y)
        return (g * v if b is None else torch.addcmul(b - g * b, g, v)).to(y.dtype)

    def update(self, x, base, y):
        # (g - 1) y + g u: near g = 1, where training starts and mostly stays, no digits cancel
        g = self.gain(base)
        base_part, update = self.split(x, base, y)
        return self.joined((g - 1) * base_part + g * update, base)


@register("dora")
class DoRA(Decomposition):
    """DoRA: W = diag(m / |V|) V, V = W0 + update; magnitude m [d_out] trained, starting at the norms of W0's rows.

    Liu et al. 2024, eq. 5. The paper writes column norms of W [d_in, d_out]; its code, and we, take the norm of each
    output's row. V is any structure's weight: over `vera` it is DVoRA. Dropout is of what A reads, as in LoRA; the
    authors' code also drops the inputs of (m / |V| - 1) W0 x.

    Cost: beside LoRA's, W0 A^T and three Gram products a forward pass (the factored norm of arXiv 2603.22276, |W0_i|^2
    computed once) where the inner update has thin factors, else V itself; and two passes over the output."""

    paper = "DoRA, arXiv 2402.09353"
    delta = DoRADelta
    minds = frozenset({"scales rows"})  # m / |V| undoes it

    @dataclass
    class Config(DecompositionConfig):
        """detach_norm: |V| is a constant in the backward pass (the paper's sec. 4.3); false: it is differentiated."""

        detach_norm: bool = True

    def build(self, site, make):
        delta = super().build(site, make)
        if isinstance(delta, DoRADelta):
            delta.constant = self.config.detach_norm
        return delta

    def to_peft(self, out):
        if out.fields["peft_type"] != "LORA":
            raise UserError(f"PEFT has {self.name} over a LoRA only")
        out.fields["use_dora"] = True
        for site, delta in self.adapter.inside(DoRADelta):
            norm = delta.squares(site.base).clamp_min(0).sqrt()  # PEFT divides by it where W0's row is zero, too
            if not norm.all():
                raise UserError(f"PEFT's DoRA would divide by zero: {site.name} has rows of zeros")
            m = torch.where(delta.square > 0, delta.magnitude, delta.magnitude * norm)
            out.layers[site.name]["lora_magnitude_vector"] = m

    @classmethod
    def from_peft(cls, saved):
        if not saved.fields.get("use_dora"):
            return None
        saved.drop("use_dora")
        return {}

    def fill(self, saved):
        for site, delta in self.adapter.inside(DoRADelta):
            saved.take(site.name, "lora_magnitude_vector", delta.magnitude)
            norm = delta.squares(site.base).clamp_min(0).sqrt()
            delta.magnitude.copy_(torch.where(delta.square > 0, delta.magnitude, delta.magnitude / norm))
