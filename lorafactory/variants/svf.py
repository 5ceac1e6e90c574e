from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter import Singular, Structure
from ..errors import UserError
from ..registry import StructureConfig, register

MODES = ("scale", "shift", "free", "scale_shift")


class SVFDelta(Singular):
    """W = W0 + U diag(sigma' - sigma) V^T; trained, [k] each: gain and offset, or the values themselves"""

    def __init__(self, site, k: int, c):
        super().__init__(site, k, c.save_basis)
        self.mode, self.renormalised = c.mode, c.renormalise
        start = {"gain": torch.ones_like(self.S), "offset": torch.zeros_like(self.S), "values": self.S.clone()}
        used = {"scale": ("gain",), "shift": ("offset",), "free": ("values",), "scale_shift": ("gain", "offset")}[c.mode]
        for name in used:
            self.register_parameter(name, nn.Parameter(start[name]))

    def trained(self):
        return {name: (len(self.S),) for name in self._parameters}

    def change(self):
        """sigma' - sigma, [k]."""
        match self.mode:
            case "scale":
                new = self.gain * self.S
                new = new * (self.S.sum() / new.sum()) if self.renormalised else new
            case "shift":
                new = torch.relu(self.S + self.offset)
            case "free":
                new = self.values
            case "scale_shift":
                new = torch.relu(self.gain * self.S + self.offset)
        return new - self.S

    def randomize(self):
        for p in self.parameters():
            nn.init.normal_(p)

    def left(self):
        return self.U * self.change()

    def core(self, z):
        return self.change() * z


@register("svf")
class SVF(Structure):
    """SVF: W = U diag(sigma') V^T, W0 = U diag(sigma) V^T; only singular values train, k = min(d_out, d_in) a layer.

    Four papers in one: mode `scale`, sigma' = sigma * z (Sun, Cetin, Tang 2025, Transformer2); `shift`,
    relu(sigma + delta) (SVDiff, arXiv 2303.11305); `free`, sigma' itself (Sun et al. 2022, arXiv 2206.06122);
    `scale_shift`, relu(a * sigma + c) (S-SAM, as its code in SALT has it, which adds 1 to the singular values that do not
    train: here they stay). Transformer2's code squashes z, always divides by the change of sigma's sum (`renormalise`) and
    trains by reinforcement on the task's reward; here it is the task's loss. Its mixture of several trained z is `combine`,
    with weights that you give: the paper searches for them. The update is added to W0 x, so that the start
    is the base to the last bit.

    Cost: k (d_in + d_out) products a position, and U and V in memory, twice the layer; an SVD of every layer at the start
    and at loading. The checkpoint has a mark of U and V, or with save_basis both."""

    paper = "Transformer2, arXiv 2501.06252"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """mode; fraction: the share of singular values, the largest first, that trains; renormalise: mode scale with the
        sum of singular values kept; penalty: times |1 - a| + |c| of every layer, mode scale_shift; save_basis: keep U and
        V in the checkpoint, else their mark."""

        mode: str = "scale"
        fraction: float = 1.0
        renormalise: bool = False
        penalty: float = 0.0
        save_basis: bool = False

        def check(self):
            self.check_choices(mode=MODES)
            if not 0 < self.fraction <= 1:
                raise UserError(f"fraction is {self.fraction}; it must lie in (0, 1]")
            if self.renormalise and (self.mode != "scale" or self.fraction < 1):
                raise UserError(f"renormalise is of no effect on mode={self.mode}, fraction={self.fraction}: scale, of all")
            if self.penalty < 0:
                raise UserError(f"penalty is {self.penalty}; it must not be negative")
            if self.penalty and self.mode != "scale_shift":
                raise UserError(f"penalty is {self.penalty}, of no effect on mode={self.mode}")

    def build(self, site, make):
        return SVFDelta(site, max(1, int(self.config.fraction * min(site.d_out, site.d_in))), self.config)

    @torch.no_grad()
    def combine(self, states, weights):
        """z = sum_k weights[k] z_k: what adapters trained on this base with these options become together, given the
        state_dict() of each. All or nothing."""
        others = [n for n, _ in self.adapter.named_parameters() if not n.endswith(".gain")]
        if others:
            raise UserError(f"what combines is mode=scale's z; this adapter also trains {others[0]}")
        if not states or len(states) != len(weights):
            raise UserError(f"{len(weights)} weights for {len(states)} adapters: it takes one each")
        before = {n: t.clone() for n, t in self.adapter.state_dict().items()}
        found = [d for _, d in self.adapter.inside(SVFDelta)]
        mixed = [torch.zeros_like(d.gain) for d in found]
        try:
            for state, weight in zip(states, weights, strict=True):
                self.adapter.load(state)  # which refuses those of another base
                mixed = [z + weight * d.gain for z, d in zip(mixed, found, strict=True)]
        except UserError:
            self.adapter.load(before)
            raise
        for d, z in zip(found, mixed, strict=True):
            d.gain.copy_(z)

    def penalises(self):
        return self.config.penalty > 0

    def penalty(self):
        if not self.penalises():
            return 0.0
        return self.config.penalty * sum((1 - d.gain).norm() + d.offset.norm() for _, d in self.adapter.inside(SVFDelta))
