from dataclasses import dataclass

import torch
import torch.nn as nn

from .. import linalg
from ..adapter import Structure, Turned
from ..adapter.peft import only_linear
from ..adapter.turned import block_dropout, some_identity
from ..errors import UserError
from ..registry import StructureConfig, register


def butterfly(d_in, block, factor):
    """[d_in] the order in which the blocks of a factor, counted from 0, read the inputs: a block holds two halves that
    stand 2^factor halves apart."""
    halves = torch.arange(d_in).view(-1, 2 * 2**factor, block // 2)
    return torch.cat([halves[:, ::2], halves[:, 1::2]], 1).flatten().argsort()


class BOFTDelta(Turned):
    """W = diag(s) W0 R^T, R = B_m ... B_1, B_j = P_j diag(R_j1 ... R_jn) P_j^T; q [m, n, block (block - 1) / 2] and
    s [d_out] trained"""

    def __init__(self, site, c):
        super().__init__()
        m, b = c.factors, c.block_size
        group = b * 2 ** (m - 1)
        if site.d_in % group:
            told = f"block_size {b} with factors {m} needs a multiple of {group} inputs"
            raise UserError(f"{told}, and {site.name} has {site.d_in}")
        n = site.d_in // b
        self.size, self.dropout = b, block_dropout(c.dropout, n, site.name)
        self.q = nn.Parameter(site.new(m, n, b * (b - 1) // 2))
        self.s = nn.Parameter(site.new(site.d_out, fill=1.0))
        # nothing to permute in the first factor, which may have odd blocks
        orders = torch.stack([torch.arange(site.d_in), *(butterfly(site.d_in, b, j) for j in range(1, m))])
        self.register_buffer("order", orders.to(self.q.device), persistent=False)

    def blocks(self):
        """[m, n, block, block]; in training, some of one factor's are the identity."""
        with torch.autocast(self.q.device.type, enabled=False):
            r = linalg.cayley(linalg.skew(self.q, self.size))
        if not (self.training and self.dropout):
            return r
        j = int(torch.randint(len(r), ()))
        return torch.cat([r[:j], some_identity(r[j], self.dropout)[None], r[j + 1 :]])

    def turn(self, x, back=False):
        steps = list(zip(self.blocks(), self.order, strict=True))
        for r, order in steps if back else reversed(steps):
            inputs = order.argsort()
            x = linalg.blockwise(x[..., order], r.mT if back else r)[..., inputs]
        return x

    def weight(self, base):
        return self.s[:, None] * super().weight(base)

    def update(self, x, base, y):
        turned = super().update(x, base, y)
        plain = y if base.bias is None else y - base.bias
        return (self.s - 1) * plain + self.s * turned

    def forward(self, x, base):
        y, b = super().forward(x, base), base.bias  # the bias is not scaled
        return (self.s * y if b is None else torch.addcmul(b - self.s * b, self.s, y.to(self.s.dtype))).to(y.dtype)


@register("boft")
class BOFT(Structure):
    """BOFT: W = diag(s) W0 R^T, R = B_m ... B_1 orthogonal; each butterfly factor B_j turns blocks of distant inputs.

    Liu et al. 2024, after PEFT's code, which scales the outputs by s as well. One factor is OFT; log2(2 d / block) of them
    make a dense R. Blocks are (I + Q)(I - Q)^-1 with Q the entries above the diagonal, zero at the start; PEFT keeps
    whole matrices of which it reads the skew part, and the inverse of each block. PEFT also falls back to one factor
    where its CUDA kernel is not to be had; here no factor needs one.

    Cost: m n solves of [block, block], m block d_in products a position, two passes over the output, and the base's own
    product once."""

    paper = "BOFT, arXiv 2311.06243"
    gives = frozenset({"weight"})
    does = frozenset({"scales rows"})

    @dataclass
    class Config(StructureConfig):
        """block_size: of each block; factors: m, each layer's inputs are a multiple of block_size 2^(m - 1); dropout: in a
        training step this share of the blocks of one factor, drawn anew, is the identity."""

        block_size: int = 4
        factors: int = 1
        dropout: float = 0.0

        def check(self):
            self.check_least(2, "block_size")
            self.check_least(1, "factors")
            if self.factors > 1 and self.block_size % 2:
                raise UserError(f"block_size is {self.block_size}; several factors exchange halves: it must be even")
            self.check_shares("dropout")

    def build(self, site, make):
        return BOFTDelta(site, self.config)

    def to_peft(self, out):
        c = self.config
        only_linear(self.name, self.adapter.sites)
        if c.factors > 1:
            raise UserError(f"PEFT has {self.name} with {c.factors} factors only where its CUDA kernel compiles")
        out.fields |= {"peft_type": "BOFT", "boft_block_size": c.block_size, "boft_block_num": 0,
                       "boft_n_butterfly_factor": c.factors, "boft_dropout": c.dropout}  # fmt: skip
        for site, d in self.adapter.inside(BOFTDelta):
            out.layers[site.name] = {"boft_R": -linalg.skew(d.q, d.size), "boft_s": d.s[:, None]}

    @classmethod
    def from_peft(cls, saved):
        f = saved.fields
        if f.get("peft_type") != "BOFT":
            return None
        shapes = {tuple(t["boft_R"].shape) for t in saved.layers.values() if "boft_R" in t}
        if len({(s[0], s[2]) for s in shapes}) != 1:
            raise UserError(f"its layers have blocks of shapes {sorted(shapes)}; one size for all is needed")
        m, _, b, _ = shapes.pop()  # not the field: PEFT falls back to one factor
        saved.drop("peft_type", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "init_weights")
        return {"block_size": b, "factors": m, "dropout": saved.fields.pop("boft_dropout", 0.0)}

    def fill(self, saved):
        for site, d in self.adapter.inside(BOFTDelta):
            whole = linalg.skew(d.q, d.size)
            saved.take(site.name, "boft_R", whole)
            d.q.copy_(linalg.upper(whole.mT - whole) / 2)
            s = d.s[:, None].clone()
            saved.take(site.name, "boft_s", s)
            d.s.copy_(s[:, 0])
