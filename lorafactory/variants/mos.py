from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Additive, Elastic, Structure
from ..adapter.ranked import fitting
from ..errors import UserError
from ..registry import StructureConfig, register


class Pool(Elastic):
    """Shards of the A and B of all layers of one kind: A [e L c, d_in / c] and B [e L c, d_out / c], trained; the first
    (e - p) L c rows are public, then come p c of each layer's own"""

    def __init__(self, site, rows: int, shards: int):
        super().__init__()
        self.bound = site.d_in**-0.5  # of a whole vector
        self.widths = site.d_in // shards, site.d_out // shards
        self.A = nn.Parameter(site.new(rows, self.widths[0]).uniform_(-self.bound, self.bound))
        self.B = nn.Parameter(site.new(rows, self.widths[1]))

    def shapes(self):
        return {"A": ("n", self.widths[0]), "B": ("n", self.widths[1])}


class MoSDelta(Elastic, Additive):
    """W = W0 + s B A; row j of A [rank, d_in] is the pool's rows A[index_A[j c]], ..., A[index_A[j c + c - 1]] one after
    the other, and so is column j of B [d_out, rank], by index_B

    index_A and index_B [rank c]: fixed at random."""

    def __init__(self, pool: Pool, index_A: torch.Tensor, index_B: torch.Tensor, shards: int, scale: float, dropout: float):
        super().__init__()
        self.__dict__["pool"] = pool
        self.shards, self.dropout = shards, dropout
        self.register_buffer("index_A", index_A.to(pool.A.device))
        self.register_buffer("index_B", index_B.to(pool.A.device))
        self.register_buffer("scale", pool.A.new_tensor(scale))

    def shapes(self):
        return {"index_A": ("k",), "index_B": ("k",), "scale": ()}

    @property
    def rank(self):
        return len(self.index_A) // self.shards

    def factors(self):
        a, b = F.embedding(self.index_A, self.pool.A), F.embedding(self.index_B, self.pool.B)  # a deterministic backward
        return self.scale * b.view(self.rank, -1).T, a.view(self.rank, -1)

    def randomize(self):
        nn.init.uniform_(self.pool.B, -self.pool.bound, self.pool.bound)


@register("mos")
class MoS(Structure):
    """MoS: W = W0 + (alpha / rank) B A; the rows of A and columns of B are put together from shards of a pool.

    Wang et al. 2024 (Mixture of Shards). The L layers of one kind (the same module of every block, of one shape) share a
    pool of what L LoRAs of rank e would train, e being lora_rank; so the count is that LoRA's, whatever `rank`. Which rows
    a layer takes is drawn once, without replacement, and saved. The paper's four steps, each of which can be left out:
    subset selection (select=false: every layer takes the whole pool in its order, and gives no rank), pair dissociation
    (dissociate=false: B takes the rows that A takes), vector sharding (shards=1), shard privatisation (private=0); without
    all four it is the paper's pure sharing, and with private = rank = e it is LoRA. As in the authors' code A's entries
    start uniform in +-1/sqrt(d_in), B's at zero, and the scale follows the assembled rank. Their pools are one a name of a
    projection; here layers that differ in shape do not share one either.

    Cost: rank (d_in + d_out) products a position and as many reads of the pool a step."""

    paper = "MoS, arXiv 2410.00938"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """rank: of a layer's update; null: four times lora_rank, or all that the pool has; lora_rank: e; private: of the
        rank, vectors that are one layer's own; shards: pieces of a vector; dropout: of what A reads."""

        rank: Optional[int] = None  # noqa: UP045
        lora_rank: int = 2
        alpha: float = 16.0
        private: int = 1
        shards: int = 4
        select: bool = True
        dissociate: bool = True
        dropout: float = 0.0

        def check(self):
            self.check_least(1, "lora_rank", "shards")
            self.check_least(0, "private")
            self.check_shares("dropout")
            self.check_not_zero("alpha")
            if self.private > self.lora_rank:
                raise UserError(f"private is {self.private}; of lora_rank={self.lora_rank} it can be no more than that")
            if self.rank is not None and self.rank < max(1, self.private):
                raise UserError(f"rank is {self.rank}; it must be at least {max(1, self.private)}, the private part included")
            if self.rank is not None and not self.select:
                raise UserError(f"rank is {self.rank} beside select=false, where a layer takes the whole pool: leave it out")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.__dict__["kinds"] = {}  # kind: the names of its layers
        self.pools = nn.ModuleDict()
        for s in adapter.sites:
            self.kinds.setdefault(s.kind, []).append(s.name)
        for s in adapter.sites:
            c, layers = config.shards, len(self.kinds[s.kind])
            if s.d_in % c or s.d_out % c:
                raise UserError(f"shards is {c}; it must divide [{s.d_out}, {s.d_in}], the shape of {s.name}")
            if s.kind not in self.pools:
                self.pools[s.kind] = Pool(s, config.lora_rank * layers * c, c)

    def build(self, site, make):
        c, names = self.config, self.kinds[site.kind]
        public = (c.lora_rank - c.private) * len(names)
        most = public + c.private
        rank = min(4 * c.lora_rank, most) if c.rank is None and c.select else fitting(c.rank or most, most, site)
        taken = (rank - c.private) * c.shards
        own = torch.arange(c.private * c.shards) + (public + c.private * names.index(site.name)) * c.shards

        def drawn(shuffled: bool) -> torch.Tensor:
            rows = torch.randperm(public * c.shards) if shuffled else torch.arange(public * c.shards)
            return torch.cat([rows[:taken], own])

        a = drawn(c.select)
        b = drawn(True) if c.dissociate else a.clone()
        return MoSDelta(self.pools[site.kind], a, b, c.shards, c.alpha / rank, c.dropout)

    def complaints(self, state):
        bad = []
        for d, name, pool in self.sharing(MoSDelta, "pool"):
            rows = len(state[f"{pool}.A"])
            for key in ("index_A", "index_B"):
                index = state[f"{name}.{key}"]
                if len(index) % d.shards or index.min() < 0 or index.max() >= rows:
                    bad.append(f"{name}.{key} does not make vectors of {d.shards} of its pool's {rows} rows")
        return bad
