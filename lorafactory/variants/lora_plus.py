from dataclasses import dataclass

from ..adapter import Part
from ..errors import UserError
from ..registry import DynamicsConfig, register


@register("lora_plus")
class LoRAPlus(Part):
    """LoRA+: the learning rate of B is `ratio` times that of A.

    Hayou et al. 2024, sec. 4."""

    paper = "LoRA+, arXiv 2402.12354"
    axis, needs = "dynamics", frozenset({"low_rank"})

    @dataclass
    class Config(DynamicsConfig):
        ratio: float = 16.0

        def check(self):
            if self.ratio <= 0:
                raise UserError(f"ratio is {self.ratio}; it must be positive")

    def options(self):
        return {low.B: {"lr_scale": self.config.ratio} for _, low in self.adapter.low_ranks()}
