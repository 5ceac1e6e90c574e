"""Elastic: a module whose tensors change shape, appear or vanish while it trains, and which loads what was saved."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor


class Elastic(nn.Module):
    """The shape of a saved tensor is the only record of its rank: loading allocates what is saved, then loads strictly.

    shapes() names every tensor the module can hold; a letter stands for a free dimension and has one value a module.
    A tensor that exists when loading must be saved; one that is None is allocated if saved; the tensors of one group
    in `grown` are saved together or not at all. Anything else is a complaint that names the tensor."""

    grown: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        raise NotImplementedError

    def complaints(self, saved: dict[str, Tensor]) -> list[str]:
        free: dict[str, int] = {}
        group = {n: g for g in self.grown for n in g}
        bad = []
        for name, shape in self.shapes().items():
            if name not in saved:
                together = name in group
                needed = any(n in saved for n in group[name]) if together else getattr(self, name) is not None
                bad += [f"{name} is missing"] if needed else []
                continue
            got = tuple(saved[name].shape)
            want = [free.setdefault(d, k) if isinstance(d, str) else d for d, k in zip(shape, got, strict=False)]
            if len(got) != len(shape) or list(got) != want:
                bad.append(f"{name} is {list(got)}, not {[free.get(d, d) if isinstance(d, str) else d for d in shape]}")
        return bad

    def allocate(self, saved: dict[str, Tensor]) -> None:
        """Tensors of the saved shapes, None for what was not saved; their values are loaded afterwards."""
        like = next(t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())
        for name in self.shapes():
            now, new = getattr(self, name), None
            if name in saved:
                theirs = saved[name]
                dtype = like.dtype if theirs.is_floating_point() else theirs.dtype
                if now is not None and now.shape == theirs.shape and now.dtype == dtype:
                    continue
                new = torch.empty(theirs.shape, dtype=dtype, device=like.device)
                if name in self._parameters:
                    new = nn.Parameter(new, now is None or now.requires_grad)
            setattr(self, name, new)
