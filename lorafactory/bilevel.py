"""Which ranks are worth having, learnt before training: factors on some batches, weights of the ranks on others (DARTS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import probe
from .adapter import LowRank, Stage
from .errors import UserError

RADIUS = 0.01  # DARTS' epsilon is this over the norm of the direction


@dataclass
class Bilevel:
    """gates(): the gate [rank] of every pair, as a function of the logits, which are leaves.

    A step of the search is an AdamW step of what the adapter trains, on a batch of the training share, and one of Adam on
    the logits, on a batch of the held-out share. second_order: the logits' gradient counts that the factors answered to
    them, by a finite difference of one step of gradient descent at rate lr (Liu et al. 2019, eq. 8); else it does not.

    Runs inside begin(): it starts from the adapter as it is, in training mode, and puts back all but the logits."""

    stage: Stage
    pairs: list[LowRank]
    logits: list[Tensor]
    gates: Callable[[], list[Tensor]]
    steps: int
    held_out: float
    lr: float
    logit_lr: float
    betas: tuple[float, float]
    second_order: bool

    def run(self) -> None:
        """Raises UserError where there are not two batches to split."""
        adapter = self.stage.model.adapter
        training, held_out = self.split()
        kept = {n: t.detach().clone() for n, t in adapter.state_dict().items()}
        theta = [p for p in adapter.parameters() if p.requires_grad]
        inner = torch.optim.AdamW(theta, lr=self.lr, weight_decay=0.0)
        outer = torch.optim.Adam(self.logits, lr=self.logit_lr, betas=self.betas)
        for low in self.pairs:
            low.set_mask(torch.ones_like(low.A[:, 0]).requires_grad_(), always=True)
        try:
            with probe.mode(self.stage.model, True), torch.enable_grad():
                for i in range(self.steps):
                    batch = training[i % len(training)]
                    self.write()
                    for p, g in zip(theta, self.gradients(batch, theta), strict=True):
                        p.grad = g
                    inner.step()
                    self.step_logits(outer, theta, held_out[i % len(held_out)], batch)
        finally:
            for low in self.pairs:
                low.set_mask(None)
            for p in theta:
                p.grad = None
            adapter.load_state_dict(kept)

    def split(self) -> tuple[list, list]:
        """Batches to train on and batches held out: each row of the first epoch is in one of them."""
        batches = list(probe.lazily(self.stage, max(2, self.steps)))
        if len(batches) < 2:
            raise UserError("the search trains on some batches and judges on others: give at least two")
        held = min(max(1, round(self.held_out * len(batches))), len(batches) - 1)
        return batches[held:], batches[:held]

    def write(self) -> None:
        with torch.no_grad():
            for low, g in zip(self.pairs, self.gates(), strict=True):
                low.mask.copy_(g)  # type: ignore[union-attr]

    def gradients(self, batch, of: list[Tensor]) -> list[Tensor]:
        adapter = self.stage.model.adapter
        adapter.before_forward(batch)
        loss = self.stage.loss(batch) + adapter.penalty()
        found = torch.autograd.grad(loss, of, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(of, found, strict=True)]

    def step_logits(self, outer: torch.optim.Optimizer, theta: list[Tensor], batch, training) -> None:
        gates: list[Tensor] = [low.mask for low in self.pairs]  # type: ignore[misc]
        wanted = [*gates, *theta] if self.second_order else gates
        found = self.gradients(batch, wanted)
        direct = found[: len(gates)]
        if self.second_order:
            answer = self.answer(gates, theta, found[len(gates) :], training)
            direct = [d - self.lr * a for d, a in zip(direct, answer, strict=True)]
        outer.zero_grad()
        torch.autograd.backward(self.gates(), direct)
        outer.step()

    def answer(self, gates: list[Tensor], theta: list[Tensor], v: list[Tensor], training) -> list[Tensor]:
        """d/dgate of (d L_train / d theta) . v, by a central difference along v."""
        norm = torch.stack([g.norm() for g in v]).norm()
        if not norm > 0:
            return [torch.zeros_like(g) for g in gates]
        size = RADIUS / norm
        kept = [p.detach().clone() for p in theta]
        sides = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for p, k, g in zip(theta, kept, v, strict=True):
                    p.copy_(k + sign * size * g)
            sides.append(self.gradients(training, gates))
        with torch.no_grad():
            for p, k in zip(theta, kept, strict=True):
                p.copy_(k)
        return [(a - b) / (2 * size) for a, b in zip(*sides, strict=True)]
