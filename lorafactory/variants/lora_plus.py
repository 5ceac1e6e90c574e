from dataclasses import dataclass

from ..adapter import Part
from ..errors import UserError
from ..registry import DynamicsConfig, register


@register("lora_plus")
class LoRAPlus(Part):
    """LoRA+: the learning rate of B is `ratio` times that of A.

    Hayou et al. 2024, sec. 4: as the width n grows, features move by O(1) only if lr_A is of order 1/n and lr_B of
    order 1. Which factor is B is its role in the pair, not its name; a gate and all else keep the learning rate. The
    authors' code gives vectors (biases, magnitudes) B's rate too: `vectors`; the paper does not, nor does our default,
    and a trained head always has its own rate. Their rate for adapted embeddings has no counterpart: none is adapted.

    AdamW multiplies the decay by the learning rate, so B decays `ratio` times as fast as A, as in the authors' code."""

    paper = "LoRA+, arXiv 2402.12354"
    axis, needs = "dynamics", frozenset({"low_rank"})

    @dataclass
    class Config(DynamicsConfig):
        """ratio: lr_B / lr_A; vectors: the adapter's vectors learn at B's rate too."""

        ratio: float = 16.0
        vectors: bool = False

        def check(self):
            if self.ratio <= 0:
                raise UserError(f"ratio is {self.ratio}; it must be positive")

    def options(self):
        fast = [low.B for _, low in self.adapter.low_ranks()]
        if self.config.vectors:
            heads = set(self.adapter.heads())
            fast += [p for p in self.adapter.parameters() if p.dim() == 1 and p not in heads]
        return {p: {"lr_scale": self.config.ratio} for p in fast}
