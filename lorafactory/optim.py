"""Lifecycle: the hooks of an adapter, run by the optimiser's own step(), so that no training loop can forget them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .adapter import Adapter, Stage, Step
from .adapter.low_rank import Moved
from .errors import UserError


def groups(adapter: Adapter, head: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Parameter groups from the parts' options. Vectors (biases, gates, magnitudes) are not decayed unless a part says
    so; `lr_scale` multiplies the learning rate; head: options of the trained heads."""
    options: dict[Any, dict[str, float]] = {p: {"weight_decay": 0.0} for p in adapter.parameters() if p.dim() < 2}
    for p in adapter.heads():
        options.setdefault(p, {}).update(head or {})
    for part in adapter.all_parts():
        for p, kv in part.options().items():
            options.setdefault(p, {}).update(kv)
    found: dict[tuple, dict[str, Any]] = {}
    for p in adapter.parameters():
        if p.requires_grad:
            kv = {"lr_scale": 1.0, **options.get(p, {})}
            found.setdefault(tuple(sorted(kv.items())), {"params": [], **kv})["params"].append(p)
    return list(found.values())


class Lifecycle:
    """index counts optimiser steps from 0; a resumed run sets it. prepare(): called once gradients are final, before
    the parts see them (clipping follows in `clip`). loss: the task loss of the step to come, if the loop tells it."""

    def __init__(self, adapter: Adapter, make: Callable, total: int, head: dict[str, float] | None = None,
                 stage: Stage | None = None):  # fmt: skip
        self.adapter, self.total, self.index, self.head, self.stage = adapter, total, 0, head, stage
        self.sum: Callable[[Tensor], Tensor] = lambda t: t  # over processes: a training loop of several sets it
        self.clip: float | None = None
        self.norm: float | None = None  # of the gradients of the last step, before clipping
        self.depth = 0  # an optimiser whose step() calls its parent's fires the hooks twice
        self.rates: list[float] = []
        self.loss: Any = None
        if not any(g["params"] for g in groups(adapter, head)):
            raise UserError("nothing to train: every parameter of the adapter is frozen (requires_grad is False)")
        own = [o for p in adapter.all_parts() if (o := p.optimizer(groups(adapter, head), make)) is not None]
        self.optimizer: torch.optim.Optimizer = own[0] if own else make(groups(adapter, head))
        for g in self.optimizer.param_groups:
            g["lr"] = g.get("lr", 0.0) * g.setdefault("lr_scale", 1.0)
            g["initial_lr"] = g["lr"]
        kernels.watch(adapter.parameters())
        self.optimizer.register_step_pre_hook(self._before)
        self.optimizer.register_step_post_hook(self._after)
        self.optimizer.lifecycle = self  # type: ignore[attr-defined]

    def step(self) -> Step:
        return Step(self.index, self.total, self)

    def _before(self, *_: Any) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        try:
            self._prepare()
        except BaseException:
            self.depth = 0  # this step does not happen; the next one runs its hooks
            raise

    def _prepare(self) -> None:
        if self.adapter.has_penalty and not self.adapter.__dict__.pop("penalty_taken", False):
            raise UserError("this variant adds a penalty to the loss: call (loss + adapted.penalty()).backward()")
        if self.index >= self.total:
            raise UserError(f"step {self.index + 1} of {self.total}: give optimizer(total=…) the true number of steps")
        self.adapter.before_step(self.step())
        if self.clip is not None:
            params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
            self.norm = float(torch.nn.utils.clip_grad_norm_(params, self.clip))
        rate = self.adapter.rate(self.step())
        self.rates = [g["lr"] for g in self.optimizer.param_groups]
        for g in self.optimizer.param_groups:
            g["lr"] = g["lr"] * rate

    def _after(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth:
            return
        for g, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            g["lr"] = lr
        self.adapter.after_step(self.step())
        self.index += 1
        self.loss = None
        if self.index == self.total:
            kernels.leave(self.adapter.parameters())

    def rebuild(self, moved: Moved | None = None) -> None:
        """Train the parameters that the adapter has now, in place: whoever wraps the optimiser keeps the same object.
        State of parameters that live on is kept, that of replaced ones is forgotten, or moved: what has the old one's
        shape becomes of the new one's, and a count of steps stays."""
        kernels.watch(self.adapter.parameters())
        opt = self.optimizer
        for new, (old, change) in (moved or {}).items():
            state = opt.state.get(old, {})
            if state and all(t.shape in (old.shape, ()) for t in state.values() if torch.is_tensor(t)):
                opt.state[new] = {k: change(t) if torch.is_tensor(t) and t.dim() else t for k, t in state.items()}
        rate = next((g["lr"] / g["lr_scale"] for g in opt.param_groups if g["lr_scale"]), 0.0)
        first = next((g["initial_lr"] / g["lr_scale"] for g in opt.param_groups if g["lr_scale"]), 0.0)
        opt.param_groups.clear()
        for g in groups(self.adapter, self.head):
            opt.add_param_group({**g, "lr": rate * g["lr_scale"], "initial_lr": first * g["lr_scale"]})
        alive = {p for g in opt.param_groups for p in g["params"]}
        for p in [p for p in opt.state if p not in alive]:
            del opt.state[p]
        self.rates = [g["lr"] for g in opt.param_groups]
