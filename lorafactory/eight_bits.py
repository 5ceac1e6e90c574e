"""An optimiser's moments in 8 bits: bitsandbytes' blockwise dynamic quantisation (Dettmers et al. 2021, arXiv 2110.02861)."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

BLOCK = 256  # entries that share a scale, as in bitsandbytes' own optimisers
SCALE = "_scale"  # of a moment's blocks, beside its codes


def require(what: str) -> None:
    """Raises UserError where bitsandbytes is not installed; what: the option that asks for it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs the package bitsandbytes: pip install bitsandbytes")


def pack(state: dict[str, Any], names: list[str]) -> None:
    """Codes in place of each named moment of a parameter's state, and a scale for each block of them."""
    from bitsandbytes.functional import quantize_blockwise

    for name in names:
        codes, about = quantize_blockwise(state[name].float(), code=_levels(name), blocksize=BLOCK)
        state |= {name: codes, name + SCALE: about.absmax}


def unpack(state: dict[str, Any], dtype: torch.dtype) -> None:
    """The moments that pack() took, as numbers again."""
    from bitsandbytes.functional import dequantize_blockwise

    for name in [n.removesuffix(SCALE) for n in state if n.endswith(SCALE)]:
        codes = state[name].to(torch.uint8)  # load_state_dict makes floats of them
        scale = state.pop(name + SCALE).float()
        state[name] = dequantize_blockwise(codes, absmax=scale, code=_levels(name), blocksize=BLOCK).to(dtype)


@cache
def _map(signed: bool) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed)


def _levels(name: str) -> Tensor:
    """The 256 shares of a block's largest entry that a code may stand for; Adam's second moment has no sign."""
    return _map(name != "exp_avg_sq")
