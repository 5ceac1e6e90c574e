"""A folder that PEFT saved, read: every part says what it recognises, and what nobody recognises is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from . import registry
from .adapter import Part, Peft
from .adapter.peft import exactly, fit
from .attach import Adapted
from .checkpoint import read_json, read_tensors
from .errors import UserError
from .peft_folder import CONFIG, PREFIX, TENSORS

# fields that say where the adapter is, or nothing about its function
PLACES = {"base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode",
          "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
          "fan_in_fan_out"}  # fmt: skip
Heads = dict[str, dict[str, Tensor]]


@torch.no_grad()
def load_peft(model: nn.Module, folder: Path) -> Adapted:
    """Attach an adapter that PEFT saved. PEFT notes no fingerprint, so the base is the caller's word. Raises UserError,
    the model left as it was, for methods, fields and tensors that have no exact counterpart here."""
    about = read_json(folder / CONFIG)
    saved, heads = _sorted(model, about, read_tensors(folder / TENSORS))
    try:
        adapted = Adapted(model, _config(saved, about, heads), seed=0)
        try:
            _fill(adapted, saved, heads)
        except BaseException:
            adapted.detach()
            raise
    except UserError as e:
        raise UserError(f"{folder} cannot be read: {e}") from None
    adapted.adapter.started = True
    return adapted


def _fill(adapted: Adapted, saved: Peft, heads: Heads) -> None:
    for part in adapted.adapter.all_parts():
        part.fill(saved)
    for name, module in adapted.adapter.copies().items():
        mine, theirs = module.state_dict(), heads[name]
        if mine.keys() != theirs.keys():
            raise UserError(f"{name} has {', '.join(theirs)} there and {', '.join(mine)} in this model")
        for n, t in theirs.items():
            fit(f"{name}.{n}", t, mine[n])
    left = [f"{n}.{k}" for n, layer in saved.layers.items() for k in layer] + [*saved.shared]
    if left:
        raise UserError(f"{left[0]} has no place in {adapted.variant}")


def _sorted(model: nn.Module, about: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Peft, Heads]:
    """The tensors by layer, and those of modules trained whole."""
    saved = Peft({k: v for k, v in about.items() if k not in PLACES})
    heads: Heads = {}
    modules = dict(model.named_modules())
    for key, t in tensors.items():
        if not key.startswith(PREFIX):
            saved.shared[key] = t
            continue
        path = key.removeprefix(PREFIX).split(".")
        cut = next((i for i in range(len(path) - 1, 0, -1) if ".".join(path[:i]) in modules), 1)
        owner, name = ".".join(path[:cut]), ".".join(path[cut:])
        parents = [".".join(path[:i]) for i in range(1, cut + 1)]
        head = next((p for p in parents if p.endswith(tuple(about.get("modules_to_save") or ()))), None)
        if head is not None and owner in modules and name in modules[owner].state_dict():
            heads.setdefault(head, {})[".".join(path)[len(head) + 1 :]] = t
        else:
            saved.layers.setdefault(owner, {})[name] = t
    return saved, heads


def _config(saved: Peft, about: dict[str, Any], heads: Heads) -> Any:
    """The composite whose parts recognise all that PEFT says."""
    chosen: dict[str, Any] = {}
    try:
        for cls in (registry.get(n) for axis in reversed(registry.AXES) for n in registry.names(axis)):
            if (options := cls.from_peft(saved)) is not None:
                chosen[cls.name] = (cls, options)
    except KeyError as e:
        raise UserError(f"{CONFIG} lacks {e}") from None
    structure = [options for cls, options in chosen.values() if cls.axis == "structure"]
    if not structure:
        able = [n for n in registry.names() if registry.get(n).from_peft.__func__ is not Part.from_peft.__func__]  # type: ignore[attr-defined]
        raise UserError(f"it is an adapter of type {about.get('peft_type')}; what is read: {', '.join(able)}")
    if odd := {k: v for k, v in saved.fields.items() if v and v != "none"}:
        name = next(iter(odd))
        raise UserError(f"{name}={odd[name]} has no counterpart in {'+'.join(chosen)}")
    axes = {cls.axis: options for cls, options in chosen.values() if cls.axis != "structure"}
    where = {"target_modules": [exactly(n) for n in saved.layers], "trained_modules": [exactly(h) for h in sorted(heads)]}
    return registry.config("+".join(chosen), **structure[0], **axes, **where)

