"""Which implementation of an op runs: its definition, its fast form in PyTorch, or its Triton twin.

One choice a process. `auto` takes the twin on a CUDA device where the shape is worth it, else the fast form."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from ..errors import UserError

CHOICES = ("auto", "reference", "eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the twins take
_wanted = "auto"
_used: dict[str, set[str]] = {}


def choose(name: str) -> None:
    """For all ops from now on. Raises UserError for what cannot run in this process."""
    global _wanted
    if name not in CHOICES:
        raise UserError(f"kernels is {name!r}; it takes {', '.join(CHOICES)}")
    if name == "triton" and (why := _hindrance()):
        raise UserError(f"kernels=triton cannot run: {why}; kernels=auto takes what can")
    _wanted = name


def _hindrance() -> str:
    if not installed():
        return "Triton is not installed (pip install triton)"
    if not (interpreting() or torch.cuda.is_available()):
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return ""


@cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def pick(op: str, *tensors: Tensor, twin: bool, worth: bool = True) -> str:
    """What runs for these tensors, which is noted. twin: the op has one; worth: it pays at this shape."""
    found = _wanted if _wanted in ("reference", "eager") else "triton" if twin and _fits(worth, *tensors) else "eager"
    if not torch.compiler.is_compiling():
        _used.setdefault(op, set()).add(found)
    return found


def _fits(worth: bool, *tensors: Tensor) -> bool:
    on_gpu = all(t.is_cuda for t in tensors)
    takes = all(t.dtype in DTYPES for t in tensors)
    if _wanted == "triton":
        if not takes:
            found = next(t.dtype for t in tensors if t.dtype not in DTYPES)
            raise UserError(f"kernels=triton takes float32, bfloat16 and float16, not {str(found).removeprefix('torch.')}")
        if not (on_gpu or interpreting()):
            raise UserError("kernels=triton takes tensors on a CUDA device; these are on the CPU")
        return True
    return worth and on_gpu and takes and installed()


def used() -> dict[str, list[str]]:
    """What ran since forget(), by op; a compiled graph is not seen."""
    return {op: sorted(found) for op, found in sorted(_used.items())}


def forget() -> None:
    _used.clear()
