import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from .. import linalg
from ..adapter import kronecker
from ..adapter.lycoris import Lycoris, LycorisConfig, LycorisDelta, uniform
from ..errors import UserError
from ..registry import register

FORMS = (("W1", "W1a", "W1b"), ("W2", "W2a", "W2b"))  # a matrix, or a product of two


def split(dimension: int, factor: int) -> tuple[int, int]:
    """(m, n), m n = dimension: m is `factor` where that divides it, else the largest divisor up to `factor` and up to n;
    the nearest to the square root for -1."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    m = max(k for k in linalg.divisors(dimension) if k * k <= dimension and (factor == -1 or k <= factor))
    return m, dimension // m


def most(left: tuple[int, int], right: tuple[int, int]) -> int:
    """The largest rank that means anything for d_out = a b and d_in = c d: none has more, or all matrices are whole."""
    return max(min(math.prod(left), math.prod(right)), (max(*left, *right) + 1) // 2)


class LoKrDelta(LycorisDelta):
    """W = W0 + s W1 kron W2; W1 [a, c] or W1a [a, rank] W1b [rank, c], W2 [b, d] or W2a [b, rank] W2b [rank, d], trained;
    a b = d_out, c d = d_in"""

    names = {n: f"lokr_{n[:2].lower()}" + (f"_{n[2]}" if n[2:] else "") for form in FORMS for n in form}
    grown = (("W1",), ("W1a", "W1b"), ("W2",), ("W2a", "W2b"))

    def __init__(self, site, rank: int, scale: float, c):
        (a, b), (cc, d) = split(site.d_out, c.decompose_factor), split(site.d_in, c.decompose_factor)
        whole = not (c.decompose_both and rank < max(a, cc) / 2), not rank < max(b, d) / 2
        super().__init__(site.new(fill=1.0 if c.unit_full and all(whole) else scale), c)
        self.given, self.sizes = rank, ((a, cc), (b, d))
        for (rows, columns), full, (one, left, right) in zip(self.sizes, whole, FORMS, strict=True):
            made = {one: (rows, columns)} if full else {left: (rows, rank), right: (rank, columns)}
            for name in (one, left, right):
                p = nn.Parameter(site.new(*made[name])) if name in made else None
                self.register_parameter(name, p)
                last = name in (one, left if one == "W1" else right)  # what is zero where this matrix is
                if p is not None and not (last and one == c.zero):
                    uniform(p)

    @property
    def rank(self):
        """Where no tensor tells, one at which PEFT does not decompose them either."""
        found = [p.shape[1] for p in (self.W1a, self.W2a) if p is not None]
        return found[0] if found else max(self.given, *((max(size) + 1) // 2 for size in self.sizes))

    def shapes(self):
        (a, c), (b, d) = self.sizes
        return {"W1": (a, c), "W1a": (a, "r"), "W1b": ("r", c), "W2": (b, d), "W2a": (b, "r"), "W2b": ("r", d), "scale": ()}

    def complaints(self, saved):
        bad = super().complaints(saved)
        forms = {one: (one in saved, left in saved or right in saved) for one, left, right in FORMS}
        bad += [f"{one} is missing" for one, form in forms.items() if not any(form)]
        return bad + [f"{one} is there whole and as a product" for one, form in forms.items() if all(form)]

    def matrices(self):
        """W1 and W2, each as one matrix."""
        return [self.W1 if self.W1 is not None else self.W1a @ self.W1b, self.W2 if self.W2 is not None else self.W2a @ self.W2b]

    def weight(self, base):
        w1, w2 = self.matrices()
        return base.weight + torch.kron(self.scale * w1, w2)

    def product(self, x):
        w1 = self.W1 if self.W1 is not None else self.W1a @ self.W1b
        return kronecker(x, self.scale * w1, *((self.W2,) if self.W2 is not None else (self.W2b, self.W2a)))


@register("lokr")
class LoKr(Lycoris):
    """LoKr: W = W0 + (alpha / rank) W1 kron W2, W1 [a, c] small, W2 [b, d] a product of rank `rank`: rank(W1) rank(W2).

    Yeh et al. 2023 (LyCORIS), after KronA (arXiv 2212.10650), where neither is a product. d_out = a b and d_in = c d are
    split near their square roots, or at `decompose_factor`; a prime becomes 1 times itself. W2 is one matrix where rank
    >= max(b, d) / 2; W1 is, unless `decompose_both` and rank < max(a, c) / 2. PEFT starts W1 at zero, LyCORIS W2, which
    matters to what weight decay does first. Where both are one matrix nothing has a rank: LyCORIS then takes s = 1
    (`unit_full`), PEFT keeps alpha / rank.

    Cost: c rank (b + d) + a b c products a position, or a rank (b + d) + a c d where a < c; no [d_out, d_in] update is
    formed, where LyCORIS (unless told) and PEFT form it in every step."""

    paper = "LyCORIS, arXiv 2309.14859"
    gives = frozenset({"weight"})
    kind = "LOKR"
    same = (*Lycoris.same, "rank_dropout_scale", "decompose_both", "decompose_factor")

    @dataclass
    class Config(LycorisConfig):
        """rank: of W2, and of W1 with decompose_both; decompose_factor: -1, or the a and c to aim at; zero: which of W1 and
        W2 starts at zero; unit_full: s = 1 in a layer where both are one matrix."""

        decompose_both: bool = False
        decompose_factor: int = -1
        zero: str = "W1"
        unit_full: bool = False

        def check(self):
            super().check()
            if self.decompose_factor < 1 and self.decompose_factor != -1:
                raise UserError(f"decompose_factor is {self.decompose_factor}; it must be -1 or at least 1")
            if self.zero not in ("W1", "W2"):
                raise UserError(f"zero is {self.zero!r}; it takes W1, W2")

    def build(self, site, make):
        return LoKrDelta(site, self.fitting(site), self.scale(site), self.config)

    def most(self, site):
        return most(*(split(d, self.config.decompose_factor) for d in (site.d_out, site.d_in)))

    @classmethod
    def meant(cls, rank, tensors):
        whole = [tensors[n].shape for n in ("lokr_w1", "lokr_w2") if n in tensors]
        return min(rank, most(*zip(*whole, strict=True))) if len(whole) == 2 else rank
