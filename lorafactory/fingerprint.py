"""Fingerprints: whether two sets of tensors are the same numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
import torch.nn as nn
from torch import Tensor


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in name order; 16 hex digits."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {list(t.shape)};".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


def of_model(model: nn.Module, skip: Iterable[str] = ()) -> str:
    """Of a model's state dict, the modules in `skip` (task heads, which an adapter saves whole) left out."""
    left_out = tuple(s + "." for s in skip)
    return of_tensors({n: t for n, t in model.state_dict().items() if not n.startswith(left_out)})
