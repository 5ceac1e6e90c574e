import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter import Additive, Elastic, Structure
from ..adapter.peft import only_linear
from ..adapter.ranked import fitting
from ..errors import UserError
from ..registry import StructureConfig, register

SMALLEST = 1e-4  # a norm counts for at least this


class DeLoRADelta(Elastic, Additive):
    """W = W0 + ((lambda / r) B diag(1 / (|A_k| |B_k|)) A - B0 A0) diag(w), w [d_in] the norms of W0's columns

    A [rank, d_in], B [d_out, rank], bound [1], which is lambda, trained. A0, B0: where the product started, with all its
    scales in B0, if that was away from zero."""

    grown = (("A0", "B0"),)

    def __init__(self, site, c):
        super().__init__()
        rank = fitting(c.rank, min(site.d_in, site.d_out), site)
        self.d_in, self.d_out, self.dropout = site.d_in, site.d_out, c.dropout
        self.A = nn.Parameter(site.new(rank, site.d_in).uniform_(-1, 1) / math.sqrt(site.d_in))
        self.B = nn.Parameter(site.new(site.d_out, rank))
        self.bound = nn.Parameter(site.new(1, fill=c.bound))
        w = site.base.weight.detach().to(self.A.dtype).norm(dim=0)  # once: the base is read-only
        self.register_buffer("w", w, persistent=False)
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        if c.anchored:
            self.randomize()
            self.A0, self.B0 = self.A.detach().clone(), (self.B * self.scales()).detach().clone()

    def shapes(self):
        a, b = ("r", self.d_in), (self.d_out, "r")
        return {"A": a, "B": b, "bound": (1,), "A0": a, "B0": b}

    def scales(self):
        """(lambda / r) / (|A_k| |B_k|), [rank]."""
        na, nb = self.A.norm(dim=1).clamp_min(SMALLEST), self.B.norm(dim=0).clamp_min(SMALLEST)
        return self.bound / len(self.A) / (na * nb)

    def factors(self):
        b, a = self.B * self.scales(), self.A
        if self.A0 is not None:
            b, a = torch.cat([b, -self.B0], 1), torch.cat([a, self.A0])
        return b, a * self.w

    def randomize(self):
        """A wrapper holds the update at zero: no anchor, and B as A."""
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        self.A0 = self.B0 = None


@register("delora")
class DeLoRA(Structure):
    """DeLoRA: W = W0 + (lambda / r) B diag(1 / (|A_k| |B_k|)) A diag(w), w_j = |W0_:j|: angles and strength apart.

    Bini et al. 2025. Each rank-1 term has norm lambda / r, so that |dW diag(1 / w)| <= lambda, whatever A and B; lambda
    trains, one a layer. The form is PEFT's, with weights by column norms. Its start, the default, is B = 0, whose norm
    counts as 1e-4: the first step, however small, takes the update to its full length. The authors start A and B at
    random and subtract a frozen copy of that start: anchored=true (after a summary of their code; whether their frozen
    part follows lambda we have not seen, here it does not).

    Cost: rank (d_in + d_out) products a position, twice with an anchor, and two passes over the factors."""

    paper = "DeLoRA, arXiv 2503.18225"
    gives = frozenset({"additive", "weight"})
    does = frozenset({"scales the update"})

    @dataclass
    class Config(StructureConfig):
        """rank; bound: lambda at the start; bound_lr: multiplies its rate; anchored: start A and B at random and
        subtract the start; dropout: of what A reads."""

        rank: int = 8
        bound: float = 15.0
        bound_lr: float = 1.0
        anchored: bool = False
        dropout: float = 0.0

        def check(self):
            self.check_least(1, "rank")
            if self.bound == 0:
                raise UserError("bound is 0: A and B would not train")
            if self.bound_lr < 0:
                raise UserError(f"bound_lr is {self.bound_lr}; it must not be negative")
            self.check_shares("dropout")

    def build(self, site, make):
        return DeLoRADelta(site, self.config)

    def options(self):
        return {d.bound: {"lr_scale": self.config.bound_lr} for _, d in self.adapter.inside(DeLoRADelta)}

    def to_peft(self, out):
        c = self.config
        only_linear(self.name, self.adapter.sites)
        found = list(self.adapter.inside(DeLoRADelta))
        if any(d.A0 is not None for _, d in found):
            raise UserError(f"PEFT has {self.name} without an anchored start")
        out.fields |= {"peft_type": "DELORA", "r": len(found[0][1].A), "delora_lambda": c.bound, "module_dropout": c.dropout}
        for site, d in found:
            out.layers[site.name] = {"delora_A": d.A, "delora_B": d.B, "delora_lambda": d.bound, "delora_w_norm": d.w}

    @classmethod
    def from_peft(cls, saved):
        f = saved.fields
        if f.get("peft_type") != "DELORA":
            return None
        options = {"rank": f["r"], "bound": float(f.get("delora_lambda", 15)), "dropout": f.get("module_dropout", 0.0)}
        saved.drop("peft_type", "r", "delora_lambda", "module_dropout", "init_weights", "lambda_pattern")
        return options

    def fill(self, saved):
        for site, d in self.adapter.inside(DeLoRADelta):
            for name, mine in (("A", d.A), ("B", d.B), ("lambda", d.bound)):
                saved.take(site.name, f"delora_{name}", mine)
            theirs = d.w.clone()
            saved.take(site.name, "delora_w_norm", theirs)
            if not torch.allclose(theirs, d.w, rtol=1e-3):
                raise UserError(f"the column norms of {site.name} are not those that it was trained on: another base")
