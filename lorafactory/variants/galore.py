from dataclasses import dataclass
from typing import Optional

import torch

from .. import eight_bits
from ..adapter import Part
from ..detour import OnWeights, fit_weights
from ..errors import UserError
from ..registry import DynamicsConfig, register

SIDES = {  # (for d_out >= d_in, otherwise)
    "std": (("right",), ("left",)),
    "reverse_std": (("left",), ("right",)),
    "left": (("left",), ("left",)),
    "right": (("right",), ("right",)),
    "full": (("left", "right"), ("left", "right")),
}


class GaLoreOptimizer(OnWeights):
    """Holds P as `left` [d_out, r] and Q as `right` [r, d_in] in the state of each weight: the key is the side."""

    def step_own(self, groups):
        # moments in 8 bits are whole numbers for one weight at a time
        for some in [{p: g} for p, g in groups.items()] if self.part.config.bits else [groups]:
            self.move(some)

    def move(self, groups):
        bases = {p: self.basis(p) for p in groups}
        for p in groups:
            eight_bits.unpack(self.state[p], p.dtype)
        changes = self.change({p: down(p.grad, **bases[p]) for p in groups})
        for p, group in groups.items():
            p.add_(up(changes[p], **bases[p]), alpha=self.part.config.scale)
            p.mul_(1 - group["lr"] * group.get("weight_decay", 0.0))
            if self.part.config.bits:
                moments = [n for n, t in self.state[p].items() if torch.is_tensor(t) and t.dim() and n not in bases[p]]
                eight_bits.pack(self.state[p], moments)
            self.state[p].update(bases[p], projections=self.state[p].get("projections", 0) + 1)

    def basis(self, p):
        c, state = self.part.config, self.state.get(p, {})
        if state.get("projections", 0) % c.every:
            return {side: state[side] for side in ("left", "right") if side in state}
        self.part.refreshes += 1
        u, _, vt = torch.linalg.svd(p.grad, full_matrices=False)
        bases = {"left": u[:, : c.rank].contiguous(), "right": vt[: c.rank].contiguous()}
        return {side: bases[side] for side in SIDES[c.proj_type][p.shape[0] < p.shape[1]]}


def down(g, left=None, right=None):
    """G [d_out, d_in] -> P^T G Q^T."""
    g = g if left is None else left.T @ g
    return g if right is None else g @ right.T


def up(r, left=None, right=None):
    """R -> P R Q [d_out, d_in]."""
    r = r if left is None else left @ r
    return r if right is None else r @ right


@register("galore")
class GaLore(Part):
    """GaLore: W <- W + scale P step(P^T G Q^T) Q, G the gradient of W, P, Q from its leading `rank` singular vectors.

    Zhao et al. 2024. P and Q are computed anew every `every` steps, the first included; the moments stay
    as they are. step is that of the run's own optimiser (AdamW or SGD), whose bias correction is the paper's: the
    authors' code adds eps before it. The weight decays after the update, as in their code. What is not the weight of a
    linear layer (embeddings, norms, biases, the head) takes the optimiser's plain step.

    Cost: an SVD a weight every `every` steps; AdamW's state is 2 rank max(d_out, d_in) numbers a weight instead of
    2 d_out d_in, and the projector rank min(d_out, d_in) (std); bits=8 keeps that state, the projector apart, in a byte a
    number, as their 8-bit AdamW does but for moments of fewer than 4096 entries, which theirs leaves whole."""

    paper = "GaLore, arXiv 2403.03507"
    axis, needs, over = "dynamics", frozenset({"dense"}), "full"

    @dataclass
    class Config(DynamicsConfig):
        """rank: of the projected gradient; every: optimiser steps between projectors (the authors' update_proj_gap);
        scale: of the update (the paper's alpha); proj_type: std projects the longer side away, reverse_std the
        shorter, left and right always d_out or d_in, full both; bits: 8 keeps the moments in 8 bits (bitsandbytes)."""

        rank: int = 8
        every: int = 200
        scale: float = 4.0
        proj_type: str = "std"
        bits: Optional[int] = None  # noqa: UP045  OmegaConf

        def check(self):
            self.check_least(1, "rank", "every")
            self.check_positive("scale")
            self.check_choices(proj_type=SIDES)
            if self.bits not in (None, 8):
                raise UserError(f"bits is {self.bits}; it takes 8, or null for whole moments")

    def attach(self):
        if self.config.bits:
            eight_bits.require("variant.dynamics.bits=8")
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.long))
        fit_weights(self, self.config.rank)

    def optimizer(self, groups, make):
        return GaLoreOptimizer(make(groups), self)

    def counters(self):
        return {"projected_weights": sum(1 for _ in self.adapter.dense()), "projectors": int(self.refreshes)}
