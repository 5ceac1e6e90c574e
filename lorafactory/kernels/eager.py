"""compose in PyTorch: few reads and writes where the dtypes are one, float32 in between where they are not."""

from __future__ import annotations

import torch
from torch import Tensor

from .narrow import transposed


def rows(*tensors: Tensor) -> list[Tensor]:
    """[..., d] as [positions, d], d 0 or more; what is, as it is: to write into a view costs its gradient two copies."""
    return [t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in tensors]


def add(y: Tensor, h: Tensor, b: Tensor, fresh: bool) -> Tensor:
    """y + h B^T."""
    autocast = torch.is_autocast_enabled(y.device.type)
    if autocast or y.dtype == h.dtype == b.dtype:
        flat, thin = rows(y, h)
        sum_ = flat.addmm_ if fresh and not autocast else flat.addmm
        return sum_(thin, transposed(b)).view(y.shape).to(y.dtype)
    return (y + h @ transposed(b.to(h.dtype))).to(y.dtype)


def add_scaled(y: Tensor, h: Tensor, b: Tensor, g: Tensor, fresh: bool) -> Tensor:
    """y + g (h B^T)."""
    update = h @ transposed(b.to(h.dtype))
    if not (y.dtype == update.dtype == g.dtype):
        return (y + g * update).to(y.dtype)
    return y.addcmul_(g, update) if fresh else y.addcmul(g, update)


def forward(y: Tensor, h: Tensor, b: Tensor, g: Tensor, bias: Tensor | None, whole: bool,
            keep: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """z = g (y + h B^T) + (1 - g) bias and, to keep, y + h B^T in y's dtype."""
    if y.dtype == g.dtype == h.dtype:
        inner = torch.addmm(y, h, b.T)
        if not keep and bias is None:
            return inner.mul_(g), None
    else:
        inner = torch.addmm(y.to(g.dtype), h, b.T) if h.dtype == g.dtype else y.to(g.dtype) + h @ b.T
    z = g * inner if bias is None else torch.addcmul(bias - g * bias, g, inner)
    return z.to(y.dtype), (inner.to(y.dtype) if keep else None)


def backward(dz: Tensor, g: Tensor, bias: Tensor | None, inner: Tensor | None,
             of_y: bool) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """g dz in dz's dtype, and the sum of dz (inner - bias) over positions, in g's; None for what is not wanted."""
    dy = (g * dz).to(dz.dtype) if of_y else None
    if inner is None:
        return dy, None
    if bias is None:
        return dy, (dz.to(g.dtype) * inner).sum(0)
    return dy, (inner.to(g.dtype) - bias).mul_(dz).sum(0)
