import math
from dataclasses import dataclass

import torch

from ..adapter import Part
from ..errors import UserError
from ..registry import DynamicsConfig, register


def cycle(index: int, first: float, grow: float) -> float:
    """How far step `index` is into its cycle, from 0 to below 1; the first has `first` steps, each next `grow` times more."""
    start, length = 0.0, first
    while index >= start + length:
        start, length = start + length, length * grow
    return (index - start) / length


@register("lola")
class LoLA(Part):
    """LoLA-SpecViT's cyclic LoRA rate: cosine warm restarts, eta = eta_min + (eta_0 - eta_min) (1 + cos(pi t / T)) / 2.

    Zidi et al. 2025. Cycles of T_0, T_0 T_mult, T_0 T_mult^2, ...; the factors learn at `lora_lr` times the rate of what
    else trains. Their scheduler has it so, twice the rate, and their trainer calls torch's own without it; eta_min there is
    1e-6, here `floor`, a share of the rate, which lora_lr multiplies too. The cycle multiplies train.schedule: take a
    constant one. The paper says that the cycle modulates LoRA's strength, and the model's setter for it is called and
    implemented by no layer: `strength` below 1 does it, s(t) = strength + (1 - strength) (1 + cos(pi t / T)) / 2 times
    alpha / rank, inferred and off by default; what is left at the end is the strength of the last step. Their gated layer
    is a structure, not this part.

    Cost: none."""

    paper = "LoLA-SpecViT, arXiv 2506.17759"
    axis, needs = "dynamics", frozenset({"low_rank"})

    @dataclass
    class Config(DynamicsConfig):
        """first: steps of the first cycle, or below 1 as a share of the run's; grow: how much longer each next is; floor:
        the least rate, as a share; lora_lr: multiplies the factors' rate; strength: the least share of alpha / rank."""

        first: float = 0.1
        grow: float = 2.0
        floor: float = 0.0
        lora_lr: float = 2.0
        strength: float = 1.0

        def check(self):
            if not (0 < self.first < 1 or self.first >= 2):
                raise UserError(f"first is {self.first}; it must be a share of the run below 1, or 2 steps or more")
            if self.grow < 1:
                raise UserError(f"grow is {self.grow}; it must be at least 1")
            self.check_shares("floor")
            self.check_positive("lora_lr")
            if not 0 < self.strength <= 1:
                raise UserError(f"strength is {self.strength}; it must lie in (0, 1]")

    def attach(self):
        self.register_buffer("strength", torch.ones((), dtype=torch.float64))  # of now, in the pairs' scales

    def wave(self, index: int, total: int) -> float:
        first = self.config.first * total if self.config.first < 1 else self.config.first
        return (1 + math.cos(math.pi * cycle(index, max(first, 1.0), self.config.grow))) / 2

    def rate(self, step):
        return self.config.floor + (1 - self.config.floor) * self.wave(step.index, step.total)

    def options(self):
        factors = [p for _, low in self.adapter.low_ranks() for p in low.parameters()]
        return {p: {"lr_scale": self.config.lora_lr} for p in factors}

    def after_step(self, step):
        least = self.config.strength
        if least == 1 or step.index + 1 >= step.total:
            return
        new = least + (1 - least) * self.wave(step.index + 1, step.total)
        for _, low in self.adapter.low_ranks():
            low.scale.mul_(new / float(self.strength))
        self.strength.fill_(new)

    def counters(self):
        return {"strength": float(self.strength)}
