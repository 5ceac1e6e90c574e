from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Additive, Delta, Elastic, Structure
from ..adapter.peft import only_linear
from ..errors import UserError
from ..registry import StructureConfig, register

WEIGHT = "miss_block"  # PEFT's name of D


class Shared(Elastic, Additive):
    """W = W0 + D^T [I I ...]; D [rank, d_out] or, tiled along the outputs, [rank, tile]: trained, 0 at the start"""

    def __init__(self, site, rank, tile, dropout):
        super().__init__()
        self.d_in, self.d_out, self.columns, self.dropout = site.d_in, site.d_out, tile or site.d_out, dropout
        if site.d_out % self.columns:
            raise UserError(f"tile is {tile}; it must divide the {site.d_out} outputs of {site.name}")
        self.D = nn.Parameter(site.new(rank, self.columns))

    def shapes(self):
        return {"D": ("r", self.columns)}

    def factors(self):
        """B = D^T, A = [I I ...], cut off at d_in."""
        r = len(self.D)
        eye = torch.eye(r, dtype=self.D.dtype, device=self.D.device)
        return self.D.T.repeat(self.d_out // self.columns, 1), eye.repeat(1, -(-self.d_in // r))[:, : self.d_in]

    def randomize(self):
        nn.init.normal_(self.D)

    def thin(self, x):
        # the shards of x, side by side and padded with zeros, added up: A x without a product
        x, missing = self.drop(x), -self.d_in % len(self.D)
        shards = (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, len(self.D))).sum(-2)
        return shards.to(self.D.dtype), self.D.T.repeat(self.d_out // self.columns, 1)


class Bat(Elastic, Delta):
    """W_ij = W0_ij + W0_ij D_i + D_i, blocks [rank, rank]; D [d_out / rank, rank, rank] trained, 0 at the start"""

    def __init__(self, site, rank):
        super().__init__()
        if site.d_in % rank or site.d_out % rank:
            raise UserError(f"rank {rank} must divide both sides of {site.name} [{site.d_out}, {site.d_in}] with bat")
        self.d_in, self.d_out = site.d_in, site.d_out
        self.D = nn.Parameter(site.new(site.d_out // rank, rank, rank))

    def shapes(self):
        return {"D": ("n", "r", "r")}

    def complaints(self, saved):
        bad = super().complaints(saved)
        if bad:
            return bad
        n, r, _ = saved["D"].shape
        return [] if n * r == self.d_out and self.d_in % r == 0 else [f"D is {[n, r, r]}, no blocks of this layer"]

    def weight(self, base):
        n, r, _ = self.D.shape
        w = base.weight.to(self.D.dtype).unflatten(0, (n, r)).unflatten(-1, (-1, r)).transpose(1, 2)  # [i, j, row, column]
        w = w + w @ self.D[:, None] + self.D[:, None]
        return w.transpose(1, 2).reshape(self.d_out, self.d_in)


@register("miss")
class MiSS(Structure):
    """MiSS: W = W0 + D^T [I I ... I]; one trained D [rank, d_out], zero at the start, for every shard of rank inputs.

    Kang and Yin 2024 (Bone, DiSHA and MiSS by turns), the input-shard form that their code and PEFT have; it is a LoRA
    whose A is a fixed sum, so inputs that cancel within a residue class are not seen. A last shard that is not whole
    takes the first rows of D. There is no alpha.

    Cost: one sum of x and rank d_out products a position. `bat` forms its dense [d_out, d_in] weight, rank d_in d_out
    products, in every forward pass: its update is as dense as W0."""

    paper = "MiSS, arXiv 2409.15371"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """rank: rows of D, inputs of a shard; tile: D has so many columns, repeated along the outputs (null: d_out;
        PEFT's mini_r); bat: W_ij (I + D_i) + D_i, blocks that are not alike; dropout: of the x that is summed."""

        rank: int = 8
        tile: Optional[int] = None  # noqa: UP045
        bat: bool = False
        dropout: float = 0.0

        def check(self):
            self.check_least(1, "rank")
            if self.tile is not None and self.tile < 1:
                raise UserError(f"tile is {self.tile}; it must be at least 1 (null: every output its own)")
            self.check_shares("dropout")
            for key in ("tile", "dropout"):
                if self.bat and getattr(self, key):
                    raise UserError(f"{key} is {getattr(self, key)}, of no effect on bat: leave one out")

        def gives(self):
            return self.owner.gives - ({"additive"} if self.bat else set())

    def build(self, site, make):
        c = self.config
        if c.rank > site.d_in:
            raise UserError(f"rank {c.rank} is more than the {site.d_in} inputs of {site.name}")
        return Bat(site, c.rank) if c.bat else Shared(site, c.rank, c.tile, c.dropout)

    def complaints(self, state):
        return self.one_rank(state, (Shared, Bat), "D", 1 if self.config.bat else 0)

    def to_peft(self, out):
        c = self.config
        only_linear(self.name, self.adapter.sites)
        found = list(self.adapter.inside((Shared, Bat)))
        out.layers = {site.name: {WEIGHT: d.D} for site, d in found}
        form = "bat" if c.bat else "mini" if c.tile else True
        out.fields |= {"peft_type": "MISS", "r": found[0][1].D.shape[1 if c.bat else 0], "miss_dropout": c.dropout}
        out.fields |= {"init_weights": form} | ({"mini_r": c.tile} if c.tile else {})

    @classmethod
    def from_peft(cls, saved):
        f = saved.fields
        if f.get("peft_type") != "MISS":
            return None
        form = f.get("init_weights", True)
        options = {"rank": f["r"], "bat": form == "bat", "tile": f["mini_r"] if form == "mini" else None}
        options["dropout"] = 0.0 if options["bat"] else f.get("miss_dropout", 0.0)  # PEFT's bat drops nothing
        saved.drop("peft_type", "r", "init_weights", "mini_r", "miss_dropout")
        return options

    def fill(self, saved):
        for site, d in self.adapter.inside((Shared, Bat)):
            saved.take(site.name, WEIGHT, d.D)
