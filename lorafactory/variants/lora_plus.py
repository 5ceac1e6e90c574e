from dataclasses import dataclass

from ..adapter import Part
from ..registry import DynamicsConfig, register


@register("lora_plus")
class LoRAPlus(Part):
    """LoRA+: the learning rate of B is `ratio` times that of A.

    Hayou et al. 2024, sec. 4: as the width n grows, features move by O(1) only if lr_A is of order 1/n and lr_B of
    order 1. Which factor is B is its role in the pair, not its name; everything else keeps the learning rate. The
    authors' code gives vectors (a head's bias, a magnitude) B's rate too, which the paper does not; its rate for
    adapted embeddings has no counterpart here, for none is adapted.

    AdamW multiplies the decay by the learning rate, so B decays `ratio` times as fast as A, as in the authors' code."""

    paper = "LoRA+, arXiv 2402.12354"
    axis, needs = "dynamics", frozenset({"low_rank"})

    @dataclass
    class Config(DynamicsConfig):
        """ratio: learning rate of B over that of A; 4 to 16 is usual."""

        ratio: float = 16.0

        def check(self):
            self.check_positive("ratio")

    def options(self):
        return {low.B: {"lr_scale": self.config.ratio} for _, low in self.adapter.low_ranks()}
