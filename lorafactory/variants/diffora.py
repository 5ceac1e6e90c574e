from dataclasses import dataclass

import torch

from .. import probe
from ..adapter import Part
from ..bilevel import Bilevel
from ..errors import UserError
from ..registry import BudgetConfig, register

RELAXATIONS = ("sigmoid", "softmax")
SCOPES = ("layer", "model")
UNSELECTED = ("none", "shared")


@register("diffora")
class DiffoRA(Part):
    """DiffoRA: y = W0 x + gamma_ln s B A x in a search over layers l and modules n; the modules with the largest gamma stay.

    Jiang et al. 2025: a differential adaptation matrix gamma [L, N] says which modules deserve a LoRA. Only the abstract was
    to be had, so every equation here is reconstructed, and inferred. Continuous relaxation: gamma = sigmoid(a), 0.5 at
    first, or N softmax(a) over the N modules of a layer; before training, `steps` times, the factors step on one part of the
    training batches and the logits a on another (first-order DARTS). Discretisation: in each layer the `selected` share with
    the largest gamma becomes 1, the earlier module where two are equal; at least one does. Weight sharing: the others have
    no LoRA (none), or those of one kind and shape share one pair (shared). Then all starts afresh and trains on all rows;
    gamma is dropped.

    A layer is a block, the outermost element of an nn.ModuleList; a module outside of every one is a layer of its own,
    and so selected. Shared pairs are not the default: what starts or moves each pair by itself would do so once a module,
    and is refused. The paper's theory, a Gram matrix's smallest eigenvalue, is not computed. Cost: as AutoLoRA's search; a
    kill during it begins it again."""

    paper = "DiffoRA, arXiv 2502.08905"
    axis, needs = "budget", frozenset({"low_rank"})
    data = True

    @dataclass
    class Config(BudgetConfig):
        """selected: share of the modules; scope: in each layer, or in the whole model; relax: sigmoid or softmax;
        unselected: none or shared; steps: of the search; held_out: share of its batches for the logits; lr, logit_lr: of
        AdamW on the factors and of Adam on the logits; second_order: the factors' answer to the logits counts."""

        selected: float = 0.5
        scope: str = "layer"
        relax: str = "sigmoid"
        unselected: str = "none"
        steps: int = 100
        held_out: float = 0.5
        lr: float = 1e-3
        logit_lr: float = 1e-3
        second_order: bool = False

        def check(self):
            self.check_choices(scope=SCOPES, relax=RELAXATIONS, unselected=UNSELECTED)
            self.check_least(1, "steps")
            self.check_positive("selected", "held_out", "lr", "logit_lr")
            self.check_shares("held_out")
            if self.selected > 1:
                raise UserError(f"selected is {self.selected}; it is a share, at most 1")

    def modules(self):
        """site -> its pairs; experts of a module are selected together."""
        found = {}
        for site, low in self.adapter.low_ranks():
            found.setdefault(site, []).append(low)
        return found

    def attach(self):
        found = self.modules()
        self.register_buffer("gamma", torch.zeros(len(found)))
        self.register_buffer("selected", torch.ones(len(found), dtype=torch.bool))
        if self.config.unselected == "none":
            return
        if any(len(lows) > 1 for lows in found.values()):
            raise UserError("unselected='shared' takes one pair a module, and here a module has several: unselected='none'")
        for p in self.adapter.parts.values():
            if p.axis in ("init", "dynamics") and "low_rank" in p.needs:
                told = f"ties pairs, which {p.name!r} would start or move one by one"
                raise UserError(f"unselected='shared' {told}: drop one of them")

    def begin(self, stage):
        if stage.index or self.adapter.started:
            return
        c, found = self.config, self.modules()
        rows = self.rows(stage)
        a = torch.zeros(len(found), dtype=torch.float32, requires_grad=True)
        pairs = [low for lows in found.values() for low in lows]

        def gates():
            gamma = self.relaxed(a, rows)
            return [g.to(low.A).expand(low.rank) for g, lows in zip(gamma, found.values(), strict=True) for low in lows]

        Bilevel(stage, pairs, [a], gates, c.steps, c.held_out, c.lr, c.logit_lr, (0.9, 0.999), c.second_order).run()
        self.gamma.copy_(self.relaxed(a, rows).detach())
        self.selected.copy_(discrete(self.gamma, rows if c.scope == "layer" else [sum(rows, [])], c.selected))
        self.drop()

    def rows(self, stage):
        """The indices of each layer's modules."""
        found = {}
        for i, site in enumerate(self.modules()):
            found.setdefault(probe.block(stage.model.model, site.name), []).append(i)
        return list(found.values())

    def relaxed(self, a, rows):
        """gamma, one for each module."""
        if self.config.relax == "sigmoid":
            return a.sigmoid()
        gamma = torch.zeros_like(a)
        for row in rows:
            gamma = gamma.index_put((torch.tensor(row),), len(row) * a[row].softmax(0))
        return gamma

    def drop(self):
        """No pair, or a shared one, where none was selected."""
        first = {}
        for (site, lows), own in zip(self.modules().items(), self.selected.tolist(), strict=True):
            for low in lows:
                if own:
                    continue
                if self.config.unselected == "none":
                    low.keep(torch.arange(0, device=low.A.device))
                else:
                    leader = first.setdefault((site.kind, low.rank), low)
                    low.A, low.B = leader.A, leader.B

    def counters(self):
        pairs = [low for _, low in self.adapter.low_ranks() if low.rank]
        return {"modules": len(self.selected), "modules_selected": int(self.selected.sum()),
                "pairs": len({low.A for low in pairs}), "rank_total": sum(low.rank for low in pairs)}  # fmt: skip


def discrete(gamma: torch.Tensor, rows: list[list[int]], share: float) -> torch.Tensor:
    """1 for the share of each row with the largest gamma, at least one, the earlier one of two that are equal; else 0."""
    found = torch.zeros(len(gamma), dtype=torch.bool)
    for row in rows:
        best = sorted(row, key=lambda i: (-float(gamma[i]), i))
        found[best[: max(1, int(share * len(row) + 0.5))]] = True
    return found
