"""How far a kernel may be from its definition in float64, and which implementations this process can run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafactory.kernels.choice import installed, interpreting

KINDS = ["reference", "eager"] + (["triton"] if installed() and interpreting() else [])
PLACES = [pytest.param(("cpu", kind), id=kind) for kind in KINDS]
PLACES += [pytest.param(("cuda", kind), id=f"cuda-{kind}", marks=pytest.mark.gpu) for kind in ("reference", "eager", "triton")]
# of the norm of all entries. Stored in bf16 a result is rounded by 1.7e-3; Triton's interpreter cuts digits off instead,
# which is up to CUT of each entry, uniformly: CUT / sqrt(3) = 4.5e-3
CUT = 2**-7
STORED = {torch.float32: 3e-6, torch.bfloat16: 5e-3 if interpreting() else 2.2e-3, torch.float16: 3e-4}
# a factor and the result are rounded to such a dtype: twice half a step
MULTIPLIED = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(1, 512, 8), (7, 200, 5), (64, 256, 16), (100, 130, 24), (128, 384, 33), (40, 31, 1), (70, 140, 257), (20, 30, 0)]


def near(found: Tensor, exact: Tensor, tolerance: float) -> bool:
    """By norm, and no entry off by four times as much of itself and the typical entry."""
    assert found.shape == exact.shape
    found, exact = found.double().cpu(), exact.double().cpu()
    if not found.numel():
        return True
    off, typical = (found - exact).abs(), exact.square().mean().sqrt()
    whole = float((found - exact).norm()) <= tolerance * float(exact.norm()) + 1e-12
    return whole and bool((off <= 4 * tolerance * (exact.abs() + typical) + 1e-12).all())
