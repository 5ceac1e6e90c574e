from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Additive, Delta, Elastic, Structure, linear
from ..adapter.ranked import fitting
from ..registry import StructureConfig, register

ACTIVATIONS = ("gelu", "none")


class Coder(Elastic):
    """What the layers of a kind share: the encoder E [rank, d_in] and the decoder D [d_out, rank], trained; scale []"""

    def __init__(self, site, rank: int, scale: float):
        super().__init__()
        self.d_in, self.d_out, bound = site.d_in, site.d_out, site.d_in**-0.5
        self.E = nn.Parameter(site.new(rank, site.d_in).uniform_(-bound, bound))
        self.D = nn.Parameter(site.new(site.d_out, rank))
        self.register_buffer("scale", site.new(fill=scale))

    def shapes(self):
        return {"E": ("r", self.d_in), "D": (self.d_out, "r"), "scale": ()}


class DenseDelta(Elastic, Delta):
    """update = s gelu(D M gelu(E x)); M [rank, rank] trained, E and D the coder's"""

    mergeable = False

    def __init__(self, coder: Coder, dropout: float):
        super().__init__()
        self.__dict__["coder"] = coder
        self.dropout, rank = dropout, len(coder.E)
        self.M = nn.Parameter(coder.E.new_empty(rank, rank).uniform_(-(rank**-0.5), rank**-0.5))

    def shapes(self):
        return {"M": ("r", "r")}

    def act(self, x):
        return F.gelu(x)

    def thin(self, x):
        return None  # what D gives is dropped, too

    def update(self, x, base, y):
        k = self.coder
        code = self.drop(self.act(linear(self.drop(x), k.E)))
        return k.scale * self.drop(self.act(linear(code, self.M, k.D)))


class LinearDenseDelta(DenseDelta, Additive):
    """W = W0 + s D M E"""

    mergeable = True

    def act(self, x):
        return x

    def factors(self):
        return self.coder.D, self.coder.scale * self.M @ self.coder.E

    def randomize(self):
        bound = self.coder.d_in**-0.5
        nn.init.uniform_(self.coder.D, -bound, bound)


@register("denselora")
class DenseLoRA(Structure):
    """DenseLoRA: y = W0 x + (alpha / rank) gelu(D M gelu(E x)); M small, dense and the layer's own, E and D shared.

    Mu et al., ACL 2025. E [rank, d_in] starts as LoRA's A, D [d_out, rank] at zero, M [rank, rank] Kaiming-uniform; layers
    of one kind (the same module of every block, of one shape) share E and D. As the authors' code is published it trains
    nothing: it asks for 'denselora' where it has set 'denseLora', and names M's weight wrongly; the branch it means is
    this one, dropout of x, of the code and of the output included. With the activation no weight equals it, so it does not
    merge; with activation=none it does, and is LoTR with LoRA's start.
    No initialisation or budget of pairs: E and D are no layer's own, and an activation stands between them.

    Cost: rank (d_in + rank + d_out) products a position."""

    paper = "DenseLoRA, arXiv 2505.23808"
    gives = frozenset()

    @dataclass
    class Config(StructureConfig):
        """activation: gelu, or none (mergeable, additive); dropout: of x, of the code and of the output."""

        rank: int = 16
        alpha: float = 32.0
        activation: str = "gelu"
        dropout: float = 0.0

        def check(self):
            self.check_least(1, "rank")
            self.check_not_zero("alpha")
            self.check_choices(activation=ACTIVATIONS)
            self.check_shares("dropout")

        def gives(self):
            return super().gives() | ({"additive", "weight"} if self.activation == "none" else set())

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        for s in adapter.sites:
            fitting(config.rank, min(s.d_in, s.d_out), s)
        self.coders = nn.ModuleDict({s.kind: Coder(s, config.rank, config.alpha / config.rank) for s in adapter.sites})

    def build(self, site, make):
        delta = DenseDelta if self.config.activation == "gelu" else LinearDenseDelta
        return delta(self.coders[site.kind], self.config.dropout)

    def complaints(self, state):
        pairs = self.sharing(DenseDelta, "coder")
        return [f"{d}.M has another rank than {k}.E" for _, d, k in pairs if len(state[f"{d}.M"]) != len(state[f"{k}.E"])]
