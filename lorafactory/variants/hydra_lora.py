import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Delta, LowRank, linear
from ..adapter.ranked import Ranked, RankedConfig
from ..registry import register


class HydraDelta(Delta):
    """update = s sum_i w_i B_i A x, w = softmax(G x); the B_i [d_out, rank] are one tall B [experts d_out, rank]"""

    mergeable = False

    def __init__(self, low_rank: LowRank, site, experts: int):
        super().__init__()
        self.low_rank, self.experts = low_rank, experts
        bound = 1 / math.sqrt(site.d_in)
        self.router = nn.Parameter(low_rank.A.new_empty(experts, site.d_in).uniform_(-bound, bound))

    def gates(self, x):
        """w [..., experts], in float32 or wider."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.router.dtype), self.router).softmax(-1)

    def update(self, x, base, y):
        # sum_i w_i B_i z = [B_1 ... B_E] (w outer z): no output is formed for each expert
        b, a = self.low_rank.factors()
        z = linear(self.low_rank.drop(x), a)
        mixed = (self.gates(x)[..., :, None] * z[..., None, :]).flatten(-2)
        return linear(mixed, b.unflatten(0, (self.experts, -1)).transpose(0, 1).flatten(1))


@register("hydra_lora")
class HydraLoRA(Ranked):
    """HydraLoRA: y = W0 x + s sum_i w_i(x) B_i A x, w = softmax(G x): one A, several B, routed token by token.

    Tian et al. 2024. G starts as A does and reads x undropped, in float32. The authors' code draws a dropout for each
    B, here all share A's; the paper finds the number of experts by clustering the training data, here it is given. No
    loss balances them. No weight equals it, so it is never merged.

    Cost: rank (d_in + experts d_out) products a position, and experts d_in for the router."""

    paper = "HydraLoRA, arXiv 2404.19245"
    also = ("routing",)
    gives = frozenset({"low_rank", "input"})

    @dataclass
    class Config(RankedConfig):
        """experts: how many B a layer."""

        experts: int = 3

        def check(self):
            super().check()
            self.check_least(1, "experts")

    def build(self, site, make):
        k = self.config.experts
        return HydraDelta(self.low_rank(site, k * site.d_out), site, k)

    def counters(self):
        routed = [d for _, d in self.adapter.inside(HydraDelta)]
        return {"routed_layers": len(routed), "experts": sum(d.experts for d in routed)}
