import math
from dataclasses import dataclass

import torch.nn as nn

from ..adapter import Additive, Elastic, Structure, flat, linear
from ..adapter.bank import Bank, BankConfig, uniform
from ..adapter.peft import fit
from ..errors import UserError
from ..kernels import compose
from ..registry import register

SHARED = ("base_model.vera_A", "base_model.vera_B")  # PEFT's names of the bank


class Pair(Bank):
    """A [rank, d_in] and B [d_out, rank], Kaiming-uniform"""

    def __init__(self, d_in, d_out, *of):
        self.d_in, self.d_out = d_in, d_out
        super().__init__(*of)

    def draw(self, rank, generator):
        a = uniform(generator, rank, self.d_in, bound=math.sqrt(6 / self.d_in))
        return a, uniform(generator, self.d_out, rank, bound=math.sqrt(6 / rank))


class VeRADelta(Elastic, Additive):
    """W = W0 + diag(b) B diag(d) A; b [d_out] and d [rank] trained, A and B the bank's"""

    def __init__(self, bank: Bank, site, d_initial: float, dropout: float):
        super().__init__()
        self.__dict__["bank"] = bank
        self.d_in, self.d_out, self.dropout = site.d_in, site.d_out, dropout
        self.d = nn.Parameter(bank.A.new_full(bank.A.shape[:1], d_initial))
        self.b = nn.Parameter(bank.A.new_zeros(site.d_out))

    def shapes(self):
        return {"d": ("r",), "b": (self.d_out,)}

    def slices(self):
        return self.bank.B[: self.d_out], self.bank.A[:, : self.d_in]

    def factors(self):
        b, a = self.slices()
        return b * self.b[:, None], a * self.d[:, None]

    def randomize(self):
        nn.init.normal_(self.b)

    def update(self, x, base, y):
        b, a = self.slices()
        return self.b * linear(self.d * linear(self.drop(x), a), b)

    def forward(self, x, base):
        (b, a), rows = self.slices(), flat(x)
        h = self.d * linear(self.drop(rows), a)
        return compose(base(rows), h, b, gain=self.b, whole=False, fresh=True).view(*x.shape[:-1], len(b))


@register("vera")
class VeRA(Structure):
    """VeRA: W = W0 + diag(b) B diag(d) A; A [rank, d_in], B [d_out, rank] frozen, random and shared by all layers.

    Kopiczko et al. 2023. Only b [d_out], zero at first, and d [rank] train. Layers of different shapes take
    slices of one bank as large as the largest; it is PEFT's for the same seed, up to rounding. There is no alpha.

    Cost: rank (d_in + d_out) products a position forward, the same backward for x alone (the bank has no gradient),
    and the bank once in memory."""

    paper = "VeRA, arXiv 2310.11454"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(BankConfig):
        """rank: may exceed a layer's; d_initial: every entry of d at first; dropout: of what A reads."""

        rank: int = 256
        d_initial: float = 0.1
        dropout: float = 0.0

        def check(self):
            super().check()
            self.check_least(1, "rank")
            if self.d_initial == 0:
                raise UserError("d_initial is 0, as b is: nothing would ever train")
            self.check_shares("dropout")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        d_in, d_out = max(s.d_in for s in adapter.sites), max(s.d_out for s in adapter.sites)
        like = adapter.sites[0].base.weight
        self.bank = Pair(d_in, d_out, config.rank, config.bank_seed, config.save_bank, like)

    def build(self, site, make):
        return VeRADelta(self.bank, site, self.config.d_initial, self.config.dropout)

    def to_peft(self, out):
        c, bank = self.config, self.bank
        out.fields |= {"peft_type": "VERA", "r": len(bank.A), "projection_prng_key": bank.seed, "save_projection": True,
                       "d_initial": c.d_initial, "vera_dropout": c.dropout}  # fmt: skip
        for site, d in self.adapter.inside(VeRADelta):
            out.layers[site.name] = {"vera_lambda_b": d.b, "vera_lambda_d": d.d}
        out.shared = {SHARED[0]: bank.A, SHARED[1]: bank.B}

    @classmethod
    def from_peft(cls, saved):
        if saved.fields.get("peft_type") != "VERA":
            return None
        names = {"rank": "r", "d_initial": "d_initial", "dropout": "vera_dropout"}
        names |= {"bank_seed": "projection_prng_key", "save_bank": "save_projection"}
        options = {ours: saved.fields[theirs] for ours, theirs in names.items() if theirs in saved.fields}
        saved.drop("peft_type", "init_weights", *names.values())
        return options

    def fill(self, saved):
        for site, d in self.adapter.inside(VeRADelta):
            saved.take(site.name, "vera_lambda_b", d.b)
            saved.take(site.name, "vera_lambda_d", d.d)
        if self.config.save_bank:
            for name, mine in zip(SHARED, (self.bank.A, self.bank.B), strict=True):
                if name not in saved.shared:
                    raise UserError(f"it lacks {name}")
                fit(name, saved.shared.pop(name), mine)
            self.bank.seal(len(self.bank.A), self.bank.A, self.bank.B)

    def complaints(self, state):
        found = self.sharing(VeRADelta, "bank")
        ranks = [(n, len(state[f"{n}.d"]), len(state[f"{k}.checksum"])) for _, n, k in found]
        return [f"{n}.d has {r} ranks, the bank {rank}" for n, r, rank in ranks if r != rank]
