import math

from ..adapter import Part
from ..registry import register


@register("rslora")
class RSLoRA(Part):
    """rsLoRA: the scale is s = alpha / sqrt(rank) instead of alpha / rank.

    Kalajdzievski 2023: the one scaling under which neither activations nor gradients vanish or explode as the rank
    grows. To equal LoRA at a rank r0, give alpha / sqrt(r0). Each pair's own rank counts (rank_pattern); a budget that
    changes it later leaves the scale, and a loaded adapter keeps the scale it was saved with."""

    paper = "rsLoRA, arXiv 2312.03732"
    axis, needs = "dynamics", frozenset({"low_rank"})

    def attach(self):
        for _, low in self.adapter.low_ranks():
            low.scale.mul_(math.sqrt(low.rank))
