import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn

from ..adapter import Singular, Structure, linear
from ..adapter.singular import mark
from ..errors import UserError
from ..registry import StructureConfig, register

PATTERNS = ("plain", "banded", "random", "top_k")
STARTS = ("zero", "normal")
FILLS = (None, "orthonormal")
BAND = 2


def count(k: int, band: int) -> int:
    """Entries of a [k, k] matrix at most `band` off the diagonal."""
    band = min(band, k - 1)
    return k * (2 * band + 1) - band * (band + 1)


class SVFTDelta(Singular):
    """W = W0 + U M V^T; values [n] trained: M's diagonal, or its entries at index [2, n]; gate [1], optional, trained: M is
    sigmoid(gate) times that"""

    def __init__(self, site, k: int, c):
        super().__init__(site, min(site.d_out, site.d_in) if c.fill else k, c.save_basis)
        if c.fill:
            self.draw_after(k)
            k = len(self.S)
        self.plain = c.pattern == "plain"
        index = torch.arange(k).expand(2, k) if self.plain else self.chosen(c.pattern, c.band or BAND, site.name)
        if not self.plain:
            self.register_buffer("index", index.to(self.S.device, torch.int32))
        self.values = nn.Parameter(site.new(index.shape[1]))
        if c.start == "normal":
            nn.init.normal_(self.values, std=math.sqrt(2 / len(self.values)))
        self.register_parameter("gate", nn.Parameter(site.new(1)) if c.gate else None)

    def draw_after(self, k: int):
        """Orthonormal vectors at random in place of all singular vectors but the first k, on either side."""
        u, v = (nn.init.orthogonal_(torch.empty(len(t), len(self.S), dtype=torch.float64)) for t in (self.U, self.Vt.T))
        self.U[:, k:], self.Vt[k:] = u[:, k:], v.T[k:]
        self.S[k:] = 0
        self.mark.copy_(mark(self.U, self.Vt))

    def chosen(self, pattern: str, band: int, layer: str):
        """Rows and columns of M."""
        k = len(self.S)
        if pattern == "banded":
            i = torch.arange(k)
            return ((i[:, None] - i).abs() <= band).nonzero().T.contiguous()
        if pattern == "random":
            flat = torch.randperm(k * k)[: count(k, band)].sort().values
        elif self.d_out != self.d_in:
            raise UserError(f"pattern top_k compares U with V: {layer} [{self.d_out}, {self.d_in}] is not square")
        else:
            flat = (self.U.T @ self.Vt.T).flatten().topk(count(k, band)).indices.sort().values
        return torch.stack([flat // k, flat % k])

    def trained(self):
        n = len(self.values)
        shapes = {"values": (n,)} if self.plain else {"values": (n,), "index": (2, n)}
        return shapes if self.gate is None else {**shapes, "gate": (1,)}

    def complaints(self, saved):
        bad = super().complaints(saved)
        if not bad and not self.plain and not ((saved["index"] >= 0) & (saved["index"] < len(self.S))).all():
            bad = [f"index points outside [{len(self.S)}, {len(self.S)}]"]
        return bad

    def entries(self):
        return self.values if self.gate is None else self.values * torch.sigmoid(self.gate)

    def matrix(self):
        """M [k, k], where it is no diagonal."""
        k = len(self.S)
        return self.values.new_zeros(k, k).index_put((self.index[0], self.index[1]), self.entries())

    def randomize(self):
        nn.init.normal_(self.values)

    def left(self):
        return self.U * self.entries() if self.plain else self.U @ self.matrix()

    def core(self, z):
        return self.entries() * z if self.plain else linear(z, self.matrix())


@register("svft")
class SVFT(Structure):
    """SVFT: W = W0 + U M V^T, W0 = U diag(sigma) V^T; M [k, k] trains on a fixed sparse pattern, k = min(d_out, d_in).

    Lingam et al. 2024. Patterns: `plain`, the diagonal; `banded`, up to `band` off it; `random` and `top_k`, as many entries
    as that band has, drawn, or where u_i^T v_j is largest (signed, as in the authors' code; that code compares rows of U,
    not columns, and for a layer that is not square the rows of one basis: here only square layers have it). The authors'
    code draws `random` with replacement. The paper starts at M = 0; the code at N(0, 2 / n) (`start=normal`), with one more
    number a layer, `gate`, whose sigmoid multiplies M and starts at 1/2. Both are options, and so is what their code puts in
    place of triplets left out, random orthonormal vectors, orthonormal among themselves alone; it takes those triplets out of
    W0 as well, and here W0 is whole.

    Cost: k (d_in + d_out) products a position, and unless the pattern is plain k^2 more, for M is multiplied as a dense
    matrix; U and V in memory, twice the layer; an SVD of every layer at the start and at loading. The checkpoint has a mark
    of U and V, or with save_basis both."""

    paper = "SVFT, arXiv 2405.19597"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """pattern; band: how far from the diagonal, for all but plain (null: 2); triplets: how many singular triplets, the
        largest first (null: all); fill: orthonormal, random vectors in place of the other triplets (null: none); start: zero or
        normal; gate; save_basis: keep U and V in the checkpoint, else their mark."""

        pattern: str = "plain"
        band: Optional[int] = None  # noqa: UP045  OmegaConf
        triplets: Optional[int] = None  # noqa: UP045
        fill: Optional[str] = None  # noqa: UP045
        start: str = "zero"
        gate: bool = False
        save_basis: bool = False

        def check(self):
            self.check_choices(pattern=PATTERNS, start=STARTS, fill=FILLS)
            self.check_least(1, "band", "triplets")
            if self.band is not None and self.pattern == "plain":
                raise UserError(f"band is {self.band}, of no effect on pattern=plain")
            if self.fill and self.triplets is None:
                raise UserError(f"fill is {self.fill}, of no effect without triplets, how many singular vectors to keep")
            if self.fill and not self.save_basis:
                raise UserError(f"fill is {self.fill}, of vectors that no base gives back: it needs save_basis=true")

    def build(self, site, make):
        k, c = min(site.d_out, site.d_in), self.config
        if (c.triplets or 1) > k:
            raise UserError(f"triplets is {c.triplets}, and {site.name} [{site.d_out}, {site.d_in}] has {k}")
        return SVFTDelta(site, c.triplets or k, c)
