from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter import Additive, Elastic, linear
from ..adapter.ranked import Ranked, RankedConfig
from ..errors import UserError
from ..registry import register

STARTS = ("kaiming", "orthogonal", "normal", "identity", "pairs")


def mixer(start: str, rank: int) -> torch.Tensor:
    """M [rank, rank] as it starts."""
    if start == "normal":
        return torch.randn(rank, rank)
    if start == "orthogonal":
        return nn.init.orthogonal_(torch.empty(rank, rank))
    if start == "identity":
        return torch.eye(rank)
    if start == "pairs":
        return torch.eye(rank // 2).repeat(2, 2)
    bound = rank**-0.5
    return torch.empty(rank, rank).uniform_(-bound, bound)


class MoSLoRADelta(Elastic, Additive):
    """W = W0 + s B M A; A [rank, d_in], M [rank, rank], B [d_out, rank] trained"""

    def __init__(self, site, rank: int, scale: float, c):
        super().__init__()
        self.d_in, self.d_out, self.dropout = site.d_in, site.d_out, c.dropout
        bound = site.d_in**-0.5
        self.A = nn.Parameter(site.new(rank, site.d_in).uniform_(-bound, bound))
        self.M = nn.Parameter(mixer(c.start, rank).to(self.A), requires_grad=not c.frozen)
        self.B = nn.Parameter(site.new(site.d_out, rank))
        self.register_buffer("scale", site.new(fill=scale))

    def shapes(self):
        return {"A": ("r", self.d_in), "M": ("r", "r"), "B": (self.d_out, "r"), "scale": ()}

    @property
    def rank(self):
        return len(self.A)

    def factors(self):
        return self.B, self.scale * self.M @ self.A

    def randomize(self):
        bound = self.d_in**-0.5
        nn.init.uniform_(self.B, -bound, bound)

    def thin(self, x):
        return linear(self.drop(x), self.A, self.scale * self.M), self.B


@register("moslora")
class MoSLoRA(Ranked):
    """MoSLoRA: W = W0 + (alpha / rank) B M A: a trained mixer M [rank, rank] fuses every subspace of A with every one of B.

    Wu et al. 2024. A [rank, d_in] starts as in LoRA and B [d_out, rank] at zero, so M must start elsewhere; the authors'
    code has Kaiming-uniform (a = sqrt 5), and orthogonal, normal and the identity beside it. `pairs` is [[I, I], [I, I]],
    which sums the two halves of A and of B: frozen, it is the fixed mixer of two subspaces that the paper starts from, an
    update of half the rank. Frozen at the identity it is LoRA, so that is refused.

    Cost: rank (d_in + rank + d_out) products a position."""

    paper = "MoSLoRA, arXiv 2406.11909"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(RankedConfig):
        """start: of M, kaiming, orthogonal, normal, identity or pairs (of an even rank); frozen: M stays as it starts."""

        start: str = "kaiming"
        frozen: bool = False

        def check(self):
            super().check()
            self.check_choices(start=STARTS)
            if self.frozen and self.start == "identity":
                raise UserError("frozen at start='identity', M changes nothing: take lora, or another start")

    def build(self, site, make):
        rank = self.fitting(site)
        if self.config.start == "pairs" and rank % 2:
            raise UserError(f"start is 'pairs' and the rank of {site.name} is {rank}; it must be even")
        return MoSLoRADelta(site, rank, self.scale(site), self.config)
