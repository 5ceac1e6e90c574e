"""The Triton twins of compose's two passes. Under TRITON_INTERPRET=1, set before Triton is imported, they run on a CPU.

No atomics: results are the same every time. The interpreter multiplies bf16 as integers and cannot autotune: there
operands of a product are widened first, and tile sizes are fixed everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .choice import interpreting

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise UserError("Triton's kernels need Triton: pip install triton") from e

ROWS, COLUMNS, RANKS = 64, 128, 32  # of a tile: positions, outputs, ranks at a time
STRIP = 128  # positions that one program of the backward pass sums over


@triton.jit
def _compose(y, g, h, b, bias, z, inner, m, n, r, stride_y, stride_h, stride_b,
             WHOLE: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, WIDEN: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANKS)
    some_rows, some_columns = rows[:, None] < m, columns[None, :] < n
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(STEPS):
        k = step * RANKS + ranks
        left = tl.load(h + rows[:, None] * stride_h + k[None, :], mask=some_rows & (k[None, :] < r), other=0.0)
        right = tl.load(b + columns[None, :] * stride_b + k[:, None], mask=some_columns & (k[:, None] < r), other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    here = some_rows & some_columns
    before = tl.load(y + rows[:, None] * stride_y + columns[None, :], mask=here, other=0.0).to(tl.float32)
    gain = tl.load(g + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    place = rows[:, None] * n + columns[None, :]
    if not WHOLE:
        result = before + gain * total
    elif BIAS:
        shift = tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        total += before
        result = gain * total + (1 - gain) * shift
    else:
        total += before
        result = gain * total
    tl.store(z + place, result.to(z.dtype.element_ty), mask=here)
    if KEEP:
        tl.store(inner + place, total.to(inner.dtype.element_ty), mask=here)


@triton.jit
def _gradients(dz, g, bias, inner, dy, partial, m, n, stride_dz,
               BIAS: tl.constexpr, OF_Y: tl.constexpr, OF_G: tl.constexpr,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    strip = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    some_columns = columns[None, :] < n
    gain = tl.load(g + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    shift = tl.zeros((1, COLUMNS), dtype=tl.float32)
    if BIAS:
        shift += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    for step in range(STEPS):
        rows = strip * (ROWS * STEPS) + step * ROWS + tl.arange(0, ROWS)
        here = (rows[:, None] < m) & some_columns
        d = tl.load(dz + rows[:, None] * stride_dz + columns[None, :], mask=here, other=0.0).to(tl.float32)
        place = rows[:, None] * n + columns[None, :]
        if OF_Y:
            tl.store(dy + place, (gain * d).to(dy.dtype.element_ty), mask=here)
        if OF_G:
            total += tl.sum(d * (tl.load(inner + place, mask=here, other=0.0).to(tl.float32) - shift), 0)
    if OF_G:
        tl.store(partial + strip * n + columns, total, mask=columns < n)


def _dense(t: Tensor) -> Tensor:
    """What a kernel reads row by row."""
    return t if t.stride(-1) == 1 and (t.shape[0] < 2 or t.stride(0) >= t.shape[1]) else t.contiguous()


@torch.library.custom_op("lorafactory::compose", mutates_args=())
def _forward(y: Tensor, h: Tensor, b: Tensor, g: Tensor, bias: Tensor | None, whole: bool,
             keep: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, h, b, g = _dense(y), _dense(h), _dense(b), g.contiguous()
    (m, n), r = y.shape, h.shape[1]
    z = y.new_empty(m, n)
    inner = y.new_empty((m, n) if keep else (0, n))
    if z.numel():
        _compose[(triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS))](
            y, g, h, b, y if bias is None else bias.contiguous(), z, inner, m, n, r, y.stride(0), h.stride(0), b.stride(0),
            WHOLE=whole, BIAS=bias is not None, KEEP=keep, WIDEN=interpreting(),
            ROWS=ROWS, COLUMNS=COLUMNS, RANKS=RANKS, STEPS=triton.cdiv(r, RANKS))  # fmt: skip
    return z, inner


@_forward.register_fake
def _(y: Tensor, h: Tensor, b: Tensor, g: Tensor, bias: Tensor | None, whole: bool, keep: bool) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape if keep else (0, y.shape[1]))


@torch.library.custom_op("lorafactory::compose_backward", mutates_args=())
def _backward(dz: Tensor, g: Tensor, bias: Tensor | None, inner: Tensor | None, of_y: bool) -> tuple[Tensor, Tensor]:
    dz, g = _dense(dz), g.contiguous()
    m, n = dz.shape
    dy = dz.new_empty((m, n) if of_y else (0, n))
    strips = triton.cdiv(m, STRIP)
    partial = g.new_empty(0 if inner is None else strips, n, dtype=torch.float32)
    if dz.numel():
        _gradients[(strips, triton.cdiv(n, COLUMNS))](
            dz, g, dz if bias is None else bias.contiguous(), dz if inner is None else inner.contiguous(),
            dy, partial, m, n, dz.stride(0), BIAS=bias is not None, OF_Y=of_y, OF_G=inner is not None,
            ROWS=ROWS, COLUMNS=COLUMNS, STEPS=STRIP // ROWS)  # fmt: skip
    return dy, partial.sum(0).to(g.dtype)


@_backward.register_fake
def _(dz: Tensor, g: Tensor, bias: Tensor | None, inner: Tensor | None, of_y: bool) -> tuple[Tensor, Tensor]:
    return dz.new_empty(dz.shape if of_y else (0, dz.shape[1])), g.new_empty(dz.shape[1])


def forward(y: Tensor, h: Tensor, b: Tensor, g: Tensor, bias: Tensor | None, whole: bool,
            keep: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As eager.forward."""
    z, inner = _forward(y, h, b, g, bias, whole, keep)
    return z, inner if keep else None


def backward(dz: Tensor, g: Tensor, bias: Tensor | None, inner: Tensor | None,
             of_y: bool) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As eager.backward."""
    dy, dg = _backward(dz, g, bias, inner, of_y)
    return (dy if of_y else None), (None if inner is None else dg)
