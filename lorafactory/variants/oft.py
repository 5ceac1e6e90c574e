from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn

from .. import linalg
from ..adapter import Structure, Turned
from ..adapter.peft import only_linear
from ..adapter.turned import block_dropout, some_identity
from ..errors import UserError
from ..registry import StructureConfig, register

WEIGHT = "oft_R.weight"  # PEFT's name of q


class OFTDelta(Turned):
    """W = W0 R^T, R = diag(R_1 ... R_n); R_i = cayley(Q_i), Q_i skew; q [n or 1, block (block - 1) / 2] trained"""

    def __init__(self, site, c):
        super().__init__()
        if site.d_in % c.block_size:
            raise UserError(f"block_size is {c.block_size}; it must divide the {site.d_in} inputs of {site.name}")
        n = site.d_in // c.block_size
        self.size, self.terms, self.dropout = c.block_size, c.terms, block_dropout(c.dropout, n, site.name)
        self.q = nn.Parameter(site.new(1 if c.block_share else n, c.block_size * (c.block_size - 1) // 2))

    def blocks(self):
        with torch.autocast(self.q.device.type, enabled=False):
            r = linalg.cayley(linalg.skew(self.q, self.size), self.terms)
            return some_identity(r, self.dropout) if self.training and self.dropout else r

    def turn(self, x, back=False):
        r = self.blocks()
        return linalg.blockwise(x, r.mT if back else r)

    def project(self, epsilon):
        """|Q_i| <= epsilon / sqrt(n), the nearest such."""
        bound = epsilon / len(self.q) ** 0.5
        norm = 2**0.5 * self.q.norm(dim=1, keepdim=True)
        self.q.mul_(torch.where(norm > bound, bound / norm, 1.0))


@register("oft")
class OFT(Structure):
    """OFT: W = W0 R^T, R = diag(R_1 ... R_n) orthogonal, R_i = (I + Q_i)(I - Q_i)^-1, Q_i = -Q_i^T zero at the start.

    Qiu et al. 2023: the inputs of a layer are turned, so that the angles between its neurons stay. Their R_i is exact,
    which is the default; `terms` is the Cayley-Neumann series of OFTv2 (arXiv 2506.19847) and PEFT's default, 5: it
    saves the solve, and leaves the rotations as Q grows (|R^T R - I| near 0.05 for entries of 0.05). PEFT's
    exact R is the inverse of what its series approximates, so that one checkpoint is two functions there; here both
    are the paper's, and export turns the sign of Q. PEFT also adjusts a block size that does not divide a layer, without
    a word; here it is refused. COFT's bound is kept after each step, where PEFT projects before each forward pass.

    Cost: n solves of [block, block], block d_in products a position, and the base's own product once."""

    paper = "OFT, arXiv 2306.07280"
    gives = frozenset({"weight"})

    @dataclass
    class Config(StructureConfig):
        """block_size: of each R_i, divides every layer's inputs; terms: of the Neumann series (null: exact); epsilon:
        COFT, |Q_i| <= epsilon / sqrt(n) always (null: free; PEFT's eps is 6e-5); block_share: one R_i for all; dropout:
        this share of a layer's blocks is the identity in a training step."""

        block_size: int = 32
        terms: Optional[int] = None  # noqa: UP045
        epsilon: Optional[float] = None  # noqa: UP045
        block_share: bool = False
        dropout: float = 0.0

        def check(self):
            self.check_least(2, "block_size")
            if self.terms is not None and self.terms < 4:
                raise UserError(f"terms is {self.terms}; it must be at least 4 (null: exact)")
            if self.epsilon is not None and self.epsilon <= 0:
                raise UserError(f"epsilon is {self.epsilon}; it must be positive (null: no bound)")
            self.check_shares("dropout")
            if self.dropout and self.block_share:
                raise UserError(f"dropout is {self.dropout}, of no effect on the one block of block_share: leave one out")

    def build(self, site, make):
        return OFTDelta(site, self.config)

    def after_step(self, step):
        if self.config.epsilon is not None:
            for _, d in self.adapter.inside(OFTDelta):
                d.project(self.config.epsilon)

    def sign(self):
        return 1.0 if self.config.terms else -1.0

    def to_peft(self, out):
        c = self.config
        only_linear(self.name, self.adapter.sites)
        out.fields |= {"peft_type": "OFT", "r": 0, "oft_block_size": c.block_size, "block_share": c.block_share}
        out.fields |= {"module_dropout": c.dropout, "use_cayley_neumann": c.terms is not None}
        out.fields |= {"num_cayley_neumann_terms": c.terms} if c.terms else {}
        out.fields |= {"coft": True, "eps": c.epsilon} if c.epsilon else {}
        for site, d in self.adapter.inside(OFTDelta):
            out.layers[site.name] = {WEIGHT: self.sign() * d.q}

    @classmethod
    def from_peft(cls, saved):
        f = saved.fields
        if f.get("peft_type") != "OFT":
            return None
        # block (block - 1) / 2 columns; PEFT may have adjusted the size layer by layer
        columns = {t[WEIGHT].shape[1] for t in saved.layers.values() if WEIGHT in t}
        sizes = sorted(round((1 + (1 + 8 * k) ** 0.5) / 2) for k in columns)
        if len(sizes) != 1:
            raise UserError(f"its layers have block sizes {sizes}; one for all is needed")
        terms = f.get("num_cayley_neumann_terms", 5)
        if not f.get("use_cayley_neumann"):
            terms = None
        elif terms == 3:  # what it computes then is its 4
            terms = 4
        options = {"block_size": sizes[0], "terms": terms, "dropout": f.get("module_dropout", 0.0)}
        options |= {"epsilon": f["eps"] if f.get("coft") else None, "block_share": f.get("block_share", False)}
        saved.drop("peft_type", "r", "oft_block_size", "module_dropout", "coft", "eps", "block_share", "init_weights",
                   "use_cayley_neumann", "num_cayley_neumann_terms")  # fmt: skip
        return options

    def fill(self, saved):
        for site, d in self.adapter.inside(OFTDelta):
            saved.take(site.name, WEIGHT, d.q)
            d.q.mul_(self.sign())
            if self.config.epsilon is not None:  # PEFT projects when it reads
                d.project(self.config.epsilon)
