import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn

from ..adapter import Additive, Elastic, Structure, linear
from ..adapter.ranked import fitting
from ..errors import UserError
from ..registry import StructureConfig, register

FORMS = ("tt", "tk")


class Factors(Elastic):
    """What all layers share: U [rank, d] and V [d, rank], trained; with tk the core C [rank, rank, rank] too; scale []"""

    def __init__(self, site, width, c):
        super().__init__()
        self.width = width
        self.U, self.V = nn.Parameter(site.new(c.rank, width)), nn.Parameter(site.new(width, c.rank))
        self.register_parameter("C", nn.Parameter(site.new(*[c.rank] * 3)) if c.form == "tk" else None)
        self.register_buffer("scale", site.new(fill=c.scale))
        nn.init.uniform_(self.U, -(width**-0.5), width**-0.5)  # V is zero
        if self.C is not None:
            nn.init.xavier_uniform_(self.C)

    def shapes(self):
        core = {} if self.C is None else {"C": ("r", "r", "r")}
        return {"U": ("r", self.width), "V": (self.width, "r"), **core, "scale": ()}


class FacTDelta(Elastic, Additive):
    """W = W0 + s (I kron V) S (I kron U): of blocks [d, d], s V S_ij U; down x across of them

    S [down rank, across rank] trained, or, with P [rank, down across] trained, S_ij = sum_k P_k,ij C_k"""

    def __init__(self, factors: Factors, site, down: int, across: int, total: int, dropout: float):
        super().__init__()
        self.__dict__["shared"] = factors
        self.down, self.across, self.dropout, rank = down, across, dropout, len(factors.U)
        if factors.C is None:
            self.S = nn.Parameter(site.new(down * rank, across * rank))
            nn.init.uniform_(self.S, -((across * rank) ** -0.5), (across * rank) ** -0.5)
        else:
            self.P = nn.Parameter(site.new(rank, down * across))
            bound = math.sqrt(6 / (rank + total))
            nn.init.uniform_(self.P, -bound, bound)

    def shapes(self):
        return {"S": ("p", "q")} if self.shared.C is None else {"P": ("r", self.down * self.across)}

    def cores(self):
        """S."""
        if self.shared.C is None:
            return self.S
        blocks = torch.tensordot(self.shared.C, self.P, 1).unflatten(
            -1, (self.down, self.across)
        )  # [r, r, down, across]
        return blocks.permute(2, 0, 3, 1).flatten(2).flatten(0, 1)

    def factors(self):
        k, eye = self.shared, lambda n: torch.eye(n, dtype=self.shared.U.dtype, device=self.shared.U.device)
        b, s, a = torch.kron(eye(self.down), k.V * k.scale), self.cores(), torch.kron(eye(self.across), k.U)
        return (b @ s, a) if self.across < self.down else (b, s @ a)

    def randomize(self):
        nn.init.normal_(self.shared.V)

    def thin(self, x):
        return None  # as matrices the factors are mostly zeros

    def update(self, x, base, y):
        k = self.shared
        z = linear(x.unflatten(-1, (self.across, -1)), k.U).flatten(-2)
        z = linear(z, k.scale * self.cores())
        return linear(self.drop(z).unflatten(-1, (self.down, -1)), k.V).flatten(-2)


@register("fact")
class FacT(Structure):
    """FacT: W = W0 + s V S U on each block [d, d] of every layer; V [d, rank] and U [rank, d] shared by the whole model.

    Jie and Deng 2022 stack all blocks of a ViT, twelve a transformer layer: the two matrices of its MLP are four each. tt:
    S [rank, rank] is a block's own (a tensor train). tk: S = sum_k P_k C_k, C [rank, rank, rank] shared, P [rank] a
    block's own (Tucker's form). V starts at zero. d is the largest width that divides all layers (inferred for models
    that are no ViT). Every block of an MLP has a column of P, as in the paper; the authors' code reshapes the product C P
    [rank, rank, 4] to [rank, 4 rank], which mixes the four, and transposes it for the second matrix.

    Cost: rank (d_in + d_out) + rank^2 d_in d_out / d^2 products a position."""

    paper = "FacT, arXiv 2212.03145"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """form: tt or tk; scale: s, to be tuned (0.01 to 100 in the paper); width: d; dropout: between S and V (0.1
        in the paper)."""

        form: str = "tt"
        rank: int = 16
        scale: float = 1.0
        width: Optional[int] = None  # noqa: UP045
        dropout: float = 0.0

        def check(self):
            self.check_choices(form=FORMS)
            self.check_least(1, "rank")
            self.check_shares("dropout")
            self.check_not_zero("scale")
            if self.width is not None and self.width < 1:
                raise UserError(f"width is {self.width}; it must be at least 1")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.d = config.width or math.gcd(*(n for s in adapter.sites for n in s.base.shape))
        for s in adapter.sites:
            if s.d_in % self.d or s.d_out % self.d:
                raise UserError(f"width is {self.d}; it must divide [{s.d_out}, {s.d_in}], the shape of {s.name}")
        fitting(config.rank, self.d, adapter.sites[0])
        self.total = sum(math.prod(self.blocks(s)) for s in adapter.sites)
        self.shared = Factors(adapter.sites[0], self.d, config)

    def blocks(self, site) -> tuple[int, int]:
        """How many, down and across."""
        return site.d_out // self.d, site.d_in // self.d

    def build(self, site, make):
        return FacTDelta(self.shared, site, *self.blocks(site), self.total, self.config.dropout)

    def complaints(self, state):
        bad = []
        for d, n, k in self.sharing(FacTDelta, "shared"):
            rank = len(state[f"{k}.U"])
            if self.shared.C is None:
                want = [d.down * rank, d.across * rank]
                bad += [] if list(state[f"{n}.S"].shape) == want else [f"{n}.S is no {want}, as U of rank {rank} needs"]
            else:
                bad += [] if len(state[f"{n}.P"]) == rank else [f"{n}.P has another rank than U, {rank}"]
        return bad
