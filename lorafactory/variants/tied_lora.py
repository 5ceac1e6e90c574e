from dataclasses import dataclass, field
from typing import List  # noqa: UP035  as in registry

import torch.nn as nn

from ..adapter import Additive, Elastic, Structure
from ..adapter.ranked import fitting
from ..errors import UserError
from ..registry import StructureConfig, register

TIED, OWN = ("A", "B"), ("u", "v")


class TiedPair(Elastic):
    """A [rank, d_in] and B [d_out, rank], one pair for all layers of one kind, each trained or frozen"""

    def __init__(self, site, rank: int, trained):
        super().__init__()
        self.d_in, self.d_out = site.d_in, site.d_out
        self.A = nn.Parameter(site.new(rank, site.d_in), "A" in trained)
        self.B = nn.Parameter(site.new(site.d_out, rank), "B" in trained)
        for name in TIED:
            self.draw(name)

    def draw(self, name: str):
        nn.init.uniform_(getattr(self, name), -(self.d_in**-0.5), self.d_in**-0.5)

    def shapes(self):
        return {"A": ("r", self.d_in), "B": (self.d_out, "r")}


class TiedLoRADelta(Elastic, Additive):
    """W = W0 + s diag(v) B diag(u) A; u [rank] and v [d_out] the layer's own, A and B its kind's. What does not train of u
    and v is one, and not there."""

    def __init__(self, pair: TiedPair, site, c):
        super().__init__()
        self.__dict__["pair"] = pair
        self.d_out, self.dropout = site.d_out, c.dropout
        for name, length in (("u", c.rank), ("v", site.d_out)):
            self.register_parameter(name, nn.Parameter(site.new(length, fill=1.0)) if name in c.trained else None)
        self.register_buffer("scale", site.new(fill=c.alpha / c.rank))

    def shapes(self):
        return {"u": ("r",), "v": (self.d_out,), "scale": ()}

    @property
    def rank(self):
        return len(self.pair.A)

    def factors(self):
        b = self.pair.B * self.scale
        b = b if self.u is None else b * self.u
        return b if self.v is None else b * self.v[:, None], self.pair.A

    def tensor(self, name: str):
        return getattr(self.pair if name in TIED else self, name)

    def randomize(self):
        for name in TIED:
            self.pair.draw(name)
        for p in self.parameters():
            nn.init.normal_(p)


@register("tied_lora")
class TiedLoRA(Structure):
    """Tied-LoRA: W = W0 + (alpha / rank) diag(v) B diag(u) A; A and B tied over all layers of one kind, u and v each layer's.

    Renduchintala et al. 2023. `trained` says which of the four train: the paper's configurations are such choices, and all
    four, we take it, the one that it recommends; A and B alone is LoRA with tied weights, u and v alone VeRA over one kind
    of layer. (Neither the paper's table of configurations nor any code of the authors was at hand: no numbers of theirs are
    used here.) What is frozen stays where it starts: u and
    v at one, A and B uniform in +-1/sqrt(d_in), saved like what trains. The update starts at zero by the first of B, v, u
    and A that trains; that this is v where B is frozen is inferred from VeRA. A kind is the same module of every block, of
    one shape; the paper ties a fused query, key and value matrix.

    Cost: rank (d_in + d_out) products a position."""

    paper = "Tied-LoRA, arXiv 2311.09578"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """trained: of A, B, u and v; factor_lr: multiplies the rate of A and B, whose gradients are sums over the layers;
        dropout: of what A reads."""

        rank: int = 8
        alpha: float = 16.0
        trained: List[str] = field(default_factory=lambda: [*TIED, *OWN])  # noqa: UP006
        factor_lr: float = 1.0
        dropout: float = 0.0

        def check(self):
            self.check_least(1, "rank")
            self.check_shares("dropout")
            self.check_not_zero("alpha")
            if not self.trained or len(set(self.trained)) < len(self.trained) or set(self.trained) - {*TIED, *OWN}:
                raise UserError(f"trained is {self.trained}; it takes one or more of {', '.join((*TIED, *OWN))}, each once")
            self.check_positive("factor_lr")
            if self.factor_lr != 1 and not set(self.trained) & set(TIED):
                raise UserError(f"factor_lr is {self.factor_lr}, of no effect where neither A nor B trains: leave it out")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.pairs = nn.ModuleDict()
        for s in adapter.sites:
            fitting(config.rank, min(s.d_in, s.d_out), s)
            if s.kind not in self.pairs:
                self.pairs[s.kind] = TiedPair(s, config.rank, config.trained)

    def build(self, site, make):
        delta = TiedLoRADelta(self.pairs[site.kind], site, self.config)
        first = next(name for name in ("B", "v", "u", "A") if name in self.config.trained)
        nn.init.zeros_(delta.tensor(first))
        return delta

    def options(self):
        return {p: {"lr_scale": self.config.factor_lr} for pair in self.pairs.values() for p in (pair.A, pair.B)}

    def complaints(self, state):
        found = self.sharing(TiedLoRADelta, "pair")
        ranks = [(d, len(state[f"{d}.u"]), len(state[f"{k}.A"])) for _, d, k in found if f"{d}.u" in state]
        return [f"{d}.u has {r} ranks, its pair {rank}" for d, r, rank in ranks if r != rank]
