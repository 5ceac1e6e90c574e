"""How a delta comes to be called: the adapted layer's class is swapped for a subclass that asks for its delta.

Names in the base's state dict stay as they were, isinstance still holds, and release swaps the class back; so pickle,
deepcopy, DDP, FSDP2, gradient checkpointing and dynamo see an ordinary module."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .adapter import Base, Delta
from .errors import UserError

_classes: dict[type, type] = {}


@dataclass(eq=False)
class Held:
    """What an adapted layer knows: its delta, and whether it is the delta or the layer itself that runs."""

    delta: Delta
    base: Base
    on: bool = True
    kept: dict[str, Tensor] | None = None  # what merging overwrote, while it is merged
    parked: set[str] = field(default_factory=set)  # parameters that wait in a file


class Holder:
    """Mixin before a layer's own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        held = self.__dict__["_held"]
        if held.on:
            return held.delta(*args, base=held.base, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (type(self).__mro__[2],), self.__dict__  # the swapped class exists in this process only


def _rebuilt(original: type) -> Any:
    return object.__new__(adapted_class(original))


def adapted_class(original: type) -> type:
    if original not in _classes:
        _classes[original] = type(f"Adapted{original.__name__}", (Holder, original), {})
    return _classes[original]


def held(module: nn.Module) -> Held:
    return module.__dict__["_held"]


def hold(module: nn.Module, delta: Delta) -> None:
    """From now on calling the module calls the delta. Raises UserError where nothing would call it."""
    if "forward" in module.__dict__:
        raise UserError(
            f"the forward of this {type(module).__name__} was replaced (by accelerate's device_map hooks?), "
            "so no adapter would run: load the model without them"
        )
    module.__dict__["_held"] = Held(delta, Base(module))
    module.__class__ = adapted_class(type(module))
    switch(module, True)


def release(module: nn.Module) -> None:
    """The module as it was before hold()."""
    switch(module, False)
    module.__class__ = type(module).__mro__[2]
    del module.__dict__["_held"]


def switch(module: nn.Module, on: bool) -> None:
    """on: the delta runs; off: the layer itself."""
    h = held(module)
    h.on = on
    if on and h.delta.replaces:
        _park(module, h)
    elif not on:
        _unpark(module, h)


@torch.no_grad()
def merge(modules: Iterable[nn.Module]) -> None:
    """The modules' numbers become the effective ones; the old ones are kept for unmerge."""
    all_held = [(m, held(m)) for m in modules]
    for m, h in all_held:  # before anything is written: some may share a parameter
        switch(m, False)
        h.kept = h.delta.keep(h.base)
    for _, h in all_held:
        h.delta.write(h.base)


@torch.no_grad()
def unmerge(module: nn.Module) -> None:
    """The module's own numbers, bit for bit."""
    h = held(module)
    kept, h.kept = h.kept or {}, None
    h.delta.restore(h.base, kept)
    switch(module, True)


# Torch's own encoder reads its layers' numbers in evaluation instead of calling them: an adapter would have no effect.

Shortcuts = list[tuple[nn.Module, str, Any]]
_ALLOW = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))


def shortcuts(model: nn.Module) -> Shortcuts:
    """The attributes that allow it, and their values."""
    return [(m, name, getattr(m, name)) for m in model.modules() for cls, name in _ALLOW if isinstance(m, cls)]


def allow(found: Shortcuts, allowed: bool) -> None:
    for m, name, value in found:
        setattr(m, name, value if allowed else type(value)(0))


# A delta that replaces a layer leaves its numbers unread: they wait in an unlinked file, mapped and not loaded, so that
# full fine-tuning costs the memory of full fine-tuning and the base stays read-only all the same.


@torch.no_grad()
def _park(module: nn.Module, h: Held) -> None:
    for name, p in module.named_parameters():
        if p.numel() and p.device.type != "meta" and name not in h.parked:
            p.data = _mapped(p.data)
            h.parked.add(name)


@torch.no_grad()
def _unpark(module: nn.Module, h: Held) -> None:
    for name in h.parked:
        p = module.get_parameter(name)
        device = next(h.delta.parameters(), p).device  # the model may have moved meanwhile
        p.data = torch.empty_like(p.data, device=device).copy_(p.data)
    h.parked = set()


def _mapped(t: Tensor) -> Tensor:
    flat = t.detach().cpu().contiguous().reshape(-1)
    try:
        file, path = tempfile.mkstemp(prefix="lorafactory-")
        try:
            with os.fdopen(file, "wb") as f:
                f.write(flat.view(torch.uint8).numpy().data)
            return torch.from_file(path, shared=False, size=flat.numel(), dtype=t.dtype).view(t.shape)
        finally:
            os.unlink(path)
    except OSError as e:
        told = f"the base's weights cannot wait in a file ({e.strerror}): set TMPDIR to a folder with room"
        raise UserError(told) from e
