import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import linalg
from ..adapter import Additive, Elastic, Structure
from ..adapter.peft import fit
from ..errors import UserError
from ..registry import StructureConfig, register

SHARED = "base_model.vblora_vector_bank"  # PEFT's name of the bank
LONGEST = 256  # what vector_length is at most unless it is given


class VectorBank(Elastic):
    """vectors [h, b], trained, shared by all layers"""

    def __init__(self, site, h: int, b: int, bound: float):
        super().__init__()
        self.vectors = nn.Parameter(site.new(h, b).uniform_(-bound, bound))

    def shapes(self):
        return {"vectors": ("h", "b")}


class VBLoRADelta(Elastic, Additive):
    """W = W0 + B A; each sub-vector of A's rows and of B's columns is a mixture of its top k vectors of the bank

    logits_A [rank, d_in / b, h] and logits_B [d_out / b, rank, h] trained; or, compact, index [..., k] of the vectors and
    weight [..., k - 1], the last one being what is missing to 1."""

    grown = (("logits_A", "logits_B"), ("index_A", "weight_A", "index_B", "weight_B"))

    def __init__(self, bank: VectorBank, site, c):
        super().__init__()
        self.__dict__["bank"] = bank
        self.d_in, self.d_out, self.k, self.dropout = site.d_in, site.d_out, c.top_k, c.dropout
        h, b = bank.vectors.shape
        self.logits_A = nn.Parameter(site.new(c.rank, site.d_in // b, h).normal_(0, c.logits_std))
        self.logits_B = nn.Parameter(site.new(site.d_out // b, c.rank, h).normal_(0, c.logits_std))
        for name in self.grown[1]:
            self.register_buffer(name, None)

    def shapes(self):
        a, b = ("r", "p"), ("q", "r")
        return {"logits_A": (*a, "h"), "logits_B": (*b, "h"), "index_A": (*a, "k"), "weight_A": (*a, "l"),
                "index_B": (*b, "k"), "weight_B": (*b, "l")}  # fmt: skip

    def complaints(self, saved):
        one = ("logits_A" in saved) != ("index_A" in saved)
        return super().complaints(saved) or ([] if one else ["logits_A is missing, or index_A is one too many"])

    def mixture(self, name):
        """(index [..., k], weight [..., k]), the weights of one sub-vector adding up to 1"""
        logits = getattr(self, f"logits_{name}")
        if logits is None:
            index, w = getattr(self, f"index_{name}"), getattr(self, f"weight_{name}")
            return index.long(), torch.cat([w, 1 - w.sum(-1, keepdim=True)], -1)
        top, index = logits.topk(self.k, dim=-1)
        return index, top.softmax(-1)

    def parts(self, name):
        index, weight = self.mixture(name)
        return (F.embedding(index, self.bank.vectors) * weight[..., None]).sum(-2)

    @torch.no_grad()
    def compact(self):
        """Keep what the function needs of the logits."""
        h = len(self.bank.vectors)
        kind = next(t for t in (torch.uint8, torch.int16, torch.int32) if h <= torch.iinfo(t).max + 1)
        for name in ("A", "B"):
            index, weight = self.mixture(name)
            setattr(self, f"index_{name}", index.to(kind))
            setattr(self, f"weight_{name}", weight[..., :-1].contiguous())
            setattr(self, f"logits_{name}", None)

    def factors(self):
        return self.parts("B").transpose(1, 2).flatten(0, 1), self.parts("A").flatten(1)

    def randomize(self):
        """It starts at random anyway."""


@register("vb_lora")
class VBLoRA(Structure):
    """VB-LoRA: W = W0 + B A, both cut into sub-vectors of length b: each is sum_i softmax(top k of its logits)_i vectors_i.

    Li et al. 2024. One bank vectors [h, b], uniform in +-bound at first, serves every layer; logits, N(0, logits_std^2), are
    a sub-vector's own, and only its k largest have a gradient. Nothing scales B A, which is small at the start but not
    zero. b must divide the sizes of all layers. After training, k indices and k - 1 weights a sub-vector are all that the
    function needs of the logits: with compact=true, that is what is left of them, and training cannot go on. PEFT's form.

    Cost: k rank (d_in + d_out) a step for A and B, then LoRA's rank (d_in + d_out) products a position; while it trains,
    logits h / b times as many as a LoRA's numbers, with the optimiser's state for them."""

    paper = "VB-LoRA, arXiv 2405.15179"
    gives = frozenset({"additive", "weight"})
    zero_start = False

    @dataclass
    class Config(StructureConfig):
        """num_vectors: h; vector_length: b, null: the largest that divides all layers, up to 256; top_k: k (at 1
        the logits stay as drawn: one weight is 1 whatever its logit); logits_lr: multiplies the rate of the logits (in the
        authors' scripts ten times the bank's); compact: keep at the end the top k alone; dropout: of what A reads."""

        rank: int = 4
        num_vectors: int = 256
        vector_length: Optional[int] = None  # noqa: UP045
        top_k: int = 2
        bound: float = 0.02
        logits_std: float = 0.1
        logits_lr: float = 10.0
        compact: bool = False
        dropout: float = 0.0

        def check(self):
            self.check_least(1, "rank", "num_vectors", "top_k", "vector_length")
            self.check_least(0, "logits_std", "logits_lr")
            self.check_shares("dropout")
            self.check_positive("bound")
            if self.top_k > self.num_vectors:
                raise UserError(f"top_k is {self.top_k}; the bank has {self.num_vectors} vectors")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        b = config.vector_length
        if b is None:
            every = math.gcd(*(d for s in adapter.sites for d in (s.d_in, s.d_out)))
            b = max(d for d in linalg.divisors(every) if d <= LONGEST)
        for s in adapter.sites:
            if s.d_in % b or s.d_out % b:
                raise UserError(f"vector_length is {b}; it must divide [{s.d_out}, {s.d_in}], the shape of {s.name}")
        self.bank = VectorBank(adapter.sites[0], config.num_vectors, b, config.bound)

    def build(self, site, make):
        return VBLoRADelta(self.bank, site, self.config)

    def found(self):
        return list(self.adapter.inside(VBLoRADelta))

    def options(self):
        if any(d.logits_A is None for _, d in self.found()):
            raise UserError("its logits were not kept (compact=true): it cannot train on")
        return {p: {"lr_scale": self.config.logits_lr} for _, d in self.found() for p in (d.logits_A, d.logits_B)}

    def end(self, stage):
        if not self.config.compact:
            return False
        for _, d in self.found():
            d.compact()
        return True

    def complaints(self, state):
        bad = []
        for d, name, bank in self.sharing(VBLoRADelta, "bank"):
            h, b = state[f"{bank}.vectors"].shape
            got = {n: tuple(state[f"{name}.{n}"].shape) for n in d.shapes() if f"{name}.{n}" in state}
            p, q = (next(got[f"{kind}_{f}"] for kind in ("logits", "index") if f"{kind}_{f}" in got) for f in "AB")
            if p[1] * b != d.d_in or q[0] * b != d.d_out or ("logits_A" in got and p[2] != h):
                bad.append(f"{name}'s tensors are not for a bank of {h} vectors of length {b}")
        return bad

    def to_peft(self, out):
        c, found = self.config, self.found()
        whole = found[0][1].logits_A is not None
        out.fields |= {"peft_type": "VBLORA", "r": len(found[0][1].parts("A")), "num_vectors": len(self.bank.vectors),
                       "vector_length": self.bank.vectors.shape[1], "topk": c.top_k, "vblora_dropout": c.dropout,
                       "save_only_topk_weights": not whole}  # fmt: skip
        for site, d in found:
            out.layers[site.name] = {there: getattr(d, here) for here, there in names(not whole).items()}
        out.shared = {SHARED: self.bank.vectors}

    @classmethod
    def from_peft(cls, saved):
        f = saved.fields
        if f.get("peft_type") != "VBLORA":
            return None
        ours = {"rank": "r", "num_vectors": "num_vectors", "vector_length": "vector_length", "top_k": "topk",
                "dropout": "vblora_dropout", "compact": "save_only_topk_weights", "bound": "init_vector_bank_bound",
                "logits_std": "init_logits_std"}  # fmt: skip
        options = {mine: f[theirs] for mine, theirs in ours.items() if theirs in f}
        saved.drop("peft_type", *ours.values())
        return options

    def fill(self, saved):
        for site, d in self.found():
            if self.config.compact:
                d.compact()
            for here, there in names(self.config.compact).items():
                saved.take(site.name, there, getattr(d, here))
        if SHARED not in saved.shared:
            raise UserError(f"it lacks {SHARED}")
        fit(SHARED, saved.shared.pop(SHARED), self.bank.vectors)


def names(compact: bool) -> dict[str, str]:
    """A delta's tensors -> PEFT's names of them."""
    if not compact:
        return {f"logits_{f}": f"vblora_logits_{f}" for f in "AB"}
    kinds = {"index": "topk_indices", "weight": "topk_weights"}
    return {f"{ours}_{f}": f"vblora_logits_{f}_{theirs}" for f in "AB" for ours, theirs in kinds.items()}
