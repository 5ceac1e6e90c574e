from dataclasses import dataclass
from typing import List, Optional  # noqa: UP035  as in registry

import torch
import torch.nn as nn

from .. import linalg
from ..adapter import Delta, Structure, kronecker
from ..errors import UserError
from ..registry import StructureConfig, register

STARTS = ("uniform", "normal")


def shape(d_out: int, d_in: int) -> tuple[int, int]:
    """[a1, a2] of A with the fewest parameters a1 a2 + d_out d_in / (a1 a2); of those, the update's largest rank."""

    def key(a: tuple[int, int]) -> tuple[int, int, int]:
        size, b = a[0] * a[1], (d_out // a[0], d_in // a[1])
        return size + b[0] * b[1], -min(a) * min(b), a[0]

    return min(((i, j) for i in linalg.divisors(d_out) for j in linalg.divisors(d_in)), key=key)


class KronADelta(Delta):
    """W = W0 + s A kron B; A [a1, a2] and B [d_out / a1, d_in / a2] trained"""

    def __init__(self, site, outer: tuple[int, int], c):
        super().__init__()
        self.dropout = c.dropout
        self.A = nn.Parameter(site.new(*outer))
        self.B = nn.Parameter(site.new(site.d_out // outer[0], site.d_in // outer[1]))
        self.register_buffer("scale", site.new(fill=c.scale))
        bound = outer[1] ** -0.5
        nn.init.normal_(self.A, std=bound) if c.start == "normal" else nn.init.uniform_(self.A, -bound, bound)

    def weight(self, base):
        return base.weight + torch.kron(self.scale * self.A, self.B)

    def update(self, x, base, y):
        x = self.drop(x)
        return kronecker(x, self.scale * self.A, self.B)


@register("krona")
class KronA(Structure):
    """KronA: W = W0 + s A kron B, A [a1, a2] and B [d_out / a1, d_in / a2] trained: rank(A) rank(B), which may be full.

    Edalati et al. 2022; of its three forms the one beside a weight, which merges (KronA^B and its residual stand beside a
    whole block). Its code is not public: that B is the one that starts at zero, A's uniform start and s = 1 are inferred
    from LoKr, LyCORIS' implementation of it, whose whole W1 and W2 these are. s is a hyper-parameter, to be tuned. `outer`
    gives a1 and a2 for all layers; null takes in each the split with the fewest parameters, a1 a2 near sqrt(d_out d_in).
    A square A and B, such as outer=[24,24] of 768 by 768, can have full rank at a few parameters more.

    Cost: d_out d_in / a1 + a2 d_out products a position, or d_out d_in / a2 + a1 d_in where a1 < a2; no [d_out, d_in]
    update is formed."""

    paper = "KronA, arXiv 2212.10650"
    gives = frozenset({"weight"})

    @dataclass
    class Config(StructureConfig):
        """outer: [a1, a2], the shape of A; scale: s; start: of A, uniform in +-1/sqrt(a2) or normal with that deviation;
        dropout: of what the update reads."""

        outer: Optional[List[int]] = None  # noqa: UP006, UP045
        scale: float = 1.0
        start: str = "uniform"
        dropout: float = 0.0

        def check(self):
            if self.outer is not None and (len(self.outer) != 2 or min(self.outer) < 1):
                raise UserError(f"outer is {self.outer}; it takes [a1, a2], both at least 1")
            self.check_not_zero("scale")
            self.check_choices(start=STARTS)
            self.check_shares("dropout")

    def build(self, site, make):
        outer = self.config.outer or shape(site.d_out, site.d_in)
        if site.d_out % outer[0] or site.d_in % outer[1]:
            raise UserError(f"outer is {list(outer)}; it must divide [{site.d_out}, {site.d_in}], the shape of {site.name}")
        return KronADelta(site, outer, self.config)
