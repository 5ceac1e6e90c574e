from dataclasses import dataclass
from typing import Optional

import torch.nn as nn
from torch import Tensor

from ..adapter import Delta, LowRank
from ..adapter.ranked import Ranked, RankedConfig, fitting
from ..errors import UserError
from ..registry import register

BRANCHES = ("both", "parallel", "sequential")


class Branch(nn.Module):
    """s B (A x + down) + s up; the biases down [rank] and up [d_out] where it is biased"""

    def __init__(self, low: LowRank, biased: bool):
        super().__init__()
        self.low = low
        d_out, rank = low.B.shape
        self.down = nn.Parameter(low.B.new_zeros(rank)) if biased else None
        self.up = nn.Parameter(low.B.new_zeros(d_out)) if biased else None

    def shift(self):
        if self.down is None:
            return 0
        return self.low.scale * self.low.partners()[0] @ self.down + self.low.scale * self.up


class HydraDelta(Delta):
    """y = f(x) + parallel(x) + sequential(f(x)), f(x) = W0 x + b0 before anything is added"""

    def __init__(self, parallel: Branch | None, sequential: Branch | None):
        super().__init__()
        self.parallel, self.sequential = parallel, sequential

    def bias_of_branches(self):
        return sum(branch.shift() for branch in (self.parallel, self.sequential) if branch is not None)

    def weight(self, base):
        w = base.weight
        if self.sequential is not None:
            b, a = self.sequential.low.factors()
            w = w + b @ (a @ w.to(a.dtype))
        return w if self.parallel is None else w + self.parallel.low.product()

    def shift(self, base):
        s = self.bias_of_branches()
        if self.sequential is not None and base.bias is not None:
            b, a = self.sequential.low.factors()
            s = s + b @ (a @ base.bias.to(a.dtype))
        return s if isinstance(s, Tensor) else None

    def update(self, x, base, y):
        u = self.bias_of_branches()
        if self.parallel is not None:
            u = u + self.parallel.low(x)
        return u if self.sequential is None else u + self.sequential.low(y)


@register("hydra")
class Hydra(Ranked):
    """Hydra: y = f(x) + s B A x + s B_s A_s f(x); a LoRA beside the layer and a low-rank linear adapter behind it.

    Kim et al. 2023. A [rank, d_in], B [d_out, rank]; A_s [sequential_rank, d_out], B_s [d_out, sequential_rank] read
    f(x) = W0 x + b0, the frozen layer's own output. Merged: W = W0 + s (B A + B_s A_s W0), b = b0 + s B_s A_s b0. B and
    B_s are zero at first, both A uniform as in LoRA (the authors' language code; their vision code draws A from other
    distributions of a like size). s is one for both branches and 1 in that code, so alpha is null; with one,
    s = alpha / rank. The released language code never runs the branch, two names being misspelt; this is the paper's.

    Cost: rank (d_in + d_out) and 2 sequential_rank d_out products a position."""

    paper = "Hydra, arXiv 2309.06922"
    gives = frozenset({"low_rank", "weight"})

    @dataclass
    class Config(RankedConfig):
        """rank: of both branches; sequential_rank: another one for the branch that reads f(x); branches: both, parallel or
        sequential; alpha: null, s = 1; branch_bias: trained biases behind A and B, as in the paper's vision models, zero at
        first. Dropout is of what A and A_s read."""

        alpha: Optional[float] = None  # type: ignore[assignment]  # noqa: UP045
        branches: str = "both"
        sequential_rank: Optional[int] = None  # noqa: UP045
        branch_bias: bool = False

        def check(self):
            super().check()
            self.check_choices(branches=BRANCHES)
            self.check_least(1, "sequential_rank")
            if self.sequential_rank is not None and self.branches != "both":
                raise UserError(f"sequential_rank tells two branches apart, branches is {self.branches}: use rank")

        def gives(self):  # the biases do not follow a rank that changes
            return self.owner.gives - ({"low_rank"} if self.branch_bias else set())

    def build(self, site, make):
        c, parallel, sequential = self.config, None, None
        if c.branches != "sequential":
            parallel = Branch(self.low_rank(site), c.branch_bias)
        if c.branches != "parallel":
            d, rank = site.d_out, fitting(c.sequential_rank or self.rank(site), site.d_out, site)
            behind = LowRank(d, d, rank, self.scale(site), site.base.weight, c.dropout)
            sequential = Branch(behind, c.branch_bias)
        return HydraDelta(parallel, sequential)
