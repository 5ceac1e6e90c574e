"""Once: what depends on an adapter's numbers alone is computed once per optimiser step, not once per forward pass; held: a
whole weight that is, with its gradient.

That numbers stand still nobody can see from the tensors: torch's fused optimisers and whoever writes to `.data` leave
the version counters as they are. So a value is kept only where somebody vouches for it: for parameters that a life
cycle trains (watch), from one optimiser step to the next, and inside still(). A step of any torch optimiser ends
every value's life, and so does changed(). Everywhere else each pass computes afresh."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

Gradients = Callable[..., tuple[Tensor | None, ...]]

ROOM = 1 << 30  # bytes of all that is kept; beyond, a value is computed every time
SMALL = 1 << 16  # not counted
_still = 0
_watched = WeakIdKeyDictionary()
_kept: WeakSet[Once] = WeakSet()


def changed(*_: Any) -> None:
    """Numbers may have changed without a trace: every value is let go."""
    for once in list(_kept):
        once.drop()


register_optimizer_step_post_hook(changed)


def watch(parameters: Iterable[Tensor]) -> None:
    """From now on these change in optimiser steps, in place with a trace, or with a call of changed()."""
    for p in parameters:
        _watched[p] = True
    changed()


def leave(parameters: Iterable[Tensor]) -> None:
    """Nobody vouches for these any more."""
    for p in parameters:
        _watched.pop(p, None)


@contextlib.contextmanager
def still() -> Iterator[None]:
    """Inside, no adapter's numbers change without a trace (a loop of evaluation)."""
    global _still
    changed()
    _still += 1
    try:
        yield
    finally:
        _still -= 1
        changed()


class Once:
    """The last value and what it was computed from. A copy starts empty."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        self._of: list[Tensor] = []  # held, so that no new tensor can pass for one of them
        self._key: tuple | None = None
        self._value: Any = None
        _kept.discard(self)

    def __call__(self, compute: Callable[[], Any], of: Callable[[], list[Tensor]], *also: Any) -> Any:
        """compute(), or its earlier value where no tensor of of() can have changed and `also` is the same. Needs no
        gradient."""
        if torch.compiler.is_compiling():
            return compute()
        tensors = of()
        if not (_still or any(t in _watched for t in tensors if t.requires_grad)):
            self.drop()
            return compute()
        key = (*also, *((t._version, t.data_ptr(), t.dtype) for t in tensors))
        if key != self._key or any(a is not b for a, b in zip(tensors, self._of, strict=True)):
            self.drop()
            value = compute()
            if not _fits(value):
                return value
            self._of, self._key, self._value = tensors, key, value
            _kept.add(self)
        return self._value

    def __reduce__(self) -> tuple:
        return Once, ()


def _fits(value: Any) -> bool:
    size = _size(value)
    return size <= SMALL or size + sum(_size(once._value) for once in _kept) <= ROOM


def _size(value: Any) -> int:
    return sum(t.nbytes for t in (value if isinstance(value, tuple) else (value,)))


def held(once: Once, make: Callable[..., Tensor], gradients: Gradients, tensors: tuple[Tensor, ...],
         of: Callable[[], list[Tensor]], *also: Any) -> Tensor:  # fmt: skip
    """make(*tensors), a weight, as `once` keeps it. gradients(g, *tensors): those of the tensors, None for a constant, from
    its own; the weight itself is all that a backward pass keeps, and that once a step."""
    if torch.compiler.is_compiling():
        return make(*tensors)
    with torch.no_grad():
        value = once(lambda: make(*tensors), of, *also)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Held.apply(value, gradients, *tensors)
    return value  # type: ignore[no-any-return]


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Gradients, *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*tensors)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(*g, *ctx.saved_tensors)
