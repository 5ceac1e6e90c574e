from dataclasses import dataclass

import torch

from .. import linalg
from ..adapter import Part
from ..detour import Preconditioned
from ..errors import UserError
from ..registry import DynamicsConfig, register


class LoRAFAOptimizer(Preconditioned):
    def step_own(self, groups):
        self.part.steps += 1
        super().step_own(groups)

    def precondition(self, lows):
        a = torch.stack([low.partners()[1] for low in lows])
        g, s = torch.stack([low.B.grad for low in lows]), torch.stack([low.scale for low in lows])[:, None, None]
        made = g @ linalg.inverse(linalg.spectrum(a @ a.mT), self.part.config.damping) / s**2
        return {low.B: m for low, m in zip(lows, made, strict=True)}


@register("lora_fa")
class LoRAFA(Part):
    """LoRA-FA: A stays where it starts, B trains, on g_B (A A^T)^-1 / s^2, so that W moves by G's projection on A's rows.

    Zhang et al. 2023; the projected gradient is that of its second version and of PEFT's optimiser: s g_B' A = G P_A, G the
    gradient of W, before whichever optimiser the run has. PEFT rounds it to bfloat16 where the machine knows that type; we
    do not. precondition=false is the first version, plain AdamW on B. A is no parameter of the optimiser, so nothing decays
    it. A start (PiSSA's, LoRA-GA's) chooses the frozen A.

    Cost: half of LoRA's trained numbers where W is square, and no activation [..., d_in] is kept for A, only A x
    [..., rank]: autograd keeps an input for what trains alone. Dropout of what A reads keeps its mask."""

    paper = "LoRA-FA, arXiv 2308.03303"
    axis, needs = "dynamics", frozenset({"low_rank"})
    minds = frozenset({"penalty on the factors"})  # A would not follow, and it reads the gradient of W out of that of B

    @dataclass
    class Config(DynamicsConfig):
        """precondition: project the gradient of W on A's rows; damping: added to A A^T before it is inverted."""

        precondition: bool = True
        damping: float = 1e-8

        def check(self):
            if self.damping < 0:
                raise UserError(f"damping is {self.damping}; it must be 0 or more")
            if not self.precondition and self.damping != type(self).damping:
                raise UserError(f"damping is {self.damping}, but precondition=false inverts nothing: drop one of them")

    def attach(self):
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        for _, low in self.adapter.low_ranks():
            low.A.requires_grad_(False)

    def optimizer(self, groups, make):
        return LoRAFAOptimizer(make(groups), self) if self.config.precondition else None

    def counters(self):
        frozen = sum(low.A.numel() for _, low in self.adapter.low_ranks() if not low.A.requires_grad)
        return {"frozen_numbers": frozen, "projected_steps": int(self.steps)}
