import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from ..adapter import Additive, Elastic, Structure
from ..adapter.bank import Bank, BankConfig, uniform
from ..adapter.peft import common, fit
from ..errors import UserError
from ..registry import register

BASES, FORMS = ("uniform", "normal", "sparse"), ("sum", "product")
SHARED = ("randlora_A", "randlora_B")  # PEFT's names of the bank


class Bases(Bank):
    """A [rank, small] and B [large, N rank] of zero mean and unit variance, N terms enough for the full rank of the largest
    layer; A [N rank, small] where each term has its own"""

    def __init__(self, sites, c):
        self.basis, self.sparsity, self.one = c.basis, c.sparsity or 6.0, c.share_a
        shape = max(s.d_out for s in sites), max(s.d_in for s in sites)
        self.small, self.large = min(shape), max(shape)
        super().__init__(c.rank, c.bank_seed, c.save_bank, sites[0].base.weight)

    def entries(self, generator, *shape):
        if self.basis == "uniform":
            return uniform(generator, *shape, bound=math.sqrt(3))
        if self.basis == "normal":
            return torch.randn(*shape, generator=generator)
        u, s = torch.rand(*shape, generator=generator), self.sparsity
        return ((u > 1 - 1 / s).float() - (u < 1 / s).float()) * math.sqrt(s / 2)

    def draw(self, rank, generator):
        all_terms = -(-self.small // rank) * rank
        a = self.entries(generator, rank if self.one else all_terms, self.small)
        return a, self.entries(generator, self.large, all_terms)


class RandLoRADelta(Elastic, Additive):
    """W = W0 + s K where d_out >= d_in, else W0 + s K^T; K [large, small] = sum_j B_j diag(Lambda_:j) A_j diag(Gamma_j:)

    Lambda [rank, n] and Gamma [n, small] trained, A and B the bank's: B_j is every n-th of B's first n rank columns."""

    def __init__(self, bank: Bases, site, c):
        super().__init__()
        self.__dict__["bank"] = bank
        self.tall, (self.small, self.large) = site.d_out >= site.d_in, sorted((site.d_out, site.d_in))
        self.dropout, self.form = c.dropout, c.form
        n = math.ceil(c.coverage * self.small / c.rank)
        self.Lambda = nn.Parameter(site.new(c.rank, n))
        self.Gamma = nn.Parameter(site.new(n, self.small, fill=1 / max(n, self.small)))
        self.register_buffer("scale", site.new(fill=c.scale / math.sqrt(n) if c.by_terms else c.scale))

    def shapes(self):
        return {"Lambda": ("r", "n"), "Gamma": ("n", self.small), "scale": ()}

    @property
    def rank(self):
        return len(self.Lambda)

    def bases(self):
        """(B [large, rank n], A [rank, n or 1, small]); B's column k n + j is the k-th of B_j"""
        r, n = self.Lambda.shape
        a = self.bank.A[: r if self.bank.one else r * n, : self.small]
        return self.bank.B[: self.large, : r * n], a.unflatten(0, (r, -1))

    @staticmethod
    def scaled(a, left, right):
        return (left[:, :, None] * a * right).flatten(0, 1)

    def factors(self):
        b, a = self.bases()
        left, right = self.Lambda * self.scale, self.Gamma
        if self.form == "product":
            b, a = (b.unflatten(1, left.shape) * left).sum(2), (a * right).sum(1)
        elif torch.is_grad_enabled():  # backward keeps A, Lambda and Gamma, and forms their product again
            a = checkpoint(self.scaled, a, left, right, use_reentrant=False, preserve_rng_state=False)
        else:
            a = self.scaled(a, left, right)
        return (b, a) if self.tall else (a.T, b.T)

    def randomize(self):
        nn.init.normal_(self.Lambda)


@register("randlora")
class RandLoRA(Structure):
    """RandLoRA: W = W0 + s sum_j B_j diag(Lambda_:j) A diag(Gamma_j:), n = ceil(min(d_out, d_in) / rank) terms: full rank.

    Albert et al. 2025. B_j [large, rank] and A [rank, small] are frozen, random and shared by all layers, which take slices;
    the diagonals, on a layer's smaller side, train: n (rank + small) numbers, more for a smaller rank. Lambda is zero at
    first. s = scale / sqrt(n), as in the authors' code for text, or scale alone (by_terms=false): PEFT's, with 20 for scale.
    Which columns of the bank make B_j is PEFT's and the authors' rule: a relabelling of random columns. The bases have unit
    variance as drawn; both codes divide by the deviation of the sample. Full rank is certain for dense bases; a sparse A of
    small rank has columns of zeros, which no term reaches. The paper's controls: form=product is
    (sum_j B_j diag(Lambda_:j)) (sum_j A_j diag(Gamma_j:)), as many numbers at no more than `rank`; coverage=0.5 half the terms.

    Cost: n rank is about `small`, so n rank (d_in + d_out) products a position, up to twice the base's own, and
    n rank small a step; the bank, as large as the largest weight, once in memory. A form of product costs as LoRA."""

    paper = "RandLoRA, arXiv 2502.00987"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(BankConfig):
        """rank: of one term; coverage: n rank covers this share of a layer's full rank; basis: uniform, normal or sparse
        (-1, 0 and 1, each sign one in `sparsity`; 6 by default, sqrt(d) and more in the paper, 2: no zeros); share_a: one
        A for all terms; dropout: of what the update reads."""

        rank: int = 32
        scale: float = 2.0
        by_terms: bool = True
        coverage: float = 1.0
        form: str = "sum"
        basis: str = "uniform"
        sparsity: Optional[float] = None  # noqa: UP045
        share_a: bool = True
        dropout: float = 0.0

        def check(self):
            super().check()
            self.check_least(1, "rank")
            self.check_shares("dropout")
            self.check_not_zero("scale")
            if not 0 < self.coverage <= 1:
                raise UserError(f"coverage is {self.coverage}; it must lie in (0, 1]")
            self.check_choices(form=FORMS, basis=BASES)
            if self.sparsity is not None and self.basis != "sparse":
                raise UserError(f"sparsity is {self.sparsity}, of no effect on basis={self.basis}: leave it out")
            if self.sparsity is not None and self.sparsity < 2:
                raise UserError(f"sparsity is {self.sparsity}; it must be at least 2, where no entry is zero")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.bank = Bases(adapter.sites, config)

    def build(self, site, make):
        return RandLoRADelta(self.bank, site, self.config)

    def to_peft(self, out):
        c, bank, found = self.config, self.bank, dict(self.adapter.inside(RandLoRADelta))
        if c.form != "sum" or not c.share_a or any(d.Lambda.numel() < d.small for d in found.values()):
            raise UserError(f"PEFT has {self.name} as a sum over one A, with terms enough for full rank")
        scale, _ = common({s.name: float(d.scale) for s, d in found.items()})
        rank = len(bank.A)
        out.fields |= {"peft_type": "RANDLORA", "r": rank, "randlora_alpha": scale * rank, "randlora_dropout": c.dropout,
                       "projection_prng_key": bank.seed, "save_projection": True, "sparse": c.basis == "sparse"}  # fmt: skip
        for site, d in found.items():
            own = d.Lambda * (d.scale / scale)  # PEFT has one scale for all layers
            out.layers[site.name] = {"randlora_lambda": own, "randlora_gamma": d.Gamma}
        held = bank.A[:, None], bank.B.unflatten(1, (-1, rank))
        out.shared = {f"base_model.{n}": t for n, t in zip(SHARED, held, strict=True)}

    @classmethod
    def from_peft(cls, saved):
        f = saved.fields
        if f.get("peft_type") != "RANDLORA":
            return None
        if not f.get("save_projection", True):
            raise UserError("its bases are not in it, and PEFT draws others here: save it with save_projection=True")
        rank, sparsity = f["r"], None
        if f.get("very_sparse"):
            sparsity = 2 * math.sqrt(saved.shared[f"base_model.{SHARED[0]}"].shape[-1])
        options = {"rank": rank, "scale": f.get("randlora_alpha", 640) / rank, "by_terms": False, "save_bank": True}
        options |= {"dropout": f.get("randlora_dropout", 0.0), "bank_seed": f.get("projection_prng_key", 0)}
        saved.drop("peft_type", "r", "randlora_alpha", "randlora_dropout", "projection_prng_key", "save_projection",
                   "init_weights", "sparse", "very_sparse")  # fmt: skip
        return {**options, "basis": "sparse" if f.get("sparse") or sparsity else "uniform", "sparsity": sparsity}

    def fill(self, saved):
        bank = self.bank
        for site, d in self.adapter.inside(RandLoRADelta):
            saved.take(site.name, "randlora_lambda", d.Lambda)
            saved.take(site.name, "randlora_gamma", d.Gamma)
        for name, mine in zip(SHARED, (bank.A[:, None], bank.B.unflatten(1, (-1, len(bank.A)))), strict=True):
            copies = [saved.shared.pop(f"base_model.{name}", None)]  # PEFT lists the one tensor under every layer, too
            copies = [t for t in copies + [layer.pop(name, None) for layer in saved.layers.values()] if t is not None]
            if not copies:
                raise UserError(f"it lacks base_model.{name}")
            if any(not torch.equal(t, copies[0]) for t in copies):
                raise UserError(f"its layers hold several {name}")
            fit(f"base_model.{name}", copies[0], mine)
        bank.seal(len(bank.A), bank.A, bank.B)

    def complaints(self, state):
        found = [(n, list(state[f"{n}.Lambda"].shape), len(state[f"{k}.checksum"]))
                 for _, n, k in self.sharing(RandLoRADelta, "bank")]  # fmt: skip
        terms = [(n, s, rank, -(-self.bank.small // rank)) for n, s, rank in found]
        return [f"{n}.Lambda is {s}, the bank {rank} by {most}" for n, s, rank, most in terms if s[0] != rank or s[1] > most]
