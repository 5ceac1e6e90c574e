from dataclasses import dataclass
from typing import Optional

import torch.nn.functional as F

from ..adapter import Delta, LowRank, alike, linear, numbers
from ..adapter.peft import common
from ..adapter.ranked import Ranked, RankedConfig
from ..errors import UserError
from ..kernels import Once, held
from ..registry import register


class HiRADelta(Delta):
    """W = W0 * (1 + s B A), entry by entry"""

    def __init__(self, low_rank: LowRank):
        super().__init__()
        self.hadamard = low_rank  # a name of its own: a LoRA must not load it
        self.once = Once()

    def weight(self, base):
        return base.weight * (1 + self.hadamard.product())

    def update(self, x, base, y):
        w = base.weight
        return self.hadamard(x, lambda x, a, b: linear(x, w * (b @ a)))

    def forward(self, x, base):
        low, w = self.hadamard, base.weight
        if (low.dropout and self.training) or not alike(x, w, low.A):
            return super().forward(x, base)

        def gradients(g, b, a):
            g = g * w
            return g @ a.T, b.T @ g

        pair = low.factors()
        whole = held(self.once, lambda b, a: w * (1 + b @ a), gradients, pair, lambda: numbers(self, base.module), self.training)
        return F.linear(x, whole, base.bias)


@register("hira")
class HiRA(Ranked):
    """HiRA: W = W0 * (1 + B A), entry by entry: an update W0 * B A of rank up to rank(W0) rank.

    Huang et al., ICLR 2025, eq. 6; the paper calls B what is A here. B is zero at first, A uniform, as in LoRA. Nothing
    scales B A in the paper or in PEFT, so alpha is null; with one, s = alpha / rank. An entry of W0 that is zero stays
    zero. Dropout is of what the update reads, as in PEFT; the authors' code takes one and does not apply it. The paper
    brings W0 back by dividing by 1 + B A, which need not have an inverse; merging here keeps W0. Gradients are those of
    the entries of W times W0, so the rate is higher than LoRA's: 1e-3 in the paper.

    Cost: rank d_in d_out products a step for B A, since no factors of W0 * B A are thin; W is formed once an optimiser step
    (kernels.held) and multiplied once, so a position costs what it costs without an adapter. In dropout, and over a
    narrower base, it is formed in every pass, and W0 and the update are multiplied apart."""

    paper = "HiRA, ICLR 2025"
    gives = frozenset({"low_rank", "input", "weight"})

    @dataclass
    class Config(RankedConfig):
        """alpha: null, as in the paper: B A is not scaled."""

        rank: int = 32
        alpha: Optional[float] = None  # type: ignore[assignment]  # noqa: UP045

    def build(self, site, make):
        return HiRADelta(self.low_rank(site))

    def to_peft(self, out):
        for site, low in self.adapter.low_ranks():
            bare = low.gate is None and low.A0 is None and low.A_past is None and low.scale == 1
            b, a = (low.B, low.A) if bare else low.factors()
            out.layers[site.name] = {"hira_A": a, "hira_B": b}
        rank = max(1, *(len(t["hira_A"]) for t in out.layers.values()))  # PEFT 0.21 has a rank_pattern and ignores it
        for t in out.layers.values():
            more = rank - len(t["hira_A"])
            t |= {"hira_A": F.pad(t["hira_A"], (0, 0, 0, more)), "hira_B": F.pad(t["hira_B"], (0, more))}
        out.fields |= {"peft_type": "HIRA", "r": rank, "hira_dropout": self.config.dropout}

    @classmethod
    def from_peft(cls, saved):
        if saved.fields.get("peft_type") != "HIRA":
            return None
        found = {n: len(t["hira_A"]) for n, t in saved.layers.items() if "hira_A" in t}
        if not found:
            raise UserError("it has no hira_A")
        rank, ranks = common(found)
        dropout = saved.fields.get("hira_dropout", 0.0)
        saved.drop("peft_type", "r", "rank_pattern", "hira_dropout", "init_weights")
        return {"rank": rank, "rank_pattern": ranks, "dropout": dropout}

    def fill(self, saved):
        for site, low in self.adapter.low_ranks():
            saved.take(site.name, "hira_A", low.A)
            saved.take(site.name, "hira_B", low.B)
