from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn

from ..adapter import Additive, Elastic, Structure
from ..adapter.ranked import fitting
from ..errors import UserError
from ..registry import StructureConfig, register


class Pool(Elastic):
    """The ranks that the layers of a kind share: A [k layers, d_in] and B [d_out, k layers], trained"""

    def __init__(self, site, ranks: int):
        super().__init__()
        self.d_in, self.d_out, bound = site.d_in, site.d_out, site.d_in**-0.5
        self.A = nn.Parameter(site.new(ranks, site.d_in).uniform_(-bound, bound))
        self.B = nn.Parameter(site.new(site.d_out, ranks))

    def shapes(self):
        return {"A": ("r", self.d_in), "B": (self.d_out, "r")}


class RaSADelta(Elastic, Additive):
    """W = W0 + [B, B_pool] diag(D) [A; A_pool]; A [rank - k, d_in], B [d_out, rank - k], D [rank - k + k layers] trained"""

    def __init__(self, pool: Pool, site, ranks: int, c):
        super().__init__()
        self.__dict__["pool"] = pool
        self.d_in, self.d_out, self.dropout, bound = site.d_in, site.d_out, c.dropout, site.d_in**-0.5
        self.A = nn.Parameter(site.new(ranks, site.d_in).uniform_(-bound, bound))
        self.B = nn.Parameter(site.new(site.d_out, ranks))
        each = [site.new(n, fill=0.5 * c.alpha / max(n, 1)) for n in (ranks, len(pool.A))]
        self.D = nn.Parameter(torch.cat(each))

    def shapes(self):
        return {"A": ("r", self.d_in), "B": (self.d_out, "r"), "D": ("all",)}

    def factors(self):
        return torch.cat([self.B, self.pool.B], 1) * self.D, torch.cat([self.A, self.pool.A])

    def randomize(self):
        for b in (self.B, self.pool.B):
            nn.init.uniform_(b, -(self.d_in**-0.5), self.d_in**-0.5)


@register("rasa")
class RaSA(Structure):
    """RaSA: W = W0 + [B, B_pool] diag(D) [A; A_pool]: each layer gives k of its ranks to a pool that all layers share.

    He et al., ICLR 2025. Layers of one kind (the same module of every block, of one shape) have one pool, A_pool
    [k layers, d_in] and B_pool [d_out, k layers]; a layer keeps A [rank - k, d_in] and B [d_out, rank - k] and weighs all
    of them by D, so that LoRA's parameters (and D) make an update of rank rank - k + k layers. Every A starts as in LoRA,
    every B at zero, and D at alpha / 2 over how many ranks there are of its own and of the pool's: nothing else scales. So
    with k = 0 it is a LoRA of half the scale. Their code does not merge; the formula does.
    No initialisation or budget of pairs: the pool's part of an update is other layers' as well, and D weighs both parts.

    Cost: (rank - k + k layers) (d_in + d_out) products a position."""

    paper = "RaSA, arXiv 2503.12576"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """rank: a layer's, shared ones included; shared: k of them, null: rank / 8, at least 1; alpha: settles where D
        starts; dropout: of what A reads."""

        rank: int = 8
        shared: Optional[int] = None  # noqa: UP045
        alpha: float = 16.0
        dropout: float = 0.0

        def check(self):
            self.check_least(1, "rank")
            if self.shared is not None and not 0 <= self.shared <= self.rank:
                raise UserError(f"shared is {self.shared}; it must be between 0 and the rank, {self.rank}")
            if self.alpha == 0:
                raise UserError("alpha is 0: D would be zero and nothing would ever train")
            self.check_shares("dropout")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.k = max(config.rank // 8, 1) if config.shared is None else config.shared
        kinds = [s.kind for s in adapter.sites]
        self.pools = nn.ModuleDict({s.kind: Pool(s, self.k * kinds.count(s.kind)) for s in adapter.sites})

    def build(self, site, make):
        rank = fitting(self.config.rank, min(site.d_in, site.d_out), site)
        return RaSADelta(self.pools[site.kind], site, rank - self.k, self.config)

    def complaints(self, state):
        return [
            f"{d}.D has another length than {d}.A and {p}.A together"
            for _, d, p in self.sharing(RaSADelta, "pool")
            if len(state[f"{d}.D"]) != len(state[f"{d}.A"]) + len(state[f"{p}.A"])
        ]
