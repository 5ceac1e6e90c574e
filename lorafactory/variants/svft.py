import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn

from ..adapter import Singular, Structure, linear
from ..errors import UserError
from ..registry import StructureConfig, register

PATTERNS = ("plain", "banded", "random", "top_k")
STARTS = ("zero", "normal")
BAND = 2


def count(k: int, band: int) -> int:
    """Entries of a [k, k] matrix at most `band` off the diagonal."""
    band = min(band, k - 1)
    return k * (2 * band + 1) - band * (band + 1)


class SVFTDelta(Singular):
    """W = W0 + U M V^T; values [n] trained: M's diagonal, or its entries at index [2, n]; gate [1], optional, trained: M is
    sigmoid(gate) times that"""

    def __init__(self, site, k: int, c):
        super().__init__(site, k, c.save_basis)
        self.plain = c.pattern == "plain"
        index = torch.arange(k).expand(2, k) if self.plain else self.chosen(c.pattern, c.band or BAND, site.name)
        if not self.plain:
            self.register_buffer("index", index.to(self.S.device, torch.int32))
        self.values = nn.Parameter(site.new(index.shape[1]))
        if c.start == "normal":
            nn.init.normal_(self.values, std=math.sqrt(2 / len(self.values)))
        self.register_parameter("gate", nn.Parameter(site.new(1)) if c.gate else None)

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
    number a layer, `gate`, whose sigmoid multiplies M and starts at 1/2. Both are options.

    Cost: k (d_in + d_out) products a position, and unless the pattern is plain k^2 more, for M is multiplied as a dense
    matrix; U and V in memory, twice the layer; an SVD of every layer at the start and at loading. The checkpoint has a mark
    of U and V, or with save_basis both."""

    paper = "SVFT, arXiv 2405.19597"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """pattern; band: how far from the diagonal, for all but plain (null: 2); triplets: how many singular triplets, the
        largest first (null: all); start: zero or normal; gate; save_basis: keep U and V in the checkpoint, else their
        mark."""

        pattern: str = "plain"
        band: Optional[int] = None  # noqa: UP045  OmegaConf
        triplets: Optional[int] = None  # noqa: UP045
        start: str = "zero"
        gate: bool = False
        save_basis: bool = False

        def check(self):
            self.check_choices(pattern=PATTERNS, start=STARTS)
            self.check_least(1, "band", "triplets")
            if self.band is not None and self.pattern == "plain":
                raise UserError(f"band is {self.band}, of no effect on pattern=plain")

    def build(self, site, make):
        k, c = min(site.d_out, site.d_in), self.config
        if (c.triplets or 1) > k:
            raise UserError(f"triplets is {c.triplets}, and {site.name} [{site.d_out}, {site.d_in}] has {k}")
        return SVFTDelta(site, c.triplets or k, c)
