"""Lycoris: what the structures share that LyCORIS and PEFT build from products of small matrices: LoHa, LoKr."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta
from .elastic import Elastic
from .peft import common, only_linear
from .ranked import Ranked, RankedConfig


@dataclass
class LycorisConfig(RankedConfig):
    """rank_dropout: the share of an update's outputs that a training step silences, the others multiplied up if
    rank_dropout_scale; module_dropout: the share of steps without a layer's update."""

    alpha: float = 8.0
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    module_dropout: float = 0.0

    def check(self) -> None:
        super().check()
        self.check_shares("rank_dropout", "module_dropout")


def uniform(p: Tensor) -> None:
    """U(-1/sqrt(n), 1/sqrt(n)) for [m, n], a layer's own start in PyTorch (Kaiming-uniform with a = sqrt 5)."""
    nn.init.kaiming_uniform_(p, a=math.sqrt(5))


class LycorisDelta(Elastic, Delta):
    """W = W0 + s P: product(x) is s P x. names: a tensor here -> PEFT's name of it."""

    names: ClassVar[dict[str, str]]
    scale: Tensor

    def __init__(self, scale: Tensor, c: Any):
        super().__init__()
        self.register_buffer("scale", scale)
        self.input, self.rows, self.whole, self.rescaled = c.dropout, c.rank_dropout, c.module_dropout, c.rank_dropout_scale
        self.dropout = max(self.input, self.rows, self.whole)  # a mixture asks whether training is random

    @property
    def rank(self) -> int:
        """As the tensors have it."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, x: Tensor, base: Any, y: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return self.product(x)
        u = self.product(F.dropout(x, self.input) if self.input else x)
        if self.rows:
            kept = (torch.rand(u.shape[-1], device=u.device) > self.rows).to(u.dtype)
            u = u * (kept / kept.mean().clamp_min(1 / len(kept)) if self.rescaled else kept)
        if self.whole:
            u = u * (torch.rand((), device=u.device) > self.whole)
        return u


class Lycoris(Ranked):
    """In PEFT's words: the tensors as they are, rank and alpha a layer."""

    Config = LycorisConfig
    kind: ClassVar[str]  # PEFT's name of the method
    same: ClassVar[tuple[str, ...]] = ("rank_dropout", "module_dropout")  # options that PEFT has under these names

    def to_peft(self, out):
        found = dict(self.adapter.inside(LycorisDelta))
        only_linear(self.name, found)
        rank, ranks = common({s.name: d.rank for s, d in found.items()})
        alpha, alphas = common({s.name: float(d.scale) * d.rank for s, d in found.items()})
        out.fields |= {"peft_type": self.kind, "r": rank, "rank_pattern": ranks, "alpha": alpha, "alpha_pattern": alphas}
        out.fields |= {name: getattr(self.config, name) for name in self.same}
        for s, d in found.items():
            own = {theirs: getattr(d, ours) for ours, theirs in d.names.items()}
            out.layers[s.name] = {n: t for n, t in own.items() if t is not None}

    @classmethod
    def meant(cls, rank: int, tensors: dict[str, Tensor]) -> int:
        """The rank of a layer that PEFT saved under `rank`."""
        return rank

    @classmethod
    def from_peft(cls, saved):
        f = saved.fields
        if f.get("peft_type") != cls.kind:
            return None
        given = {n: saved.of_layer("r", "rank_pattern", n) for n in saved.layers}
        meant = {n: cls.meant(r, saved.layers[n]) for n, r in given.items()}
        scales = {n: saved.of_layer("alpha", "alpha_pattern", n) / r for n, r in given.items()}
        (rank, ranks), (alpha, alphas) = common(meant), common({n: s * meant[n] for n, s in scales.items()})
        options = {name: f[name] for name in cls.same if name in f}
        saved.drop("peft_type", "r", "rank_pattern", "alpha", "alpha_pattern", "init_weights", "use_effective_conv2d", *cls.same)
        return {"rank": rank, "rank_pattern": ranks, "alpha": alpha, "alpha_pattern": alphas, **options}

    def fill(self, saved):
        for site, d in self.adapter.inside(LycorisDelta):
            for ours, theirs in d.names.items():
                if getattr(d, ours) is not None:
                    saved.take(site.name, theirs, getattr(d, ours))
