from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from ..adapter import Additive, Elastic, Structure
from ..adapter.bank import Bank, BankConfig, uniform
from ..errors import UserError
from ..registry import register

BASES = ("drawn", "held", "shared")


@torch.library.custom_op("lorafactory::nola_bases", mutates_args=())
def draw(seed: int, rank: int, d_in: int, d_out: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [k + 1, rank, d_in], the first of them A_0 in +-1/sqrt(d_in), and B [k, d_out, rank]; the others in +-1/sqrt(k).
    An operator, for torch.compile cannot look into a generator."""
    g = torch.Generator().manual_seed(seed)
    start = uniform(g, 1, rank, d_in, bound=d_in**-0.5)
    a, b = (uniform(g, k, *shape, bound=k**-0.5) for shape in ((rank, d_in), (d_out, rank)))
    return torch.cat([start, a]), b


@draw.register_fake
def _(seed, rank, d_in, d_out, k):
    return torch.empty(k + 1, rank, d_in), torch.empty(k, d_out, rank)


class Bases(Bank):
    """Unless held they are drawn whenever they are read."""

    def __init__(self, d_in: int, d_out: int, k: int, held: bool, *of):
        self.d_in, self.d_out, self.k, self.held = d_in, d_out, k, held
        super().__init__(*of)

    def drawn(self, rank):
        return draw(self.seed, rank, self.d_in, self.d_out, self.k)

    def hold(self, rank):
        if self.held:
            super().hold(rank)
        else:
            self.seal(rank, *self.drawn(rank))

    def tensors(self):
        return (self.A, self.B) if self.held else tuple(t.to(self.A) for t in self.drawn(len(self.checksum)))


class NOLADelta(Elastic, Additive):
    """W = W0 + s B A, A = A_0 + sum_i a_i A_i [rank, d_in], B = sum_i c_i B_i [d_out, rank]; a and c [k] trained"""

    def __init__(self, site, bank: Bases, c):
        super().__init__()
        self.d_in, self.d_out, self.dropout, self.offset = site.d_in, site.d_out, c.dropout, c.offset
        if c.bases == "shared":
            self.__dict__["bank"] = bank
        else:
            self.bank = bank
        self.a = nn.Parameter(site.new(bank.k, fill=0.0 if c.offset else 1 / bank.k))
        self.c = nn.Parameter(site.new(bank.k))
        self.register_buffer("scale", site.new(fill=c.alpha / c.rank))

    def shapes(self):
        return {"a": (self.bank.k,), "c": (self.bank.k,), "scale": ()}

    @property
    def rank(self):
        return len(self.bank.checksum)

    def combined(self, a, c):
        """(B, A), from the bases"""
        bases_a, bases_b = self.bank.tensors()
        bases_a, bases_b = bases_a[:, :, : self.d_in], bases_b[:, : self.d_out]
        made = torch.tensordot(a, bases_a[1:], 1)
        return torch.tensordot(self.scale * c, bases_b, 1), made + bases_a[0] if self.offset else made

    def factors(self):
        if self.bank.held:
            return self.combined(self.a, self.c)
        return checkpoint(self.combined, self.a, self.c, use_reentrant=False, preserve_rng_state=False)

    def randomize(self):
        nn.init.normal_(self.c)


@register("nola")
class NOLA(Structure):
    """NOLA: W = W0 + (alpha / rank) B A, A = A_0 + sum_i a_i A_i, B = sum_i c_i B_i over k frozen random bases each.

    Koohpayegani et al. 2023. Only the coefficients a and c [k] train, 2 k a layer, whatever its size and rank. The bases are
    uniform in +-1/sqrt(k), as in the authors' code for language models, and come from a seed: nothing of them is saved but
    a checksum. A_0, frozen, is that code's start of A, and a and c start at zero; their code for images has no A_0
    (offset=false: a starts at 1/k as there; c at zero here, too, where there it is 1/k and moves the function). Each layer has
    bases of its own; with bases=shared one set, as large as the largest layer needs, serves all.

    Cost: LoRA's rank (d_in + d_out) products a position, and k times as many a step to combine the bases. bases=drawn keeps
    none of them in memory: k rank (d_in + d_out) numbers are drawn on the CPU in each pass, backward again, one layer at a
    time. bases=held keeps them, k times a LoRA in memory; shared once for all layers."""

    paper = "NOLA, arXiv 2310.02556"
    gives = frozenset({"additive", "weight"})

    @dataclass
    class Config(BankConfig):
        """num_bases: k; bases: drawn in every pass, held in memory, or shared by all layers and held; offset: A_0 in A;
        dropout: of what A reads."""

        rank: int = 8
        alpha: float = 16.0
        num_bases: int = 1024
        bases: str = "drawn"
        offset: bool = True
        dropout: float = 0.0

        def check(self):
            super().check()
            self.check_least(1, "rank", "num_bases")
            self.check_shares("dropout")
            self.check_not_zero("alpha")
            self.check_choices(bases=BASES)
            if self.save_bank and self.bases == "drawn":
                raise UserError("save_bank is true beside bases=drawn, which keeps none: bases=held or shared do")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        if config.bases == "shared":
            d_in, d_out = max(s.d_in for s in adapter.sites), max(s.d_out for s in adapter.sites)
            self.bank = self.made(d_in, d_out, config.bank_seed, adapter.sites[0])

    def made(self, d_in: int, d_out: int, seed: int, site) -> Bases:
        c = self.config
        return Bases(d_in, d_out, c.num_bases, c.bases != "drawn", c.rank, seed, c.save_bank, site.base.weight)

    def build(self, site, make):
        if self.config.bases == "shared":
            return NOLADelta(site, self.bank, self.config)
        seed = ((self.config.bank_seed << 20) + 1 + site.index) % 2**63  # a stream of its own a layer
        return NOLADelta(site, self.made(site.d_in, site.d_out, seed, site), self.config)
