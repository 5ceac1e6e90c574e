"""sampled: a few entries of a product of two tall matrices, a sparse weight's gradient at its places."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from .choice import pick

WORTH = 0.1  # the share of entries up to which a processor has them sooner one by one; measured at 384 to 2048


def sampled(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(g^T x)[rows, columns], [n], in their dtype; g [positions, d_out] and x [positions, d_in], no place twice."""
    few = len(rows) <= WORTH * g.shape[1] * x.shape[1] and g.dtype in (torch.float32, torch.float64) and g.dtype == x.dtype
    if pick("sampled", g, x, twin=False) == "reference" or not (few and len(g) and g.device.type == "cpu" and _able()):
        return (g.T @ x)[rows, columns]
    order = None
    flat = rows.long() * x.shape[1] + columns
    if not (flat[1:] > flat[:-1]).all():
        flat, order = flat.sort()
        rows, columns = rows[order], columns[order]
    ends = torch.arange(g.shape[1] + 1, dtype=rows.dtype)
    starts = torch.searchsorted(rows.contiguous(), ends, out_int32=rows.dtype == torch.int32)
    found = _matrix(starts, columns, g.new_zeros(len(rows)), (g.shape[1], x.shape[1]))
    values = torch.sparse.sampled_addmm(found, g.T, x, beta=0.0).values()
    return values if order is None else torch.empty_like(values).index_put_((order,), values)


def _matrix(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns.contiguous(), values, size, check_invariants=False)


@cache
def _able() -> bool:
    """Whether this torch samples on its processor. Its first sparse matrix warns, once a process, that they are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            one = _matrix(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), (1, 1))
            torch.sparse.sampled_addmm(one, torch.ones(1, 1), torch.ones(1, 1), beta=0.0)
        except RuntimeError:
            return False
    return True
