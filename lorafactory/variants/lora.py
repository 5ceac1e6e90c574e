from ..adapter import Delta, LowRank
from ..adapter.ranked import Ranked
from ..registry import register


class LoRADelta(Delta):
    """W = W0 + s B A"""

    def __init__(self, low_rank: LowRank):
        super().__init__()
        self.low_rank = low_rank

    def factors(self):
        return self.low_rank.factors()

    def randomize(self):
        self.low_rank.randomize()

    def weight(self, base):
        return base.weight + self.low_rank.product()

    def update(self, x, base, y):
        return self.low_rank(x)


@register("lora")
class LoRA(Ranked):
    """LoRA: W = W0 + (alpha / rank) B A, with A [rank, d_in] random and B [d_out, rank] zero at the start.

    Hu et al. 2021, eq. 3. A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)) as in the authors' code, where the paper says Gaussian.
    Fast path: rank (d_in + d_out) products a position; no [d_out, d_in] update is formed."""

    paper = "LoRA, arXiv 2106.09685"
    default = True
    gives = frozenset({"low_rank", "input", "additive", "weight"})

    def build(self, site, make):
        return LoRADelta(self.low_rank(site))
