"""Once: what depends on an adapter's numbers alone is computed once per optimiser step, not once per forward pass.

That numbers stand still nobody can see from the tensors: torch's fused optimisers and whoever writes to `.data` leave
the version counters as they are. So a value is kept only where somebody vouches for it: for parameters that a life
cycle trains (watch), from one optimiser step to the next, and inside still(). A step of any torch optimiser ends
every value's life, and so does changed(). Everywhere else each pass computes afresh."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

_tick = 0
_still = 0
_watched = WeakIdKeyDictionary()


def changed(*_: Any) -> None:
    """Numbers may have changed without a trace: every value is computed anew."""
    global _tick
    _tick += 1


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
        self._of: list[Tensor] = []  # held, so that no new tensor can pass for one of them
        self._key: tuple | None = None
        self._value: Any = None

    def __call__(self, compute: Callable[[], Any], of: Callable[[], list[Tensor]], *also: Any) -> Any:
        """compute(), or its earlier value where no tensor of of() can have changed and `also` is the same. Needs no
        gradient."""
        if torch.compiler.is_compiling():
            return compute()
        tensors = of()
        if not (_still or any(t in _watched for t in tensors if t.requires_grad)):
            self._of, self._key, self._value = [], None, None
            return compute()
        key = (_tick, *also, *((t._version, t.data_ptr(), t.dtype) for t in tensors))
        if key != self._key or any(a is not b for a, b in zip(tensors, self._of, strict=True)):
            self._of, self._key, self._value = tensors, key, compute()
        return self._value

    def __reduce__(self) -> tuple:
        return Once, ()
