from dataclasses import dataclass

import torch

from ..adapter import Part
from ..errors import UserError
from ..registry import DynamicsConfig, register


@register("delta_lora")
class DeltaLoRA(Part):
    """Delta-LoRA: after each step from step K on, W <- W + ratio s (B' A' - B A): W moves with what the pair learnt.

    Zi et al. 2023. The base stays as it is: the sum telescopes to ratio s (B A - B_K A_K), so at step K the pair's scale
    grows to (1 + ratio) s and -ratio s B_K A_K joins its past, which changes nothing then, and everything after. W passes
    no gradient to A and B: theirs is divided by 1 + ratio before it is clipped. The authors have published no code; `start`
    is their 400 to 800 steps as a share of the run (inferred). They leave out dropout, which would reach all of the update
    here: keep it 0. A second stage moves W from its first step.

    Cost: LoRA's, and one frozen rank for each trained one from step K on."""

    paper = "Delta-LoRA, arXiv 2309.02411"
    axis, needs = "dynamics", frozenset({"low_rank"})

    @dataclass
    class Config(DynamicsConfig):
        """ratio: how far W moves for a change of s B A (the paper's lambda: 2, or 0.5); start: the step K from which it
        does, or below 1 as a share of the run's."""

        ratio: float = 2.0
        start: float = 0.1

        def check(self):
            self.check_positive("ratio")
            if self.start < 0:
                raise UserError(f"start is {self.start}; it must be 0 or more")

    def attach(self):
        self.register_buffer("moving", torch.zeros((), dtype=torch.long))  # steps that W has moved

    def first(self, step) -> int:
        return round(self.config.start * step.total if self.config.start < 1 else self.config.start)

    def before_step(self, step):
        if not self.moving and step.index < self.first(step):
            return
        for _, low in self.adapter.low_ranks():
            if not self.moving:
                low.unload(-self.config.ratio, scale=True)
                continue
            for p in (low.A, low.B, low.gate):
                if p is not None and p.grad is not None:
                    p.grad.div_(1 + self.config.ratio)
        self.moving += 1

    def counters(self):
        return {"steps_of_w": int(self.moving)}
