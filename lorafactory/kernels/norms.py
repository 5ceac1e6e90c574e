"""sqnorm: squared norms of the rows or columns of W + s B A, without the matrix B A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .choice import pick

CACHED = 1 << 21  # numbers of V at a time: 8 MB, which a processor's last cache holds; measured at 2048 and 4096


def sqnorm(w: Tensor, a: Tensor, b: Tensor, scale: float | Tensor = 1.0, axis: int = 1, weights: Tensor | None = None,
           base: Tensor | None = None) -> Tensor:  # fmt: skip
    """With V = W + s B A: n_i = sum_j q_j V_ij^2 [d_out] (axis 1), or n_j = sum_i q_i V_ij^2 [d_in] (axis 0).

    w [d_out, d_in] frozen, any float dtype; a [r, d_in], b [d_out, r], float32 or wider, which the result has; weights
    q >= 0 of the summed axis (none: 1); base: the squares of W alone, where known. Differentiable in a, b, s and q.

    Two fast forms, both exact to float32. Factored (arXiv 2603.22276), n = |W_i|^2 + s sum_k B_ik (2 U + s B G)_ik with
    U = W A^T and G = A A^T: on a GPU, and where a gradient is asked for. By rows, where memory is behind a cache: V
    itself, some rows at a time, as many products and nothing kept. Never below 0, where rounding would take a row that
    is nearly zero; a NaN stays one."""
    kind = pick("sqnorm", w, a, b, twin=False)
    with torch.autocast(w.device.type, enabled=False):
        if kind == "reference":
            return _definition(w, a, b, scale, axis, weights)
        if not (w.is_cuda or _grown(a, b, scale, weights) or torch.compiler.is_compiling()):
            return _by_rows(w, a, b, scale, axis, weights)
        if a.shape[0] > min(w.shape):  # more ranks than V has
            return _definition(w, a, b, scale, axis, weights)
        if axis == 0:
            w, a, b = w.T, b.T, a.T
        return _factored(w, a, b, scale, weights, base)


def squares(w: Tensor, axis: int = 1, weights: Tensor | None = None) -> Tensor:
    """sqnorm of W alone, in float32 or wider: to the last bit what sqnorm gives where B is zero. Differentiable in W."""
    if _grown(w, weights):
        return _summed(w.square(), axis, weights)
    wide = w.new_empty(0, w.shape[1], dtype=torch.promote_types(w.dtype, torch.float32))
    return _by_rows(w, wide, wide.new_empty(w.shape[0], 0), 1.0, axis, weights)


def _definition(w: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, axis: int, weights: Tensor | None) -> Tensor:
    return _summed((w.to(a.dtype) + scale * (b @ a)).square(), axis, weights)


def _summed(square: Tensor, axis: int, weights: Tensor | None) -> Tensor:
    if weights is None:
        return square.sum(axis)
    return square @ weights if axis else weights @ square


def _grown(*given: Any) -> bool:
    """Whether a gradient is asked for."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given)


def _factored(w: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, weights: Tensor | None, base: Tensor | None) -> Tensor:
    if base is None:
        base = squares(w.to(a.dtype), weights=weights)
    right = a if weights is None else a * weights
    return (base + scale * (b * (2 * products(w, right) + scale * (b @ (right @ a.T)))).sum(1)).clamp_min(0)


def products(w: Tensor, a: Tensor) -> Tensor:
    """W A^T [d_out, r] in a's dtype. On a GPU a narrow W meets A as the sum of two narrow matrices: their products are
    exact in the float32 that tensor cores add in, and so is the result, to float32."""
    if not (w.is_cuda and w.dtype in (torch.bfloat16, torch.float16) and a.dtype == torch.float32) or a.requires_grad:
        return w.to(a.dtype) @ a.T
    high, low = halves(a, w.dtype)
    return torch.mm(w, high.T, out_dtype=torch.float32) + torch.mm(w, low.T, out_dtype=torch.float32)


def halves(a: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a = high + low, both of a narrower dtype, but for 2^-16 of its entries (bf16)."""
    high = a.to(dtype)
    return high, (a - high.to(a.dtype)).to(dtype)


@torch.no_grad()
def _by_rows(w: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, axis: int, weights: Tensor | None) -> Tensor:
    b = b * scale if isinstance(scale, Tensor) or scale != 1 else b
    size = max(1, CACHED // max(1, w.shape[1]))
    if size >= w.shape[0]:
        return _of(torch.addmm(w.to(a.dtype), b, a), axis, weights)
    buffer, parts = a.new_empty(size, w.shape[1]), []
    for start in range(0, w.shape[0], size):
        rows = slice(start, start + size)
        v = torch.addmm(w[rows].to(a.dtype), b[rows], a, out=buffer[: min(size, w.shape[0] - start)])
        parts.append(_of(v, axis, weights if axis or weights is None else weights[rows]))
    return torch.cat(parts) if axis else torch.stack(parts).sum(0)


def _of(v: Tensor, axis: int, weights: Tensor | None) -> Tensor:
    """The weighted squared norms of the rows or columns of v, which is overwritten. A weight of 1 changes no bit."""
    if axis:
        return torch.linalg.vector_norm(v if weights is None else v.mul_(weights.sqrt()), dim=1).square_()
    return torch.mv(v.square_().T, v.new_ones(len(v)) if weights is None else weights)
