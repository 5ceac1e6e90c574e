from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter import Base, Decomposition, Delta, Site, Wrapper, length
from ..errors import UserError
from ..kernels import squares
from ..registry import DecompositionConfig, register


class DoRADelta(Wrapper):
    """W = diag(m / c) V; m [d_out] trained, c [d_out] the norms of V's rows

    A row of W0 that is all zero has no direction: there c counts as 1 and m starts at 1, so that the row starts as the
    inner delta has it and stays finite."""

    def __init__(self, inner: Delta, site: Site):
        super().__init__(inner)
        square = squares(site.base.weight.detach())  # once: the base is read-only
        self.square: torch.Tensor
        self.register_buffer("square", square, persistent=False)
        self.magnitude = nn.Parameter(length(square))

    def squares(self, base: Base) -> torch.Tensor:
        """|V_i|^2 [d_out]."""
        return self.sqnorm(base, own=self.square)

    def norm(self, base: Base) -> torch.Tensor:
        """c."""
        return length(self.squares(base), self.square > 0)

    def gain(self, base: Base) -> torch.Tensor:
        return self.magnitude / self.steady(lambda: self.norm(base), base.module)

    def weight(self, base):
        return self.gain(base)[:, None] * self.inner.weight(base)

    def forward(self, x, base):
        return self.rescaled(x, base, base(x), self.gain(base))

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

    Cost: beside LoRA's, the norms once an optimiser step (kernels.sqnorm: V itself is not kept where the inner update has
    thin factors) and a pass over the output (kernels.compose)."""

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
