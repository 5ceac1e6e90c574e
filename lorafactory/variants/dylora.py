from dataclasses import dataclass

import torch

from ..adapter.nested import Nested, NestedConfig
from ..errors import UserError
from ..registry import register


@register("dylora")
class DyLoRA(Nested):
    """DyLoRA: each step draws a rank b for all layers and trains the truncation alone, (alpha / b) B[:, :b] A[:b].

    Valipour et al. 2022. b is uniform over least..rank, or over `ranks`, one draw an optimiser step, the same in every
    process (MatryoshkaLoRA's baseline draws one a forward pass). Ranks above b have no gradient, yet an optimiser's
    momentum still moves them. `frozen` moves the b-th row of A and column of B alone: the others' gradients are zero, as in
    the authors' code, and what momentum and decay would do to them is undone (inferred). What is left is the whole, or
    with `keep` a truncation.

    Cost: LoRA's of the full rank, whatever b; `frozen` keeps a copy of the factors during a step."""

    paper = "DyLoRA, arXiv 2210.07558"
    now = "drawn"

    @dataclass
    class Config(NestedConfig):
        """least: the smallest rank that is drawn; frozen: train the b-th rank only."""

        least: int = 1
        frozen: bool = False

        def check(self):
            super().check()
            self.check_least(1, "least")
            if self.ranks is not None and self.least != 1:
                raise UserError(f"least is {self.least}, but ranks says what is drawn: leave one out")

    def begin(self, stage):
        if not self.adapter.started and self.config.least > self.rank():
            raise UserError(f"least is {self.config.least}, and no pair has more than {self.rank()} ranks")
        super().begin(stage)

    def attach(self):
        super().attach()
        self.register_buffer("drawn_sum", torch.zeros((), dtype=torch.long))

    def training_ranks(self):
        return [int(self.drawn)]

    def choose(self):
        most = self.rank()
        able = self.config.ranks or list(range(min(self.config.least, most), most + 1))
        return able[int(torch.randint(len(able), ()))]

    def others(self):
        """(factor, the dimension of its ranks, all of them but the b-th)."""
        for _, low in self.adapter.low_ranks():
            ranks = torch.arange(low.rank, device=low.A.device)
            index = ranks[ranks != min(int(self.drawn), low.rank) - 1]
            yield from ((low.A, 0, index), (low.B, 1, index))

    def before_step(self, step):
        if self.config.frozen and self.drawn:
            self.__dict__["kept"] = [p.detach().index_select(dim, index) for p, dim, index in self.others()]
            for p, dim, index in self.others():
                if p.grad is not None:
                    p.grad.index_fill_(dim, index, 0)

    def after_step(self, step):
        if kept := self.__dict__.pop("kept", None):
            for (p, dim, index), values in zip(self.others(), kept, strict=True):
                p.index_copy_(dim, index, values)
        self.drawn_sum += self.drawn
        super().after_step(step)

    def counters(self):
        steps = int(self.nested_steps)
        return {**super().counters(), "mean_rank_drawn": int(self.drawn_sum) / steps if steps else 0.0}
