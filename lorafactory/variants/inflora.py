import math
from dataclasses import dataclass

import torch

from .. import probe
from ..adapter import Continual
from ..registry import ContinualConfig, register


@register("inflora")
class InfLoRA(Continual):
    """InfLoRA: a pair a stage, only B trains; A = leading directions of the stage's inputs outside those of earlier stages.

    Liang & Li 2024, sec. 3.2. H = mean x x^T over the stage's positions; A^T = U_r / sqrt(3), U_r the leading left singular
    vectors of H - M M^T H, M the memory, empty at first. After a stage, M grows by directions of H until it holds the
    share `threshold` of H's energy (squared singular values), `growth` more for each stage; after the first stage it
    takes those before the share is reached and at least one, as their code does. Their DualGPM keeps M's complement
    once M is the larger; the subspace is the same. Where fewer directions than ranks are left, rows of A are zero.

    Theirs adapts keys and values with s = 1, trains in evaluation mode and reads all batches of a stage twice; here
    that is target_modules, alpha = rank, the task's own mode, and `batches`.
    Cost: two passes over `batches` a stage and SVDs of [d_in, d_in]; in training that of LoRA, less the gradient of A."""

    paper = "InfLoRA, arXiv 2404.00228"
    also = ("init",)
    needs = frozenset({"low_rank", "input"})
    does = frozenset({"A is frozen"})
    data = True

    @dataclass
    class Config(ContinualConfig):
        """threshold: of the first stage's energy that is kept free of later stages; growth: more for each stage after it;
        batches: how many a stage show what its inputs are."""

        threshold: float = 0.95
        growth: float = 0.005
        batches: int = 256

        def check(self):
            self.check_shares("threshold", "growth")
            self.check_least(1, "batches")

    def attach(self):
        for _, low in self.adapter.low_ranks():
            low.A.requires_grad_(False)
        super().attach()

    def moments(self, stage):
        """site name -> H [d_in, d_in]."""
        total, last = {}, (None, None)

        def use(name, x):
            nonlocal last
            if last[0] is not x:  # query, key and value read one tensor: one product
                last = x, (x.T.double() @ x.double(), len(x))
            h, n = total.get(name, (0.0, 0))
            total[name] = h + last[1][0], n + last[1][1]

        probe.each_input(stage, self.config.batches, use)
        return {name: h / n for name, (h, n) in total.items()}

    def start(self, stage):
        moments = self.moments(stage)
        for site, low, memory in self.pairs():
            h = moments[site.name].to(memory.rows)
            u, s, _ = torch.linalg.svd(h - memory.rows.T @ (memory.rows @ h))
            rows = u.T[: low.rank] * (s[: low.rank] > 1e-6 * s[0])[:, None]
            low.start((rows - memory.inside(rows)) / math.sqrt(3))

    def end(self, stage):
        if not list(stage.batches(1)):
            return False  # no data, so nothing was trained either
        moments = self.moments(stage)
        share = min(1.0, self.config.threshold + self.config.growth * max(0, int(self.stage)))
        for site, _, memory in self.pairs():
            memory.add(new_directions(moments[site.name], memory.rows, share))
        return False


def new_directions(h, rows, share):
    """What orthonormal rows [m, d] lack to hold this share of the squared singular values of H [d, d]."""
    h, m = h.double(), rows.double()
    whole = torch.linalg.svdvals(h).square().sum()
    u, s, _ = torch.linalg.svd(h - m.T @ (m @ h))
    energy = s.square()
    held = (whole - energy.sum()) / whole + (energy / whole).cumsum(0)
    # how many it takes: each is added while those before it hold less than the share
    before = torch.cat([((whole - energy.sum()) / whole)[None], held[:-1]])
    count = max(1, int((held < share).sum())) if not len(rows) else int((before < share).sum())
    return u.T[: min(count, len(h) - len(rows), int((s > 1e-12 * s[0]).sum()))]
