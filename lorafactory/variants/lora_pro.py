from dataclasses import dataclass

import torch

from .. import linalg
from ..adapter import Part
from ..detour import OnPairs
from ..errors import UserError
from ..registry import DynamicsConfig, register

CHOICES = ("sylvester", "zero", "symmetric")
AT_ONCE = 2**24  # entries of full gradients that are formed together


class Closest:
    """For n pairs of one shape, a gate taken into both factors: the (dA, dB) whose s (B dA + dB A) is closest to G."""

    def __init__(self, lows, config):
        b, a = (torch.stack(t) for t in zip(*(low.partners() for low in lows), strict=True))
        self.a, self.b, self.s = a, b, torch.stack([low.scale for low in lows])[:, None, None]
        self.p, self.q = linalg.spectrum(b.mT @ b), linalg.spectrum(a @ a.mT)
        self.inv_p, self.inv_q = (linalg.inverse(m, config.damping, config.condition) for m in (self.p, self.q))
        self.choice = config.x

    def pair(self, ga, gb):
        """From ga = s B^T G [n, r, d_in] and gb = s G A^T [n, d_out, r], with X = 0; B = 0 gives dA = 0."""
        db = gb @ self.inv_q / self.s**2
        return self.inv_p @ ga / self.s**2, db - self.b @ (self.inv_p @ (self.b.mT @ db))

    def equivalent(self, da, db):
        """What the pair does to W, [n, d_out, d_in]."""
        return torch.cat([self.s * self.b, self.s * db], -1) @ torch.cat([da, self.a], -2)

    def of(self, g):
        """The pair for G [n, d_out, d_in]; X moves it, and not what it does to W."""
        ga, gb = (self.s * self.b.mT) @ g, g @ (self.s * self.a.mT)
        da, db = self.pair(ga, gb)
        if self.choice == "zero":
            return da, db
        c = -(self.inv_p @ ga @ self.a.mT) / self.s**2
        x = linalg.sylvester(self.p, self.q, c) if self.choice == "sylvester" else c @ self.inv_q / 2
        return da + x @ self.a, db - self.b @ x


class LoRAProOptimizer(OnPairs):
    def step_own(self, groups):
        self.part.steps += 1
        for lows in self.alike():
            n = max(1, AT_ONCE // (lows[0].B.shape[0] * lows[0].A.shape[1]))
            for i in range(0, len(lows), n):
                self.move(lows[i : i + n], groups)

    def move(self, lows, groups):
        closest = Closest(lows, self.part.config)
        pair = closest.pair(torch.stack([low.A.grad for low in lows]), torch.stack([low.B.grad for low in lows]))
        gradients = dict(zip((low.B for low in lows), closest.equivalent(*pair), strict=True))
        steps = closest.of(torch.stack(list(self.change(gradients).values())))
        for low, da, db in zip(lows, *steps, strict=True):
            for p, d in ((low.A, da), (low.B, db)):
                p.mul_(1 - groups[p]["lr"] * groups[p].get("weight_decay", 0.0)).add_(d)


@register("lora_pro")
class LoRAPro(Part):
    """LoRA-Pro: A and B move so that s (B dA + dB A) is as close as can be to the step that W itself would take.

    Wang et al. 2024: dA = (B^T B)^-1 ga / s^2 + X A and dB = (I - P_B) gb (A A^T)^-1 / s^2 - B X, from the
    gradients ga, gb of A and B alone; X is free. The run's optimiser steps in the space of W, on that projected
    gradient, and its step is projected again: under train.optimizer sgd this is their SGD form, under adamw their Adam
    form. At B = 0 the formulas give dA = 0, as the paper's first step has it. An anchor or a past is constant, so only
    A and B count. The authors' runs use rsLoRA's scale: give alpha sqrt(rank). Their code counts Adam's steps from 2
    and rounds what enters the second moment to bfloat16; the paper does neither, nor do we.

    Cost: AdamW's moments are two [d_out, d_in] a layer, as in full fine-tuning, and a step forms as many again; the
    Gram algebra is [rank, rank] in float32 or wider, by symmetric eigendecompositions, layers of one shape together."""

    paper = "LoRA-Pro, arXiv 2407.18242"
    axis, needs = "dynamics", frozenset({"low_rank"})
    # it reads the gradient of W out of those of A and B
    minds = frozenset({"penalty on the factors", "trains truncations", "A is frozen"})

    @dataclass
    class Config(DynamicsConfig):
        """x: the choice of X: sylvester keeps (dA, dB) nearest to LoRA's own, zero, or symmetric, where dA and dB share
        what both can do; damping: added to both Gram matrices before they are inverted; condition: eigenvalues below
        the largest / condition count as zero."""

        x: str = "sylvester"
        damping: float = 1e-8
        condition: float = 1e6

        def check(self):
            self.check_choices(x=CHOICES)
            if self.damping < 0:
                raise UserError(f"damping is {self.damping}; it must be 0 or more")
            if self.condition <= 1:
                raise UserError(f"condition is {self.condition}; it must be above 1")

    def attach(self):
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def optimizer(self, groups, make):
        return LoRAProOptimizer(make(groups), self)

    def counters(self):
        return {"projected_pairs": sum(1 for _ in self.adapter.low_ranks()), "projected_steps": int(self.steps)}
