"""Peft: an adapter in the words of HF PEFT. Parts write themselves in them, and recognise themselves."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from ..errors import UserError
from .site import is_transposed

A, B = "lora_A.weight", "lora_B.weight"  # the plain pair's names in a layer of PEFT's
V = TypeVar("V")


@dataclass
class Peft:
    """fields: what adapter_config.json says of the function, not of where it is; layers: {layer: {name in PEFT's layer:
    tensor}}; alphas: {layer: alpha} where PEFT scales a pair by alpha / rank; shared: tensors of no layer.

    Writing fills them; reading takes out of them, and what nobody took is refused."""

    fields: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)

    # writing

    def pair(self, layer: str, b: Tensor, a: Tensor, scale: float = 1.0) -> None:
        """The update scale * B A; B [d_out, rank], A [rank, d_in]. Where a budget left no rank it is one of zeros."""
        if not a.shape[0]:
            b, a = b.new_zeros(b.shape[0], 1), a.new_zeros(1, a.shape[1])
        self.layers[layer], self.alphas[layer] = {A: a, B: b}, scale * a.shape[0]

    def rank(self, layer: str) -> int:
        return len(self.layers[layer][A])

    # reading

    def drop(self, *names: str) -> None:
        """Fields that change nothing here."""
        for name in names:
            self.fields.pop(name, None)

    def of_layer(self, name: str, pattern: str, layer: str) -> Any:
        """A field's value for one layer, by PEFT's own rule of patterns."""
        table = self.fields.get(pattern) or {}
        key = next((k for k in table if re.match(rf"(.*\.)?({k})$", layer)), None)
        return self.fields[name] if key is None else table[key]

    def take(self, layer: str, name: str, mine: Tensor) -> None:
        """Copy a layer's tensor into mine. Raises UserError where it is missing or has another shape."""
        theirs = self.layers[layer].pop(name, None)
        if theirs is None:
            raise UserError(f"{layer} has no {name}")
        fit(f"{layer}.{name}", theirs, mine)


def fit(name: str, theirs: Tensor, mine: Tensor) -> None:
    if theirs.shape != mine.shape:
        raise UserError(f"{name} is {list(theirs.shape)} there and {list(mine.shape)} in this model")
    mine.copy_(theirs)


def exactly(name: str) -> str:
    """The regular expression for one name, in PEFT's patterns and in ours."""
    return f"^{re.escape(name)}$"


def common(values: dict[str, V]) -> tuple[V, dict[str, V]]:
    """Layer -> value as one default and a pattern table for the layers that differ."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {exactly(n): v for n, v in values.items() if v != most}


def only_linear(name: str, sites: Any) -> None:
    """Raises UserError where a layer is none that PEFT has this method for."""
    for s in sites:
        if is_transposed(s.base.module):
            raise UserError(f"PEFT has {name} for nn.Linear alone, and {s.name} is a Conv1D")
