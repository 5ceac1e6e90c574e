from dataclasses import dataclass

import torch
import torch.nn as nn

from .. import linalg
from ..adapter import Delta, LowRank
from ..adapter.ranked import Ranked, RankedConfig, fitting
from ..errors import UserError
from ..registry import register


class MELoRADelta(Delta):
    """W = W0 + s blockdiag(B_1 A_1, ..., B_n A_n); A_j [rank, d_in / n] and B_j [d_out / n, rank], the j-th pair"""

    def __init__(self, pairs: list[LowRank]):
        super().__init__()
        self.pairs = nn.ModuleList(pairs)

    def weight(self, base):
        return base.weight + torch.block_diag(*(low.product() for low in self.pairs))

    def update(self, x, base, y):
        first = self.pairs[0]
        b, a = zip(*(low.factors() for low in self.pairs), strict=True)
        dropped = first.dropout and self.training
        if len(a) == 1 or len({len(rows) for rows in a}) > 1 or (dropped and first.A_past is not None):
            slices = x.unflatten(-1, (len(a), -1)).unbind(-2)
            return torch.cat([low(part) for low, part in zip(self.pairs, slices, strict=True)], -1)
        x = first.drop(x if torch.is_autocast_enabled(x.device.type) else x.to(first.A.dtype))
        return linalg.blockwise(linalg.blockwise(x, torch.stack(a).mT), torch.stack(b).mT)


@register("melora")
class MELoRA(Ranked):
    """MELoRA: W = W0 + (alpha / rank) blockdiag(B_1 A_1, ..., B_n A_n): n mini LoRAs on disjoint slices of input and output.

    Ren et al. 2024; A_j [rank, d_in / n] and B_j [d_out / n, rank], each started as LoRA's. `rank` is that of one
    mini LoRA and the update's rank is n times that, for rank (d_in + d_out) parameters. The scale is a mini LoRA's own,
    alpha / rank, as in the authors' code. Their code cannot merge it; the update is block-diagonal, so here it merges.

    Cost: rank (d_in + d_out) products a position, as two batched products while all pairs have one rank; in a loop over
    the pairs where a budget left them different ones."""

    paper = "MELoRA, arXiv 2402.17263"
    gives = frozenset({"low_rank", "weight"})

    @dataclass
    class Config(RankedConfig):
        """minis: n, how many mini LoRAs a layer; it divides the layer's inputs and outputs."""

        minis: int = 2

        def check(self):
            super().check()
            self.check_least(1, "minis")

    def build(self, site, make):
        n = self.config.minis
        if site.d_in % n or site.d_out % n:
            raise UserError(f"minis is {n}; it must divide [{site.d_out}, {site.d_in}], the shape of {site.name}")
        rank = fitting(self.rank(site), min(site.d_in, site.d_out) // n, site)
        d_in, d_out, like, c = site.d_in // n, site.d_out // n, site.base.weight, self.config
        return MELoRADelta([LowRank(d_in, d_out, rank, self.scale(site), like, c.dropout) for _ in range(n)])
