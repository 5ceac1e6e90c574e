"""What a data-driven part may ask in begin(stage): the inputs, outputs and weight gradients of modules.

A probe runs the model in evaluation mode and puts modes, hooks and the generator back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .adapter import Stage
from .errors import UserError


@contextmanager
def watching(stage: Stage, modules: dict[str, nn.Module], hook: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """hook(name, first input, output) at every forward of the modules."""
    modes = {m: m.training for m in stage.model.modules()}
    stage.model.eval()

    def watch(name: str) -> Callable:
        return lambda module, args, out: hook(name, args[0] if args else None, out)

    handles = [m.register_forward_hook(watch(n)) for n, m in modules.items()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for h in handles:
            h.remove()
        for m, mode in modes.items():
            m.training = mode


def _batches(stage: Stage, count: int) -> list[Any]:
    got = list(stage.batches(count))
    if not got:
        raise UserError("a data-driven start was given no batches: give at least one")
    return got


def _sites(stage: Stage) -> dict[str, nn.Module]:
    return {s.name: s.base.module for s in stage.model.adapter.sites}


def each_input(stage: Stage, batches: int, use: Callable[[str, Tensor], None]) -> None:
    """use(site name, x [positions, d_in]) for every batch and site; padding is left out where the batch has a mask."""
    for batch in _batches(stage, batches):
        mask = stage.mask(batch)

        def hook(name: str, x: Tensor, y: Tensor, mask: Tensor | None = mask) -> None:
            fits = mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape
            use(name, x.detach()[mask.bool()] if fits and mask is not None else x.detach().flatten(0, -2))

        with watching(stage, _sites(stage), hook), torch.no_grad():
            stage.loss(batch)


def gradients(stage: Stage, batches: int) -> dict[str, Tensor]:
    """site name -> mean dL/dW [d_out, d_in] in float32, as (dL/dy)^T x: the base needs no requires_grad."""
    sums: dict[str, Tensor] = {}

    def hook(name: str, x: Tensor, y: Tensor) -> None:
        x = x.detach()

        def add(g: Tensor) -> None:
            w = g.flatten(0, -2).float().T @ x.flatten(0, -2).float()
            sums[name] = sums[name].add_(w) if name in sums else w

        (y if y.requires_grad else y.requires_grad_()).register_hook(add)

    got = _batches(stage, batches)
    with watching(stage, _sites(stage), hook), torch.enable_grad():
        for batch in got:
            trained = [p for p in stage.model.parameters() if p.requires_grad]
            torch.autograd.grad(stage.loss(batch), trained, allow_unused=True)
    return {n: g.div_(len(got)) for n, g in sums.items()}
