from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter import Delta, LowRank, linear
from ..adapter.ranked import Ranked, RankedConfig
from ..errors import UserError
from ..registry import register

GATES, STARTS = ("full", "low", "none"), ("zero", "uniform")


class GatedDelta(Delta):
    """y = W0 x + sigmoid(G x) * s B A x + R x; the gate G and the residual R, both [d_out, d_in], may be missing

    gate: the matrices whose product G is, first the one that reads x."""

    def __init__(self, low_rank: LowRank, gate: list[torch.Tensor], residual: torch.Tensor | None):
        super().__init__()
        self.gated = low_rank  # a name of its own: a LoRA must not load it
        self.gate = nn.ParameterList(gate)
        self.register_parameter("residual", None if residual is None else nn.Parameter(residual))

    @property
    def mergeable(self):
        return not len(self.gate)

    def weight(self, base):
        w = base.weight + self.gated.product()
        return w if self.residual is None else w + self.residual

    def update(self, x, base, y):
        u = self.gated(x)
        if len(self.gate):
            u = torch.sigmoid(linear(x, *self.gate)).to(u.dtype) * u
        return u if self.residual is None else u + linear(x, self.residual)


@register("gated_lora")
class GatedLoRA(Ranked):
    """LoLA-SpecViT's layer: y = W0 x + sigmoid(G x) * (alpha / rank) B A x + R x, G and R whole trained matrices.

    Zidi et al. 2025, by the authors' code, where the switches are its ablations. G and R are [d_out, d_in], so this trains
    more than full fine-tuning; G and R start uniform as A does, and since R x counts from the first step, their layer is
    not the base's then: here R starts at zero unless residual_start says uniform. gate=low is ours, G = G_2 G_1 through
    gate_rank. R could be folded into W0; with a gate no weight equals the whole. Their schedule is a part of its own.

    Cost: 2 d_in d_out products a position beside the base's; gate_rank (d_in + d_out) for a gate that is low."""

    paper = "LoLA-SpecViT, arXiv 2506.17759"
    gives = frozenset({"low_rank", "input"})

    @dataclass
    class Config(RankedConfig):
        """gate: full, low or none; gate_rank: of a low one; residual: whether there is R; residual_start: zero or uniform."""

        rank: int = 16
        alpha: float = 32.0
        gate: str = "full"
        gate_rank: int = 4
        residual: bool = True
        residual_start: str = "zero"

        def check(self):
            super().check()
            self.check_choices(gate=GATES, residual_start=STARTS)
            self.check_least(1, "gate_rank")
            if self.gate_rank != 4 and self.gate != "low":
                raise UserError(f"gate_rank is {self.gate_rank}, but the gate is {self.gate}: leave it out")
            if self.residual_start != "zero" and not self.residual:
                raise UserError("residual_start is 'uniform', but there is no residual: leave it out")
            if self.gate == "none" and not self.residual:
                raise UserError("without a gate and a residual this is lora: take that")

        def gives(self):
            return super().gives() | ({"weight"} if self.gate == "none" else set())

    def build(self, site, make):
        c, d_in, d_out = self.config, site.d_in, site.d_out
        shapes = {"none": [], "full": [(d_out, d_in)], "low": [(c.gate_rank, d_in), (d_out, c.gate_rank)]}
        gate = [uniform(site.new(*shape)) for shape in shapes[c.gate]]
        residual = site.new(d_out, d_in) if c.residual else None
        if residual is not None and c.residual_start == "uniform":
            uniform(residual)
        return GatedDelta(self.low_rank(site), gate, residual)


def uniform(t: torch.Tensor) -> torch.Tensor:
    """U(-1/sqrt(d_in), 1/sqrt(d_in)) for t [d_out, d_in], as A starts."""
    bound = t.shape[1] ** -0.5
    return t.uniform_(-bound, bound)
