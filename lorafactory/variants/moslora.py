from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter import Additive, LowRank
from ..adapter.ranked import Ranked, RankedConfig
from ..errors import UserError
from ..registry import register

STARTS = ("kaiming", "orthogonal", "normal", "identity", "pairs")


def mixer(start: str, rank: int) -> torch.Tensor:
    """M [rank, rank] as it starts. Raises UserError where there is none of this rank."""
    if start == "normal":
        return torch.randn(rank, rank)
    if start == "orthogonal":
        return nn.init.orthogonal_(torch.empty(rank, rank))
    if start == "identity":
        return torch.eye(rank)
    if start == "pairs":
        if rank % 2:
            raise UserError(f"start is 'pairs' and a layer's rank is {rank}; it must be even")
        return torch.eye(rank // 2).repeat(2, 2)
    bound = max(rank, 1) ** -0.5
    return torch.empty(rank, rank).uniform_(-bound, bound)


class Mixed(LowRank):
    """update = scale * (B N A - B0 N0 A0) + B_past A_past; N = diag(gate) M diag(gate), and with a mask an entry of it counts
    as much as the less of its two ranks: so 0 and 1 cut a truncation out, and the sum of some has the sum of their masks

    M [rank, rank]  trained, unless frozen
    M0              where M started, if A0 and B0 are there"""

    grown = (("A0", "B0", "M0"), ("A_past", "B_past"))

    def __init__(self, site, rank, scale, config):
        super().__init__(site.d_in, site.d_out, rank, scale, site.base.weight, config.dropout)
        self.mixer = config.start
        self.M = nn.Parameter(mixer(self.mixer, rank).to(self.A), not config.frozen)
        self.register_buffer("M0", None)

    def shapes(self):
        return {**super().shapes(), "M": ("r", "r"), "M0": ("r", "r")}

    def counted(self, m):
        """N of M [rank, rank]."""
        if self.gate is not None:
            m = self.gate[:, None] * m * self.gate
        mask = self.masked()
        return m if mask is None else torch.minimum(mask[:, None], mask) * m

    def trained(self):
        a = self.scale * self.counted(self.M) @ self.drawn()
        if self.M0 is None:
            return self.B, a
        return torch.cat([self.B, -self.B0], 1), torch.cat([a, self.scale * self.counted(self.M0) @ self.A0])

    def partners(self):
        n = self.counted(self.M)
        return self.B @ n, n @ self.A

    def start(self, a, b=None):
        super().start(a, b)
        self.M0 = None if self.A0 is None else self.M.detach().clone()

    def fold(self, compact=True, rank=None):
        super().fold(compact, rank)
        self.M0 = None

    def _allocate(self, rank):
        super()._allocate(rank)
        self.M = self.replaced(mixer(self.mixer, rank))

    def keep(self, index):
        moved = super().keep(index)
        old, self.M = self.M, self.replaced(self.M.detach()[index][:, index])
        self.M0 = None if self.M0 is None else self.M0[index][:, index]
        return {**moved, self.M: (old, lambda state: state[index][:, index])}

    def grow(self, count):
        super().grow(count)
        eye = torch.eye(count).to(self.A)  # new ranks are not mixed yet, so the update stays
        self.M = self.replaced(torch.block_diag(self.M.detach(), eye))
        self.M0 = None if self.M0 is None else torch.block_diag(self.M0, eye)

    def become(self, b, a):
        super().become(b, a)
        self.M, self.M0 = self.replaced(torch.eye(self.rank)), None

    def replaced(self, m):
        return nn.Parameter(m.to(self.A), self.M.requires_grad)


class MoSLoRADelta(Additive):
    """W = W0 + s B M A"""

    def __init__(self, mixed: Mixed):
        super().__init__()
        self.mixed = mixed

    def factors(self):
        return self.mixed.factors()

    def randomize(self):
        self.mixed.randomize()

    def thin(self, x):
        return self.mixed.thin(x)


@register("moslora")
class MoSLoRA(Ranked):
    """MoSLoRA: W = W0 + (alpha / rank) B M A: a trained mixer M [rank, rank] fuses every subspace of A with every one of B.

    Wu et al. 2024. A [rank, d_in] starts as in LoRA and B [d_out, rank] at zero, so M must start elsewhere; the authors'
    code has Kaiming-uniform (a = sqrt 5), and orthogonal, normal and the identity beside it. `pairs` is [[I, I], [I, I]],
    which sums the two halves of A and of B: frozen, it is the fixed mixer of two subspaces that the paper starts from, an
    update of half the rank. Frozen at the identity it is LoRA, so that is refused.

    A and B are a pair: an initialisation starts both, M starts as `start` says, and s B0 M0 A0 is subtracted; of pissa's start
    that is the leading part of W0 where M starts at the identity. A gate counts at both sides of M, so that a rank without
    it is gone; refused are AdaLoRA, AirLLM and IncreLoRA, whose gates start at zero between orthogonal factors, and
    LoRA-RITE, which divides by what M may have near singular. A squeeze leaves M at the identity, ranks that grow are not
    mixed at first; DyLoRA's `frozen` holds A and B, not M.

    Cost: LoRA's, and rank^2 d_in products a step for M A."""

    paper = "MoSLoRA, arXiv 2406.11909"
    gives, does = frozenset({"low_rank", "input", "additive", "weight"}), frozenset({"mixes ranks"})

    @dataclass
    class Config(RankedConfig):
        """start: of M, kaiming, orthogonal, normal, identity or pairs (of an even rank); frozen: M stays as it starts."""

        start: str = "kaiming"
        frozen: bool = False

        def check(self):
            super().check()
            self.check_choices(start=STARTS)
            if self.frozen and self.start == "identity":
                raise UserError("frozen at start='identity', M changes nothing: take lora, or another start")

    def build(self, site, make):
        return MoSLoRADelta(Mixed(site, self.fitting(site), self.scale(site), self.config))
