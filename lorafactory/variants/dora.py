from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn

from ..adapter import Additive, Base, Decomposition, Delta, LowRank, Site, Wrapper, length, linear
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

    def drop_base(self):
        """From now on dropout is this delta's: of all that it reads, but for one W0 x."""
        for m in (m for m in self.inner.modules() if isinstance(m, Additive | LowRank)):
            self.dropout, m.dropout = max(self.dropout, m.dropout), 0.0
        if not self.dropout:
            raise UserError("drop_base is true, of no effect: what is inside has no dropout of its input")

    def forward(self, x, base):
        if self.dropout and self.training:
            return super().forward(x, base)
        return self.rescaled(x, base, self.gain(base))

    def update(self, x, base, y):
        # (g - 1) y + g u: near g = 1, where training starts and mostly stays, no digits cancel
        g = self.gain(base)
        if self.dropout and self.training:
            x = self.drop(x)
            y = linear(x, base.weight) if base.bias is None else linear(x, base.weight) + base.bias
        base_part, update = self.split(x, base, y)
        return self.joined((g - 1) * base_part + g * update, base)


@register("dora")
class DoRA(Decomposition):
    """DoRA: W = diag(m / |V|) V, V = W0 + update; magnitude m [d_out] trained, starting at the norms of W0's rows.

    Liu et al. 2024, eq. 5. The paper writes column norms of W [d_in, d_out]; its code, and we, take the norm of each
    output's row. V is any structure's weight: over `vera` it is DVoRA. Dropout is of what A reads, as in LoRA. The
    authors' code and PEFT have y = W0 x + (m / |V| - 1) W0 x' + (m / |V|) B A x' with x' dropped: `drop_base`.

    Cost: beside LoRA's, the norms once an optimiser step (kernels.sqnorm: V itself is not kept where the inner update has
    thin factors) and a pass over the output (kernels.compose). Dropout with `drop_base` is a second product with W0."""

    paper = "DoRA, arXiv 2402.09353"
    delta = DoRADelta
    minds = frozenset({"scales rows"})  # m / |V| undoes it

    @dataclass
    class Config(DecompositionConfig):
        """detach_norm: |V| is a constant in the backward pass (the paper's sec. 4.3); false: it is differentiated. drop_base:
        the structure's dropout is also of what W0 reads in the change of W0 x."""

        detach_norm: bool = True
        drop_base: Optional[bool] = None  # noqa: UP045  None, not false: as if it were not there

    def build(self, site, make):
        delta = super().build(site, make)
        if isinstance(delta, DoRADelta):
            delta.constant = self.config.detach_norm
            if self.config.drop_base:
                delta.drop_base()
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
        return {"drop_base": True} if saved.fields.get("lora_dropout") else {}

    def fill(self, saved):
        for site, delta in self.adapter.inside(DoRADelta):
            saved.take(site.name, "lora_magnitude_vector", delta.magnitude)
            norm = delta.squares(site.base).clamp_min(0).sqrt()
            delta.magnitude.copy_(torch.where(delta.square > 0, delta.magnitude, delta.magnitude / norm))
