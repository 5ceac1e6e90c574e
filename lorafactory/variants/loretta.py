import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn

from .. import linalg
from ..adapter import Additive, Delta, Elastic, linear
from ..adapter.ranked import Ranked, RankedConfig
from ..registry import register

STARTS = ("normal", "zero")
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": nn.functional.gelu}


class Trains(Elastic):
    """A [rank, d_in] and B [d_out, rank] as tensor trains: cores [rho, k_i, rho], trained, of which the first and the last
    have a rho of one, contract to the rank d_in entries of A^T, row by row; so do others to B^T. scale []"""

    def __init__(self, site, d_in: int, rank: int, scale: float, c):
        super().__init__()
        self.d_in, self.d_out, self.order, self.dropout = d_in, site.d_out, c.order, c.dropout
        for name, size in (("A", d_in), ("B", site.d_out)):
            first, *others = linalg.split(size * rank, c.order)
            ranks = [1, *[c.tt_rank] * (c.order - 1), 1]
            for i, k in enumerate([*others, first]):
                self.register_parameter(f"{name}{i}", nn.Parameter(site.new(ranks[i], k, ranks[i + 1])))
            self.draw(name, 1 / math.sqrt(size + rank))
        self.register_buffer("scale", site.new(fill=scale))
        if c.start == "zero":
            nn.init.zeros_(self.cores("B")[-1])

    def cores(self, name):
        return [getattr(self, f"{name}{i}") for i in range(self.order)]

    def draw(self, name, std):
        """So that the entries of the whole train have this deviation."""
        for core in self.cores(name):
            nn.init.normal_(core, std=std ** (1 / self.order) / math.sqrt(core.shape[2]))

    def shapes(self):
        found = {"scale": ()}
        for name in "AB":
            ranks = [1, *[f"{name}-{i}" for i in range(1, self.order)], 1]
            found |= {f"{name}{i}": (ranks[i], f"{name}{i}", ranks[i + 1]) for i in range(self.order)}
        return found

    def complaints(self, saved):
        bad = super().complaints(saved)
        if not bad:
            a, b = (math.prod(saved[f"{name}{i}"].shape[1] for i in range(self.order)) for name in "AB")
            if a % self.d_in or a * self.d_out != b * self.d_in:
                bad = [
                    f"A0 and B0 with their trains have {a} and {b} entries, of no rank in [{self.d_out}, {self.d_in}]"
                ]
        return bad

    @property
    def rank(self):
        return math.prod(core.shape[1] for core in self.cores("A")) // self.d_in

    def whole(self, name):
        """A^T [d_in, rank] or B^T [rank, d_out]."""
        first, *others = self.cores(name)
        entries = first[0]
        for core in others:
            entries = (entries @ core.flatten(1)).view(-1, core.shape[2])
        return entries.view(self.d_in, -1) if name == "A" else entries.view(-1, self.d_out)


class LoRETTADelta(Trains, Additive):
    """W = W0 + s B A"""

    def factors(self):
        return self.scale * self.whole("B").T, self.whole("A").T

    def randomize(self):
        self.draw("B", 1 / math.sqrt(self.d_out + self.rank))


class AdapterDelta(Trains, Delta):
    """y + s (B act(A y + a) + b), y = W0 x + bias, A [rank, d_out]; a [rank] and b [d_out] trained"""

    mergeable = False

    def __init__(self, site, rank: int, scale: float, c):
        super().__init__(site, site.d_out, rank, scale, c)
        self.act = ACTIVATIONS[c.adapter]
        self.a = nn.Parameter(site.new(rank).uniform_(-(rank**-0.5), rank**-0.5))
        bound = 0.0 if c.start == "zero" else site.d_out**-0.5
        self.b = nn.Parameter(site.new(site.d_out).uniform_(-bound, bound))

    def shapes(self):
        return {**super().shapes(), "a": ("rank",), "b": (self.d_out,)}

    def complaints(self, saved):
        bad = super().complaints(saved)
        rank = len(saved["a"]) if "a" in saved else 0
        if not bad and math.prod(saved[f"A{i}"].shape[1] for i in range(self.order)) != rank * self.d_in:
            bad = [f"a is of rank {rank}, the trains are not"]
        return bad

    def update(self, x, base, y):
        code = self.act(linear(self.drop(y), self.whole("A").T) + self.a)
        return self.scale * (linear(code, self.whole("B").T) + self.b)


@register("loretta")
class LoRETTA(Ranked):
    """LoRETTA: W = W0 + (alpha / rank) B A; A and B tensor trains, far fewer numbers than the two matrices.

    Yang et al. 2024, LoRETTA_rep. LoRETTA_adp, with `adapter`: y = W0 x + bias becomes y + s (B act(A y + a) + b), their
    adapter after a layer, whose bottleneck is the rank; that before a layer or beside it, and a learned s, are left out.
    They have s = 1, a bottleneck of 64 in five cores (alpha = rank = 64, order = 5), after the dense layers of attention and
    feed-forward. No weight equals it, so it does not merge. LayerNorms and a classifier in tensor form do not train here, as
    they do in the authors' recipe. A train is read input first, as in their code. They list the lengths k_i for some sizes;
    here they are about equal, the same for rank 8 of 768, and any size will do. Their start, Gaussian cores, changes the
    output; start=zero, with B's last core and b at zero, does not (inferred).

    Cost: a LoRA's; and once a step the two trains are contracted, in about tt_rank rank (d_in + d_out) products."""

    paper = "LoRETTA, arXiv 2402.11417"
    gives = frozenset({"additive", "weight"})
    zero_start = False

    @dataclass
    class Config(RankedConfig):
        """tt_rank: rho, within the trains; order: cores of a train; start: normal or zero; adapter: LoRETTA_adp with this
        activation, relu, tanh or gelu (null: LoRETTA_rep)."""

        tt_rank: int = 5
        order: int = 4
        start: str = "normal"
        adapter: Optional[str] = None  # noqa: UP045  OmegaConf

        def check(self):
            super().check()
            self.check_least(1, "tt_rank")
            self.check_least(2, "order")
            self.check_choices(start=STARTS, adapter=(None, *ACTIVATIONS))

        def gives(self):
            return super().gives() if self.adapter is None else frozenset()

    def most(self, site):
        return super().most(site) if self.config.adapter is None else site.d_out

    def build(self, site, make):
        rank, scale = self.fitting(site), self.scale(site)
        if self.config.adapter is not None:
            return AdapterDelta(site, rank, scale, self.config)
        return LoRETTADelta(site, site.d_in, rank, scale, self.config)
