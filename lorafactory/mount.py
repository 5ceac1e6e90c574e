"""Everything that attach changes in a base model, and the way back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn as nn

from . import holder
from .adapter import Delta
from .adapter.site import is_quantized
from .errors import UserError


class Mount:
    """Deltas on the modules of a frozen base model. While `on`, they run; while `merged`, their effect stands in the
    model's own weights; release() gives the model back bit for bit, with its modes and what required gradients."""

    def __init__(self, model: nn.Module, held: list[tuple[nn.Module, Delta]]):
        self.model, self.held, self.merged = model, held, False
        self._trained = [n for n, p in model.named_parameters() if p.requires_grad]
        self._modes = {m: m.training for m in model.modules()}
        self._dtypes: dict[str, torch.dtype] = {}
        self._shortcuts = holder.shortcuts(model)
        model.requires_grad_(False)
        try:
            for module, delta in held:
                holder.hold(module, delta)
        except BaseException:
            self.release()
            raise
        holder.allow(self._shortcuts, False)

    @property
    def on(self) -> bool:
        return all(holder.held(m).on for m, _ in self.held)

    def switch(self, on: bool) -> None:
        for m, _ in self.held:
            holder.switch(m, on)
        holder.allow(self._shortcuts, not on)

    def merge(self, dtype: torch.dtype | None, limit: float) -> dict[str, float]:
        """The share of each layer's update that the cast to its weights loses. Raises UserError above limit, before
        anything is written."""
        self._refuse_shards("merge into")
        if coded := [n for n, m, _ in self._named() if is_quantized(m)]:
            raise UserError(f"cannot merge into {coded[0]}, a weight of 4 bits: the adapter stays beside it")
        self._convert(dtype)
        errors = {n: d.error(holder.held(m).base) for n, m, d in self._named()}
        if over := {n: e for n, e in errors.items() if not e <= limit}:
            self._convert(None)
            worst = max(over, key=lambda n: over[n])
            raise UserError(
                f"merging loses {over[worst]:.0%} of the update of {worst} to rounding (limit {limit:.0%}): "
                "merge(dtype=torch.float32), or raise limit"
            )
        holder.merge(m for m, _ in self.held)
        holder.allow(self._shortcuts, True)
        self.merged = True
        return errors

    def unmerge(self) -> None:
        for m, _ in self.held:
            holder.unmerge(m)
        holder.allow(self._shortcuts, False)
        self._convert(None)
        self.merged = False

    def release(self) -> nn.Module:
        """The base model; what is merged stays in it."""
        self._refuse_shards("detach from")
        for m, _ in self.held:
            if "_held" in m.__dict__:  # else hold() did not get so far
                holder.release(m)
        self.held = []
        holder.allow(self._shortcuts, True)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in self._trained)
        for m, mode in self._modes.items():
            m.training = mode
        return self.model

    def _refuse_shards(self, what: str) -> None:
        if type(self.model).__name__.startswith("FSDP"):  # by name: torch's FSDP2 is imported only where it is used
            raise UserError(f"cannot {what} a base that is sharded over processes: save() the adapter, load it in one process")

    def _named(self) -> Iterator[tuple[str, nn.Module, Delta]]:
        names = {m: n for n, m in self.model.named_modules()}
        return ((names[m], m, d) for m, d in self.held)

    @torch.no_grad()
    def _convert(self, dtype: torch.dtype | None) -> None:
        """Every floating tensor to dtype, remembering what it was; None: back (widening loses nothing)."""
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        tensors = {n: t for n, t in named if t.is_floating_point()}
        for name, t in tensors.items():
            if dtype is not None and torch.promote_types(dtype, t.dtype) != dtype:
                raise UserError(f"merge(dtype={dtype}) would narrow {name} from {t.dtype}: use a wider dtype")
        for name, t in tensors.items():
            new = self._dtypes.pop(name, t.dtype) if dtype is None else dtype
            if new != t.dtype:
                if dtype is not None:
                    self._dtypes[name] = t.dtype
                t.data = t.data.to(new)
