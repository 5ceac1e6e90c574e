from dataclasses import dataclass
from functools import partial

import torch

from ..adapter import Part, exact
from ..registry import DynamicsConfig, register


@torch.no_grad()
def rates(low, eta: float):
    """1 / sqrt(|row of B A| + 1 / eta^2), [d_out]: without forming B A."""
    with exact():
        b, a = low.trained()
        norms = ((b @ (a @ a.T)) * b).sum(1).clamp_min(0).sqrt()
        return (norms + 1 / eta**2).rsqrt()


@register("allora")
class ALLoRA(Part):
    """ALLoRA: each row i of W's gradient reaches A and B times 1 / sqrt(|(B A)_i| + 1 / eta^2), eta while the row is zero.

    Huang and Balestriero 2024. The norm stands under the root as it is, not squared; it is taken anew in every forward pass
    and counts as a constant. What the layer's input gets is the plain gradient. The paper has neither alpha / rank nor
    dropout: give alpha = rank, a scale of 1, and keep dropout 0. The authors have published no code; eta 2 is inferred.
    Norms are those of what trains (an anchor taken off, a past left out). Under adamw the size
    of a gradient cancels out, and only how rows and steps compare counts; under sgd all of it does.

    Cost: the update's factors carry the gradient on ranks of their own, twice LoRA's while training; one Gram matrix of A."""

    paper = "ALLoRA, arXiv 2410.09692"
    axis, needs = "dynamics", frozenset({"low_rank"})

    @dataclass
    class Config(DynamicsConfig):
        """eta: what multiplies the gradient of a row that is still zero."""

        eta: float = 2.0

        def check(self):
            self.check_positive("eta")

    def attach(self):
        for _, low in self.adapter.low_ranks():
            low.row_rates = partial(rates, eta=self.config.eta)

    def counters(self):
        found = torch.cat([rates(low, self.config.eta) for _, low in self.adapter.low_ranks()])
        return {"row_rate_least": float(found.min()), "row_rate_mean": float(found.mean())}
