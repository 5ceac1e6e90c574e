import math
from dataclasses import dataclass

import torch

from .. import linalg
from ..adapter import Part
from ..detour import Preconditioned
from ..errors import UserError
from ..registry import DynamicsConfig, register


class RiemannianOptimizer(Preconditioned):
    def step_own(self, groups):
        self.part.steps += 1
        super().step_own(groups)

    def precondition(self, lows):
        b, a = (torch.stack(t) for t in zip(*(low.partners() for low in lows), strict=True))
        inv_b, inv_a = (linalg.inverse(linalg.spectrum(m), self.part.config.damping, math.inf) for m in (b.mT @ b, a @ a.mT))
        ga, gb = inv_b @ torch.stack([low.A.grad for low in lows]), torch.stack([low.B.grad for low in lows]) @ inv_a
        return {p: g for low, *pair in zip(lows, ga, gb, strict=True) for p, g in zip((low.A, low.B), pair, strict=True)}


@register("riemannian")
class Riemannian(Part):
    """Riemannian preconditioned LoRA: g_A <- (B^T B + damping I)^-1 g_A and g_B <- g_B (A A^T + damping I)^-1.

    Zhang and Pilanci 2024, eq. 4. Both inverses are of the factors before the step, and what they give enters the run's own
    optimiser: under sgd it is their scaled GD, under adamw their scaled AdamW, where it enters both moments. The scale s is
    not divided out, as in their code. A gate counts with the factor whose change it multiplies; a magnitude, a head take
    the plain step. Their damping is 1e-6, PEFT's 1e-2: the larger is the safer one for scaled GD while B is near zero.

    Cost: two [rank, rank] Gram matrices and their inverses a pair and step; no state."""

    paper = "Riemannian Preconditioned LoRA, arXiv 2402.02347"
    axis, needs = "dynamics", frozenset({"low_rank"})
    minds = frozenset({"A is frozen"})  # each factor's gradient is scaled by the other's

    @dataclass
    class Config(DynamicsConfig):
        """damping: added to both Gram matrices before they are inverted."""

        damping: float = 1e-6

        def check(self):
            if self.damping < 0:
                raise UserError(f"damping is {self.damping}; it must be 0 or more")

    def attach(self):
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def optimizer(self, groups, make):
        return RiemannianOptimizer(make(groups), self)

    def counters(self):
        return {"preconditioned_pairs": sum(1 for _ in self.adapter.low_ranks()), "preconditioned_steps": int(self.steps)}
