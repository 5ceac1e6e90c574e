import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Elastic, Structure, Turned, linear
from ..adapter.peft import only_linear
from ..errors import UserError
from ..registry import StructureConfig, register

WEIGHT = "hra_u"  # PEFT's name of U


class HRADelta(Elastic, Turned):
    """W = W0 H H0^T, H = (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T); U [d_in, rank] trained, its columns normed at use

    U0: where U started, if H was not the identity there."""

    grown = (("U0",),)

    def __init__(self, site, rank, orthonormal):
        super().__init__()
        if rank > site.d_in:
            raise UserError(f"rank {rank} is more than the {site.d_in} inputs of {site.name}")
        self.d_in, self.orthonormal = site.d_in, orthonormal
        paired = rank % 2 == 0 and not orthonormal  # each reflection twice, side by side: H = I
        drawn = rank // 2 if paired else rank
        u = site.new(site.d_in, drawn).uniform_(-1 / math.sqrt(drawn), 1 / math.sqrt(drawn))
        self.U = nn.Parameter(u.repeat_interleave(2, 1) if paired else u)
        self.register_buffer("U0", None if paired else u.clone())

    def shapes(self):
        return {"U": (self.d_in, "r"), "U0": (self.d_in, "r")}

    def units(self):
        return F.normalize(self.U, dim=0)

    def reflections(self, u):
        """(V [d_in, rank], K [rank, d_in]) with H = I - V K. A chain of unit columns is I - U S^-1 U^T, S the part of
        U^T U above the diagonal plus I / 2 (the compact WY form), and one of orthonormal columns I - 2 U U^T."""
        with torch.autocast(u.device.type, enabled=False):
            if self.orthonormal:
                q = torch.linalg.qr(u).Q
                return q, 2 * q.mT
            u = F.normalize(u, dim=0)
            s = (u.mT @ u).triu(1) + 0.5 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
            return u, torch.linalg.solve_triangular(s, u.mT, upper=True)

    def turn(self, x, back=False):
        pairs = [self.reflections(self.U)]
        if self.U0 is not None:
            v, k = self.reflections(self.U0)
            pairs.insert(0, (k.mT, v.mT))
        if back:
            pairs = [(k.mT, v.mT) for v, k in reversed(pairs)]
        for v, k in pairs:
            x = x - linear(x, k, v)
        return x


@register("hra")
class HRA(Structure):
    """HRA: W = W0 (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T), u_i the unit columns of U [d_in, rank], trained.

    Yuan et al. 2024, eq. 5: orthogonal, and as an update of rank at most r. The start repeats rank / 2 random columns,
    each beside itself, so that the reflections cancel. Where that cannot be (an odd rank, or orthonormal columns) their
    code and PEFT's let the start change the function; here it is anchored, W0 H H0^T, by a saved copy of the start.
    `penalty` is their code's sum of |I - U^T U| over the layers (their figure has its square), 0 by default as in PEFT.
    PEFT forms H [d_in, d_in] in every forward pass.

    Cost: 2 rank d_in products a position (twice with an anchor), rank^2 d_in for U^T U, and the base's own product."""

    paper = "HRA, arXiv 2405.17484"
    gives = frozenset({"weight"})

    @dataclass
    class Config(StructureConfig):
        """rank: reflections; penalty: lambda, what pulls the columns of a layer towards orthogonality; orthonormal:
        they are made so by Gram-Schmidt (lambda = infinity; apply_GS in PEFT)."""

        rank: int = 8
        penalty: float = 0.0
        orthonormal: bool = False

        def check(self):
            self.check_least(1, "rank")
            if self.penalty < 0:
                raise UserError(f"penalty is {self.penalty}; it must not be negative")
            if self.penalty and self.orthonormal:
                raise UserError(f"penalty is {self.penalty}, of no effect on orthonormal columns: leave one out")

    def build(self, site, make):
        return HRADelta(site, self.config.rank, self.config.orthonormal)

    def penalises(self):
        return self.config.penalty > 0

    def penalty(self):
        if not self.penalises():
            return 0.0
        units = [d.units() for _, d in self.adapter.inside(HRADelta)]
        off = [(torch.eye(u.shape[1], dtype=u.dtype, device=u.device) - u.mT @ u).norm() for u in units]
        return self.config.penalty * torch.stack(off).sum()

    def complaints(self, state):
        return self.one_rank(state, HRADelta, "U", 1)

    def to_peft(self, out):
        only_linear(self.name, self.adapter.sites)
        found = list(self.adapter.inside(HRADelta))
        if any(d.U0 is not None for _, d in found):
            raise UserError(f"PEFT has {self.name} without an anchored start, which an even rank has not")
        out.fields |= {"peft_type": "HRA", "r": found[0][1].U.shape[1], "apply_GS": self.config.orthonormal}
        out.layers = {site.name: {WEIGHT: d.U} for site, d in found}

    @classmethod
    def from_peft(cls, saved):
        f = saved.fields
        if f.get("peft_type") != "HRA":
            return None
        options = {"rank": f["r"], "orthonormal": f.get("apply_GS", False)}
        saved.drop("peft_type", "r", "apply_GS", "init_weights")
        return options

    def fill(self, saved):
        for site, d in self.adapter.inside(HRADelta):
            saved.take(site.name, WEIGHT, d.U)
            d.U0 = None
