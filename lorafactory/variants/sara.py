from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn

from ..adapter import Sparse, Structure
from ..errors import UserError
from ..registry import StructureConfig, register

ENTRIES = 100  # a matrix with as few or fewer has no penalty, as in the authors' code


class SaRADelta(Sparse):
    """W = W0 + values at index, where |W0| < threshold []; past_values at past_index: entries that have grown out of it,
    frozen"""

    grown = (("past_values", "past_index"),)

    def __init__(self, site, flat, threshold):
        super().__init__(site, flat)
        self.register_buffer("threshold", threshold.to(self.values), persistent=False)
        self.register_buffer("past_values", None)
        self.register_buffer("past_index", None)

    def shapes(self):
        return {**super().shapes(), "past_values": ("f",), "past_index": (2, "f")}

    def complaints(self, saved):
        return super().complaints(saved) or (self.outside("past_index", saved) if "past_index" in saved else [])

    def entries(self):
        if self.past_values is None:
            return super().entries()
        index = torch.cat([self.past_index, self.index], 1)
        return (index[0], index[1]), torch.cat([self.past_values, self.values])

    def trained(self, base):
        """The weights that train, [n]: W0 and what is added."""
        return base.weight[self.index[0], self.index[1]] + self.values

    @torch.no_grad()
    def freeze(self, base):
        """Freeze what is not below the threshold any more. Whether there was any."""
        out = self.trained(base).abs() >= self.threshold
        if not out.any():
            return False
        values, index = self.values.detach()[out], self.index[:, out]
        if self.past_values is not None:
            values, index = torch.cat([self.past_values, values]), torch.cat([self.past_index, index], 1)
        self.past_values, self.past_index = values, index
        self.values, self.index = nn.Parameter(self.values.detach()[~out]), self.index[:, ~out].contiguous()
        return True

    def masked(self, base):
        """W [d_out, d_in] where it trains, else 0."""
        return self.values.new_zeros(self.d_out, self.d_in).index_put((self.index[0], self.index[1]), self.trained(base))


@register("sara")
class SaRA(Structure):
    """SaRA: the weights with |W0| < theta train, the others stay: W = W0 + D, D zero off that mask M and at the start.

    Hu et al. 2024: the smallest weights are idle, and a penalty |W * M|_* (nuclear norm) on what trains keeps it of low
    rank. Their theta is one number for the model; a share of each layer is the default here, as theta depends on a model's
    scale. Partway through, weights that have left the mask are frozen where they are and the rest trains on with fresh
    moments (one of the authors' two files keeps them). As in their code the penalty is taken of one matrix a step, drawn
    from those whose sides exceed 64. Their other file gives the penalty tensors that no optimiser owns, which does nothing.
    They train vectors and convolutions, too; here linear layers. Unless told, their rate is 1e-3 exp(-350 theta), and their
    weight decay, of the weights themselves, 1e-2; here none.

    Cost: as a sparse update's: W0 is copied once forward and once backward, and backward keeps n numbers of the gradient of
    W; the penalty is one SVD of one layer a step."""

    paper = "SaRA, arXiv 2409.06633"
    gives = frozenset({"weight"})

    @dataclass
    class Config(StructureConfig):
        """fraction: the share of a layer's weights, the smallest; threshold: theta, in place of fraction; freeze_at: when
        the mask shrinks, as a share of the run (0: never); penalty: times the nuclear norm; penalty_over: of matrices with
        both sides longer than that."""

        fraction: float = 0.1
        threshold: Optional[float] = None  # noqa: UP045  OmegaConf
        freeze_at: float = 0.5
        penalty: float = 5e-4
        penalty_over: int = 64

        def check(self):
            if not 0 < self.fraction < 1:
                raise UserError(f"fraction is {self.fraction}; it must lie in (0, 1)")
            self.check_positive("threshold")
            self.check_shares("freeze_at")
            if self.penalty < 0:
                raise UserError(f"penalty is {self.penalty}; it must not be negative")
            self.check_least(0, "penalty_over")

    def build(self, site, make):
        size = site.base.weight.detach().to(site.new(0)).abs().flatten()
        if self.config.threshold is not None:
            threshold = torch.tensor(self.config.threshold)
            return SaRADelta(site, (size < threshold).nonzero()[:, 0], threshold)
        n = max(1, round(self.config.fraction * len(size)))
        smallest = size.topk(min(n + 1, len(size)), largest=False)
        return SaRADelta(site, smallest.indices[:n].sort().values, smallest.values[-1])

    def attach(self):
        if not any(len(d.values) for _, d in self.deltas()):
            raise UserError(f"threshold is {self.config.threshold}, and no weight of these layers is below it")

    def deltas(self):
        return self.adapter.inside(SaRADelta)

    def penalises(self):
        return self.config.penalty > 0

    def penalty(self):
        able = [(s, d) for s, d in self.deltas() if min(s.d_in, s.d_out) > self.config.penalty_over]
        if not self.penalises() or not able:
            return 0.0
        site, d = able[int(torch.randint(len(able), ()))]
        if len(d.values) <= ENTRIES:
            return 0.0
        return self.config.penalty * torch.linalg.svdvals(d.masked(site.base)).sum()

    def after_step(self, step):
        if self.config.freeze_at and step.index + 1 == round(self.config.freeze_at * step.total) < step.total:
            grown = [d.freeze(s.base) for s, d in self.deltas()]
            if any(grown):
                step.rebuild_optimizer()

    def counters(self):
        frozen = [0 if d.past_values is None else len(d.past_values) for _, d in self.deltas()]
        return {"trained_entries": sum(len(d.values) for _, d in self.deltas()), "frozen_entries": sum(frozen)}
