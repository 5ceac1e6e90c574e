"""What a data-driven part may ask in begin(stage): the inputs, outputs and weight gradients of modules.

A probe runs the model in evaluation mode and puts modes, hooks and the generator back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .adapter import Stage
from .errors import UserError


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The whole model in one mode; each module's own comes back."""
    modes = {m: m.training for m in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for m, before in modes.items():
            m.training = before


@contextmanager
def evaluating(stage: Stage) -> Iterator[None]:
    """The model in evaluation mode; modes and the generator are put back."""
    with mode(stage.model, False), torch.random.fork_rng():
        yield


@contextmanager
def watching(stage: Stage, modules: dict[str, nn.Module], hook: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """hook(name, first input, output) at every forward of the modules; what it returns, if not None, is the output."""

    def watch(name: str) -> Callable:
        return lambda module, args, kwargs, out: hook(name, args[0] if args else next(iter(kwargs.values()), None), out)

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in modules.items()]
    try:
        with evaluating(stage):
            yield
    finally:
        for h in handles:
            h.remove()


def lazily(stage: Stage, count: int) -> Iterator[Any]:
    """Up to `count` batches. Raises UserError where there is none."""
    got = 0
    for batch in stage.batches(count):
        got += 1
        yield batch
    if not got:
        raise UserError("a data-driven start was given no batches: give at least one")


def one_by_one(stage: Stage, count: int) -> Iterator[Stage]:
    """The stage with one batch alone, for up to `count` batches."""
    for batch in lazily(stage, count):
        yield replace(stage, batches=partial(_only, batch))


def _only(batch: Any, count: int) -> list[Any]:
    return [batch]


def _sites(stage: Stage) -> dict[str, nn.Module]:
    return {s.name: s.base.module for s in stage.model.adapter.sites}


def _all_reached(what: str, names: Iterable[str], reached: Iterable[str]) -> None:
    if lost := [n for n in names if n not in reached]:
        raise UserError(f"no {what} reached {lost[0]} in the batches of a data-driven start: it must not be a target")


class _Rows:
    """x [..., d] as rows [positions, d] without padding; for the same tensor again the same rows again."""

    def __init__(self, mask: Tensor | None):
        self.mask, self.last, self.rows = mask, None, torch.empty(0)

    def __call__(self, x: Any) -> Tensor:
        if x is not self.last:
            fits = self.mask is not None and x.dim() == 3 and x.shape[:2] == self.mask.shape
            self.last, self.rows = x, x[self.mask.bool()] if fits and self.mask is not None else x.flatten(0, -2)
        return self.rows


def each_input(
    stage: Stage, batches: int, use: Callable[[str, Tensor], None], done: Callable[[], bool] = lambda: False
) -> None:
    """use(site name, x [positions, d_in]) for every batch and site, until done() after a batch; padding is left out
    where the batch has a mask. Sites that read one tensor one after another (query, key, value) get the same object x.
    Raises UserError for a site that is never called."""
    sites, reached = _sites(stage), set()
    for batch in lazily(stage, batches):
        rows = _Rows(stage.mask(batch))

        def hook(name: str, x: Any, y: Any, rows: _Rows = rows) -> None:
            if len(found := rows(x)):  # an expert may get no token of a batch
                reached.add(name)
                use(name, found)

        with watching(stage, sites, hook), torch.no_grad():
            stage.loss(batch)
        if done():
            break
    _all_reached("input", sites, reached)


POOLINGS = ("mean", "cls", "last_token")


def block(model: nn.Module, name: str) -> str:
    """The block that a module lies in: the outermost element of an nn.ModuleList on its path; without one, itself."""
    path = name.split(".")
    on_it = [".".join(path[:i]) for i in range(1, len(path) + 1)]
    lists = [isinstance(model.get_submodule(n), nn.ModuleList) for n in on_it]
    return next((n for n, parent, own in zip(on_it[1:], lists, lists[1:], strict=False) if parent and not own), name)


def states(stage: Stage, names: list[str], samples: int, pooling: str) -> dict[str, tuple[Tensor, Tensor]]:
    """module name -> (what enters it, what leaves it), each [at most `samples`, d], one vector a sample: the mean of its
    real tokens, its first or its last one. Raises UserError for a module that is never called."""
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {n: ([], []) for n in names}
    modules = {n: stage.model.model.get_submodule(n) for n in names}
    for batch in lazily(stage, samples):
        mask = stage.mask(batch)

        def hook(name: str, x: Any, y: Any, mask: Tensor | None = mask) -> None:
            for kept, t in zip(found[name], (x, y[0] if isinstance(y, tuple) else y), strict=True):
                kept.append(_pooled(t.detach().float(), mask, pooling))

        with watching(stage, modules, hook), torch.no_grad():
            stage.loss(batch)
        if sum(len(t) for t in found[names[0]][0]) >= samples:
            break
    _all_reached("state", names, [n for n in names if found[n][0]])
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


def gradients(stage: Stage, batches: int, moved: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """site name -> mean dL/dW [d_out, d_in] over the batches in float32, as (dL/dy)^T x: the base needs no
    requires_grad. The sums stay on the CPU: all of them together have the size of the model. moved: what to add to the
    weights [d_out, d_in] meanwhile. Raises UserError for a site without gradient."""
    sums: dict[str, Tensor] = {}

    def hook(name: str, x: Tensor, y: Tensor) -> Tensor:
        if moved is not None:
            d = moved[name].to(x.device)
            y = y + torch.nn.functional.linear(x.to(d.dtype), d).to(y.dtype)
        x = x.detach()

        def add(g: Tensor) -> None:
            w = (g.flatten(0, -2).float().T @ x.flatten(0, -2).float()).cpu()
            sums[name] = sums[name].add_(w) if name in sums else w

        (y if y.requires_grad else y.requires_grad_()).register_hook(add)
        return y

    sites, count = _sites(stage), 0
    trained = [p for p in stage.model.parameters() if p.requires_grad]
    with watching(stage, sites, hook), torch.enable_grad():
        for batch in lazily(stage, batches):
            torch.autograd.grad(stage.loss(batch), trained, allow_unused=True)
            count += 1
    _all_reached("gradient", sites, sums)
    return {n: g.div_(count) for n, g in sums.items()}
