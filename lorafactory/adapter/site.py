"""Where an adapter goes: a frozen module seen as y = W x + bias with W [d_out, d_in], however it stores W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer that stores its weight as [d_in, d_out]. By name: transformers is not imported."""
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf")


def is_quantized(module: nn.Module) -> bool:
    """bitsandbytes' 4-bit linear layer: its weight is codes, [n, 1], and a state that decodes them. By name, too."""
    return any(c.__name__ == "Linear4bit" for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """A layer that computes W x + bias from its own numbers: not a subclass with another forward, nor a weight that is
    itself computed (weight norm)."""
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c) and "base_forward" not in vars(c))
    plain = owner is nn.Linear or (owner.__name__ == "Conv1D" and is_transposed(module)) or owner.__name__ == "Linear4bit"
    return plain and module._parameters.get("weight") is not None


def has_bias(module: nn.Module) -> bool:
    return isinstance(getattr(module, "bias", None), nn.Parameter)


def has_parameters(module: nn.Module) -> bool:
    """Whether the module itself, not a child of it, owns a parameter."""
    return any(p is not None for p in module._parameters.values())


def role(name: str) -> str:
    """A module's name, the numbers of blocks left out: `layer.*.query`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


class Base:
    """A view, not a copy, of a module: weight [d_out, d_in], bias [d_out] or None; calling it runs the module. A weight
    of 4 bits is decoded each time it is read."""

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def weight(self) -> Tensor:
        w: Any = self.module.weight
        if is_quantized(self.module):
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(w.data, w.quant_state)
        return w.T if is_transposed(self.module) else w

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        if is_quantized(self.module):
            return self.module.out_features, self.module.in_features  # type: ignore[return-value]
        return self.weight.shape[0], self.weight.shape[-1]

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias  # type: ignore[return-value]

    def __call__(self, *args, **kwargs) -> Tensor:
        run = getattr(self.module, "base_forward", self.module)  # an adapted module would run its delta again
        return run(*args, **kwargs)

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Overwrite the module's numbers in place, cast once; a bias is added where there was none."""
        self.weight.copy_(weight)
        if bias is None:
            return
        if self.bias is None:
            self.module.bias = nn.Parameter(bias.to(self.weight.dtype), requires_grad=False)
        else:
            self.bias.copy_(bias)


@dataclass(frozen=True, eq=False)
class Site:
    """One adapted module: its dotted name, its view, and its place (index of depth) among the sites of the model."""

    name: str
    base: Base
    index: int = 0
    depth: int = 1
    tied: bool = False  # shares a parameter with another module

    @property
    def key(self) -> str:
        """The name as a ModuleDict allows it."""
        return self.name.replace(".", "/")

    @property
    def sizes(self) -> str:
        """The shape, as a ModuleDict allows it: what layers that share a whole matrix have in common."""
        return f"{self.d_out}x{self.d_in}"

    @property
    def kind(self) -> str:
        """What the same module of every block has in common, as a ModuleDict allows it: role and shape."""
        return f"{role(self.name)}/{self.sizes}".replace(".", "/")

    def new(self, *shape: int, fill: float = 0.0) -> Tensor:
        """A tensor for the adapter: float32 or the base's wider dtype, on the layer's device."""
        like = next(p for p in self.base.module.parameters(recurse=False) if p is not None)
        dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
        return torch.full(shape, fill, dtype=dtype, device=like.device)

    @property
    def is_linear(self) -> bool:
        return is_linear(self.base.module)

    @property
    def d_in(self) -> int:
        return self.base.shape[1]

    @property
    def d_out(self) -> int:
        return self.base.shape[0]
