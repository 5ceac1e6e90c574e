"""Delta: what one site computes. Additive: W0 + B A. Copy: a module trained whole."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ..kernels import compose, transposed
from .site import Base


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Autocast off: norms, Gram products and optimiser steps keep the dtype of what they read."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """W_n ... W_1 x, in the weights' dtype (a bf16 base, float32 factors), or in autocast's where that is on."""
    if x.dtype != weights[0].dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(weights[0].dtype)
    for w in weights:
        x = x @ transposed(w)
    return x


def kronecker(x: Tensor, w1: Tensor, *w2: Tensor) -> Tensor:
    """(W1 kron W2) x for W1 [a, c] and W2 [b, d], given as linear's weights: W1 X W2^T, X being x as [c, d], row by row.
    No [a b, c d] is formed."""
    if x.dtype != w1.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(w1.dtype)
    x = x.unflatten(-1, (w1.shape[1], -1))
    fewer_first = w1.shape[0] < w1.shape[1]
    return (linear(w1 @ x, *w2) if fewer_first else w1 @ linear(x, *w2)).flatten(-2)


def dropped(x: Tensor, module: Any) -> Tensor:
    """Dropout of what a module's update reads, where it has any."""
    return F.dropout(x, module.dropout, module.training) if module.dropout else x


def numbers(*modules: nn.Module) -> list[Tensor]:
    """What the modules' functions depend on: their tensors and those of the modules that they refer to."""
    found: list[Tensor] = []
    seen: set[nn.Module] = set()
    left = [*modules]
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            own = (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
            found += (t for t in own if isinstance(t, Tensor))
            left += (m for m in (*module._modules.values(), *module.__dict__.values()) if isinstance(m, nn.Module))
    return found


def alike(x: Tensor, *weights: Tensor) -> bool:
    """Whether one product with a sum of the weights does: all have x's dtype, so that the sum loses nothing of the smaller."""
    return all(w.dtype == x.dtype for w in weights) and not torch.is_autocast_enabled(x.device.type)


def flat(x: Tensor) -> Tensor:
    """[..., d] as [positions, d], where that is no copy: what multiplies it is then no view, and cheap to write over."""
    return x.flatten(0, -2) if x.dim() > 2 and x.is_contiguous() else x


class Delta(nn.Module):
    """The function of one site. Its meaning: y = weight(base) x + bias(base). Its fast path: y = base(x) + update.

    A delta may refer to a module that several sites share (a bank): through __dict__, and always the module, never
    its tensors, so that the tensors are owned, moved and saved once, by the structure."""

    mergeable: ClassVar[bool] = True  # False: depends on x in more than a linear way, so has no weight
    replaces: ClassVar[bool] = False  # True: forward never reads the base's weight, which need not stay in memory
    dropout: float = 0.0  # of what the update reads, where the delta asks for drop()

    def drop(self, x: Tensor) -> Tensor:
        return dropped(x, self)

    def weight(self, base: Base) -> Tensor:
        """The effective weight [d_out, d_in]; unless overridden it is the base's."""
        return base.weight

    def shift(self, base: Base) -> Tensor | None:
        """What is added to the bias, [d_out]."""
        return None

    def bias(self, base: Base) -> Tensor | None:
        """The effective bias [d_out]."""
        s = self.shift(base)
        return base.bias if s is None else s if base.bias is None else base.bias + s

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(B [d_out, R], A [R, d_in]) where weight(base) = W0 + B A; such a delta is additive."""
        return None

    def thin(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """(h [..., R], B [d_out, R]) with h B^T = update(x), the shift left out; None: it is not to be had apart."""
        return None

    def randomize(self) -> None:
        """Additive deltas: start at a random update, not at zero, because a wrapper holds it at zero."""
        raise NotImplementedError(f"{type(self).__name__} is not additive")

    def update(self, x: Tensor, base: Base, y: Tensor) -> Tensor:
        """What to add to y = base(x), the shift included; [..., d_out]. Costs a dense product unless overridden."""
        u, s = linear(x, self.weight(base) - base.weight), self.shift(base)
        return u if s is None else u + s.to(u.dtype)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y + self.update(x, base, y).to(y.dtype)

    def write(self, base: Base) -> None:
        """Make the module compute, without the delta, what it computes with it."""
        base.write(self.weight(base), self.bias(base))

    def keep(self, base: Base) -> dict[str, Tensor]:
        """The module's numbers that write() overwrites."""
        return {n: t.detach().clone() for n, t in base.module.state_dict().items()}

    def restore(self, base: Base, kept: dict[str, Tensor]) -> None:
        """What keep() found, bit for bit."""
        for name in [n for n, _ in base.module.named_parameters(recurse=False) if n not in kept]:
            setattr(base.module, name, None)  # a bias that write() added
        base.module.load_state_dict(kept)

    @torch.no_grad()
    def error(self, base: Base) -> float:
        """What write() loses by the cast to the base's dtype, as a share of the update: |W' - W| / |W - W0|, or that of
        the bias where it is more."""
        w, b = self.weight(base), self.bias(base)
        bias = 0.0 if b is None else lost(b, base.weight.new_zeros(b.shape) if base.bias is None else base.bias)
        return max(bias, lost(w, base.weight))


def lost(new: Tensor, old: Tensor) -> float:
    """What the cast of new to old's dtype loses, as a share of |new - old|."""
    change = (new.double() - old.double()).norm()
    return float((new.to(old.dtype).double() - new.double()).norm() / change) if change > 0 else 0.0


class Additive(Delta):
    """W = W0 + B A, which factors() gives. One that overrides update() has no thin(): None."""

    def weight(self, base: Base) -> Tensor:
        b, a = self.factors()  # type: ignore[misc]
        return base.weight + b @ a

    def thin(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        b, a = self.factors()  # type: ignore[misc]
        return linear(self.drop(x), a), b

    def update(self, x: Tensor, base: Base, y: Tensor) -> Tensor:
        return linear(*self.thin(x))  # type: ignore[misc]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        rows = flat(x)
        thin = self.thin(rows)
        if thin is None:
            return super().forward(x, base)
        return compose(base(rows), *thin, fresh=True).view(*x.shape[:-1], len(thin[1]))


class Copy(Delta):
    """A module trained whole, as a copy in float32 or wider: a task head, or what full fine-tuning trains beside the
    linear layers. In and out it has the base's own dtype.

    memo is deepcopy's: copies made with one memo keep the ties between their modules."""

    replaces = True

    def __init__(self, module: nn.Module, memo: dict | None = None):
        super().__init__()
        self.module = copy.deepcopy(module, memo).requires_grad_(True)
        self.module._apply(lambda t: t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t)

    def forward(self, *args: Any, base: Base, **kwargs: Any) -> Any:  # type: ignore[override]
        own, theirs = next(self.parameters()).dtype, next(base.module.parameters()).dtype
        if own == theirs:
            return self.module(*args, **kwargs)
        args, kwargs = tree_map(lambda t: _cast(t, theirs, own), (args, kwargs))
        return tree_map(lambda t: _cast(t, own, theirs), self.module(*args, **kwargs))

    @torch.no_grad()
    def write(self, base: Base) -> None:
        base.module.load_state_dict(self.module.state_dict())

    @torch.no_grad()
    def error(self, base: Base) -> float:
        ours, theirs = self.module.state_dict(), base.module.state_dict()
        return max((lost(t, theirs[n]) for n, t in ours.items() if t.is_floating_point()), default=0.0)


def _cast(t: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return t.to(new) if isinstance(t, Tensor) and t.dtype == old else t
