from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Copy, Delta, Part, linear
from ..errors import UserError
from ..registry import RoutingConfig, register


class Mixture(Delta):
    """update = sum_k w_k update_k(x), w = softmax(G x); router G [experts, d_in] trained"""

    mergeable = False

    def __init__(self, experts: list[Delta], site, std: float):
        super().__init__()
        like = site.base.weight
        self.experts = nn.ModuleList(experts)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.router = nn.Parameter(torch.randn(len(experts), site.d_in, dtype=dtype, device=like.device) * std)

    def gates(self, x):
        """w [..., experts], in float32 or wider."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.router.dtype), self.router).softmax(-1)

    def pairs(self, base):
        """(B_k, A_k) of every expert; None where an expert is more than that: a shift, a dropout of its own."""
        if self.training and any(getattr(m, "dropout", 0.0) for m in self.experts.modules()):
            return None
        found = [e.factors() for e in self.experts if e.shift(base) is None]
        return found if len(found) == len(self.experts) and None not in found else None

    def update(self, x, base, y):
        weights = self.gates(x).unbind(-1)
        if (pairs := self.pairs(base)) is None:
            return sum(w[..., None] * e.update(x, base, y) for w, e in zip(weights, self.experts, strict=True))
        # sum_k w_k B_k A_k x = [B_1 ... B_E] (w * [A_1; ...; A_E] x): no output is formed for each expert
        b, a = zip(*pairs, strict=True)
        each = torch.cat([w[..., None].expand(*w.shape, len(rows)) for w, rows in zip(weights, a, strict=True)], -1)
        return linear(linear(x, torch.cat(a)) * each, torch.cat(b, 1))


@register("molora")
class MoLoRA(Part):
    """MoLoRA: y = W0 x + sum_k w_k(x) update_k(x), w = softmax(G x): every token mixes all of its experts' outputs.

    Zadouri et al. 2023. An expert is whatever the rest of the composite builds: `lora` pairs, each with an A and a B of
    its own; over `ia3` it is the paper's MoV, y = (sum_k w_k l_k) * W0 x. The router reads x before any dropout; no
    loss balances the experts. One expert is the plain delta.

    Cost: experts times the inner update, and experts d_in products a position for the router; low-rank experts without
    dropout run as one pair of rank experts rank."""

    paper = "MoLoRA, arXiv 2309.05444"
    axis = "routing"
    needs = frozenset({"weight"})
    minds = frozenset({"shares every number"})  # its experts would be one

    @dataclass
    class Config(RoutingConfig):
        """experts a layer; router_std: G starts at N(0, router_std^2)."""

        experts: int = 4
        router_std: float = 0.02

        def check(self):
            self.check_least(1, "experts")
            if self.router_std < 0:
                raise UserError(f"router_std is {self.router_std}; it must be 0 or more")

    def build(self, site, make):
        first = make(site)
        if first is None or isinstance(first, Copy) or not site.is_linear:
            return first  # an embedding, a norm, a tied weight: there is one
        return Mixture([first, *(make(site) for _ in range(self.config.experts - 1))], site, self.config.router_std)

    def counters(self):
        mixed = [d for _, d in self.adapter.inside(Mixture)]
        return {"routed_layers": len(mixed), "experts": sum(len(d.experts) for d in mixed)}
