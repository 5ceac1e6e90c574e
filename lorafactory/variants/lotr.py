from dataclasses import dataclass

import torch
import torch.nn as nn

from .. import linalg
from ..adapter import Additive, Elastic, Structure, linear
from ..adapter.ranked import fitting
from ..errors import UserError
from ..registry import StructureConfig, register

FACTORS, CORES, GROUPS = ("normal", "svd", "zero"), ("zero", "neutral", "svd"), ("shape", "module_name")


class Bank(Elastic):
    """What a group of layers shares: L [d_out, rank] and R [rank, d_in], trained; L0 and R0, where they started, if the
    update did not start at zero; scale []"""

    grown = (("L0", "R0"),)

    def __init__(self, site, rank, scale, std):
        super().__init__()
        self.d_out, self.d_in, like = site.d_out, site.d_in, site.base.weight
        made = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        self.L = nn.Parameter(torch.randn(site.d_out, rank, **made) * std)
        self.R = nn.Parameter(torch.randn(rank, site.d_in, **made) * std)
        self.register_buffer("scale", torch.tensor(scale, **made))
        self.register_buffer("L0", None)
        self.register_buffer("R0", None)

    def shapes(self):
        left, right = (self.d_out, "r"), ("r", self.d_in)
        return {"L": left, "R": right, "scale": (), "L0": left, "R0": right}


class LoTRDelta(Elastic, Additive):
    """W = W0 + s (L M R - L0 M0 R0); M [rank, rank] the layer's own, trained; the anchor may be missing"""

    def __init__(self, bank: Bank):
        super().__init__()
        self.__dict__["bank"] = bank
        rank = bank.L.shape[1]
        self.silenced = False  # a wrapper holds the update at zero
        self.M = nn.Parameter(bank.L.new_zeros(rank, rank))
        self.register_buffer("M0", None)

    def shapes(self):
        return {"M": ("r", "r"), "M0": ("r", "r")}

    def factors(self):
        k = self.bank
        b, a = k.L @ (k.scale * self.M), k.R
        if self.M0 is None:
            return b, a
        return torch.cat([b, k.L0 @ (-k.scale * self.M0)], 1), torch.cat([a, k.R0])

    def randomize(self):
        self.silenced = True
        nn.init.normal_(self.M)

    def thin(self, x):
        k = self.bank
        h, b = linear(x, k.R, k.scale * self.M), k.L
        if self.M0 is None:
            return h, b
        return torch.cat([h, linear(x, k.R0, -k.scale * self.M0)], -1), torch.cat([b, k.L0], 1)


def leading(weights: list[torch.Tensor], rank: int) -> torch.Tensor:
    """[d, rank]: the leading left singular vectors of all weights [d, ...] side by side, a factor of the Tucker-2 form
    of their stack."""
    gram = weights[0].new_zeros(len(weights[0]), len(weights[0]))
    for w in weights:
        gram.addmm_(w, w.T)
    return linalg.spectrum(gram)[1][:, -rank:].flip(-1)


@register("lotr")
class LoTR(Structure):
    """LoTR: W = W0 + (alpha / rank) L M R; L and R trained and shared by a group of layers, M each layer's own.

    Bershatsky et al. 2024: the Tucker-2 form of the stacked updates of a group. The starts are those of the authors'
    code. Where none of the three is zero the start is anchored (subtracted), so that attaching leaves the function as
    it is; their code lets it shift, and assigns the cores of its svd start transposed. With the default start only M
    has a gradient in the first step.

    Cost: rank (d_in + rank + d_out) products a position, twice with an anchor; an svd start is an eigendecomposition
    of [d_out, d_out] and one of [d_in, d_in] a group."""

    paper = "LoTR, arXiv 2402.01376"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(StructureConfig):
        """left, right: how L and R start, normal (times factor_std), svd (leading singular vectors of the group's
        weights) or zero; core: how M starts, zero, neutral (identity) or svd (L^T W0 R^T, both by svd); group_by: who
        shares, layers of one shape or only the same module of every block (module_name); factor_lr: multiplies the rate
        of L and R, whose gradients are sums over the group."""

        rank: int = 4
        alpha: float = 1.0
        left: str = "normal"
        core: str = "zero"
        right: str = "normal"
        factor_std: float = 1.0
        factor_lr: float = 1.0
        group_by: str = "shape"

        def check(self):
            self.check_least(1, "rank")
            self.check_not_zero("alpha")
            self.check_positive("factor_std", "factor_lr")
            self.check_choices(left=FACTORS, core=CORES, right=FACTORS, group_by=GROUPS)
            zeros = [k for k in ("left", "core", "right") if getattr(self, k) == "zero"]
            if len(zeros) > 1:
                raise UserError(f"{' and '.join(zeros)} are zero, so nothing would ever train: start one elsewhere")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.banks = nn.ModuleDict()
        for s in adapter.sites:
            fitting(config.rank, min(s.d_in, s.d_out), s)
            if self.key(s) not in self.banks:
                self.banks[self.key(s)] = Bank(s, config.rank, config.alpha / config.rank, config.factor_std)

    def key(self, site) -> str:
        return site.sizes if self.config.group_by == "shape" else site.kind

    def build(self, site, make):
        return LoTRDelta(self.banks[self.key(site)])

    def begin(self, stage):
        if stage.index == 0 and not self.adapter.started:
            for bank in self.banks.values():
                self.start(bank, [(s, d) for s, d in self.adapter.inside(LoTRDelta) if d.bank is bank])

    def start(self, bank, members) -> None:
        c, rank = self.config, bank.L.shape[1]
        silenced = any(d.silenced for _, d in members)
        weights = [s.base.weight.to(bank.L.dtype) for s, _ in members]
        svd = "svd" in (c.left, c.core, c.right)
        left = leading(weights, rank) if svd else bank.L
        right = leading([w.T for w in weights], rank).T if svd else bank.R
        for p, how, vectors in ((bank.L, c.left, left), (bank.R, c.right, right)):
            if how == "svd":
                p.copy_(vectors)
            elif how == "zero" and not silenced:
                p.zero_()
        for (_, d), w in zip(members, weights, strict=True):
            if c.core != "zero":
                d.M.copy_(torch.eye(rank) if c.core == "neutral" else left.T @ w @ right.T)
        if not silenced and "zero" not in (c.left, c.core, c.right):
            bank.L0, bank.R0 = bank.L.detach().clone(), bank.R.detach().clone()
            for _, d in members:
                d.M0 = d.M.detach().clone()

    def options(self):
        shared = [p for bank in self.banks.values() for p in (bank.L, bank.R)]
        return {p: {"lr_scale": self.config.factor_lr} for p in shared}

    def complaints(self, state):
        pairs = self.sharing(LoTRDelta, "bank")
        bad = [f"{d}.M has another rank than {k}.R" for _, d, k in pairs if len(state[f"{d}.M"]) != len(state[f"{k}.R"])]
        return bad + [
            f"{d}.M0 and {k}.R0 go together" for _, d, k in pairs if (f"{d}.M0" in state) != (f"{k}.R0" in state)
        ]
