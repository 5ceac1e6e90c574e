from dataclasses import dataclass

import torch

from ..adapter import Part
from ..bilevel import Bilevel
from ..registry import BudgetConfig, register


@register("autolora")
class AutoLoRA(Part):
    """AutoLoRA: update = s B diag(softmax(a)) A while it searches; ranks with softmax(a)_k >= 1/r stay, for a plain LoRA.

    Zhang et al. 2024. Before training, `steps` times: A and B step on the loss of one part of the training batches, the
    logits a [r] of each pair, 1 at the start, on that of the held-out part. A pair's new rank is the number of its weights
    of at least 1/r, so at least 1; then all starts afresh and trains as LoRA of these ranks on all rows, with alpha over the
    new rank as their PEFT has it. The softmax makes the scale of the search s / r.

    The hypergradient is DARTS' finite difference of one step of gradient descent, as in their search script, or, with
    second_order=false, the plain gradient, as in the script beside their fine-tuning. Their library takes the difference
    without the learning rate that weighs it. What else the adapter trains (a head) trains in the search, too. Rows are split
    by the batches of the first epoch. Cost: 2 passes and their gradients a step, 4 with second_order; a kill during the
    search begins it again. A record's training time leaves the search out, its seconds do not."""

    paper = "AutoLoRA, arXiv 2403.09113"
    axis, needs = "budget", frozenset({"low_rank"})
    data = True

    @dataclass
    class Config(BudgetConfig):
        """steps: of the search; held_out: share of its batches for the logits; lr, logit_lr: of AdamW on the factors and of
        Adam on the logits; second_order: the factors' answer to the logits counts; scale_by_rank: alpha over the new rank,
        else s stays."""

        steps: int = 100
        held_out: float = 0.3
        lr: float = 3e-4
        logit_lr: float = 3e-4
        second_order: bool = True
        scale_by_rank: bool = True

        def check(self):
            self.check_least(1, "steps")
            self.check_positive("held_out", "lr", "logit_lr")
            self.check_shares("held_out")

    def pairs(self):
        return [low for _, low in self.adapter.low_ranks()]

    def attach(self):
        self.register_buffer("searched", torch.zeros((), dtype=torch.long))
        self.register_buffer("largest", torch.zeros(len(self.pairs())))  # weight of each pair, times its rank

    def begin(self, stage):
        if stage.index or self.adapter.started:
            return
        c, pairs = self.config, self.pairs()
        logits = [torch.ones_like(low.A[:, 0], requires_grad=True) for low in pairs]
        weights = lambda: [a.softmax(0) for a in logits]  # noqa: E731
        search = Bilevel(stage, pairs, logits, weights, c.steps, c.held_out, c.lr, c.logit_lr, (0.5, 0.999), c.second_order)
        search.run()
        for i, (low, w) in enumerate(zip(pairs, weights(), strict=True)):
            rank = selected(w)
            self.largest[i] = len(w) * w.detach().max()
            if c.scale_by_rank:
                low.scale.mul_(low.rank / rank)
            low.resize(rank)
        self.searched.fill_(c.steps)

    def counters(self):
        total = sum(low.rank for low in self.pairs())
        return {"rank_total": total, "search_steps": int(self.searched), "largest_weight": float(self.largest.mean())}


def selected(weights: torch.Tensor) -> int:
    """How many of the weights [r], which sum to 1, are at least 1/r; equal ones all are, whatever their last digit."""
    return int((weights * len(weights) >= 1 - 1e-5).sum())
