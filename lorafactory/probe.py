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


def _lazily(stage: Stage, count: int) -> Iterator[Any]:
    """Up to `count` batches. Raises UserError where there is none."""
    got = 0
    for batch in stage.batches(count):
        got += 1
        yield batch
    if not got:
        raise UserError("a data-driven start was given no batches: give at least one")


def _sites(stage: Stage) -> dict[str, nn.Module]:
    return {s.name: s.base.module for s in stage.model.adapter.sites}


def each_input(
    stage: Stage, batches: int, use: Callable[[str, Tensor], None], done: Callable[[], bool] = lambda: False
) -> None:
    """use(site name, x [positions, d_in]) for every batch and site, until done() after a batch; padding is left out
    where the batch has a mask."""
    for batch in _lazily(stage, batches):
        mask = stage.mask(batch)

        def hook(name: str, x: Tensor, y: Tensor, mask: Tensor | None = mask) -> None:
            fits = mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape
            use(name, x.detach()[mask.bool()] if fits and mask is not None else x.detach().flatten(0, -2))

        with watching(stage, _sites(stage), hook), torch.no_grad():
            stage.loss(batch)
        if done():
            return


POOLINGS = ("mean", "cls", "last")


def block(model: nn.Module, name: str) -> str:
    """The block that a module lies in: the outermost element of an nn.ModuleList on its path; without one, itself."""
    path = name.split(".")
    for i in range(1, len(path)):
        if isinstance(model.get_submodule(".".join(path[:i])), nn.ModuleList):
            return ".".join(path[: i + 1])
    return name


def states(stage: Stage, names: list[str], samples: int, pooling: str) -> dict[str, tuple[Tensor, Tensor]]:
    """module name -> (what enters it, what leaves it), each [at most `samples`, d], one vector a sample: the mean of its
    real tokens, its first or its last one."""
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {n: ([], []) for n in names}
    modules = {n: stage.model.model.get_submodule(n) for n in names}
    for batch in _lazily(stage, samples):
        mask = stage.mask(batch)

        def hook(name: str, x: Any, y: Any, mask: Tensor | None = mask) -> None:
            for kept, t in zip(found[name], (x, y[0] if isinstance(y, tuple) else y), strict=True):
                kept.append(_pooled(t.detach().float(), mask, pooling))

        with watching(stage, modules, hook), torch.no_grad():
            stage.loss(batch)
        if sum(len(t) for t in found[names[0]][0]) >= samples:
            break
    return {n: (torch.cat(x)[:samples], torch.cat(y)[:samples]) for n, (x, y) in found.items()}


def _pooled(x: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """[batch, tokens, d] -> [batch, d]; what has no tokens stays as it is."""
    if x.dim() == 2:
        return x
    x = x.flatten(1, -2)
    if mask is None or mask.shape != x.shape[:2]:
        mask = torch.ones(x.shape[:2], device=x.device)
    real = mask.to(x.dtype)[..., None]
    if pooling == "mean":
        return (x * real).sum(1) / real.sum(1).clamp_min(1)
    places = torch.arange(x.shape[1], device=x.device) * mask.bool()
    at = mask.bool().int().argmax(1) if pooling == "cls" else places.argmax(1)
    return x[torch.arange(len(x), device=x.device), at]


def gradients(stage: Stage, batches: int) -> dict[str, Tensor]:
    """site name -> mean dL/dW [d_out, d_in] in float32, as (dL/dy)^T x: the base needs no requires_grad."""
    sums: dict[str, Tensor] = {}

    def hook(name: str, x: Tensor, y: Tensor) -> None:
        x = x.detach()

        def add(g: Tensor) -> None:
            w = g.flatten(0, -2).float().T @ x.flatten(0, -2).float()
            sums[name] = sums[name].add_(w) if name in sums else w

        (y if y.requires_grad else y.requires_grad_()).register_hook(add)

    got = list(_lazily(stage, batches))
    with watching(stage, _sites(stage), hook), torch.enable_grad():
        for batch in got:
            trained = [p for p in stage.model.parameters() if p.requires_grad]
            torch.autograd.grad(stage.loss(batch), trained, allow_unused=True)
    return {n: g.div_(len(got)) for n, g in sums.items()}
