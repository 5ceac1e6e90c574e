"""Adapters in the folder layout of HF PEFT, which vLLM, diffusers and others read as well: written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Delta, Peft
from .adapter.delta import exact
from .adapter.peft import common
from .adapter.site import is_transposed
from .attach import Adapted
from .checkpoint import refuse_foreign, write_files
from .errors import UserError

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


@torch.no_grad()
def export_peft(adapted: Adapted, folder: str | Path) -> str:
    """Write the adapter for `PeftModel.from_pretrained(base, folder)`, as the method that PEFT itself has: same outputs,
    and PEFT can train it on. Returns PEFT's name of the method. Raises UserError, before anything is written, for what
    PEFT cannot express, and says what would do."""
    _ready(adapted, "export_peft", Path(folder))
    out = Peft()
    try:
        with exact():
            for part in adapted.adapter.all_parts():
                part.to_peft(out)
    except UserError as e:
        raise UserError(f"{adapted.variant}: {e}. {_instead(adapted)}") from None
    _write(adapted, out, Path(folder))
    return out.fields["peft_type"]


@torch.no_grad()
def export_lora(adapted: Adapted, folder: str | Path, rank: int | None = None) -> dict[str, float]:
    """Write the update, whatever trained it, as a plain LoRA in PEFT's layout.

    rank: None, only what is exactly low-rank; else the nearest update of that rank in the Frobenius norm (Eckart-Young),
    a layer, for whatever can be merged. Returns |update - written| / |update| a layer, 0.0 where it is exact. Raises
    UserError, before anything is written, for what a LoRA cannot express: other layers than linear ones, trained
    biases, outputs that depend on x in more than a linear way, no base to compare with."""
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}; it must be at least 1")
    _ready(adapted, "export_lora", Path(folder))
    out, errors = Peft({"peft_type": "LORA", "lora_dropout": 0.0}), {}
    if why := _no_lora(adapted):
        raise UserError(why)
    for s, delta in _deltas(adapted):
        with exact():
            (b, a), errors[s.name] = _pair(delta, s.base, rank, s.name, adapted.variant)
        if len(a):  # a budget may have left a layer without any rank
            out.pair(s.name, b, a)
    _write(adapted, out, Path(folder))
    return errors


def _ready(adapted: Adapted, what: str, folder: Path) -> None:
    if not adapted.mount.held or adapted.merged:
        raise UserError(f"{what}() reads the update beside its base: attach the adapter, unmerged")
    refuse_foreign(folder, CONFIG)


def _deltas(adapted: Adapted) -> list[tuple[Any, Any]]:
    deltas: dict[str, Any] = dict(adapted.adapter.deltas.items())
    return [(s, deltas[s.key]) for s in adapted.adapter.sites if s.key in deltas]


def _no_lora(adapted: Adapted) -> str:
    """Why no LoRA of any rank comes near, or nothing."""
    for s, delta in _deltas(adapted):
        if not s.is_linear:
            kind = f"{s.name}, a {type(s.base.module).__bases__[-1].__name__}"
            return f"{adapted.variant} changes {kind}: a LoRA changes linear layers only; bake() gives the merged model"
        if not adapted.adapter.mergeable:
            return f"{adapted.variant} depends on its input, so no LoRA equals it"
        if delta.shift(s.base) is not None:
            return f"{adapted.variant} changes the bias of {s.name}, which a LoRA cannot; see bake()"
    return "" if _deltas(adapted) else f"{adapted.variant} adapts no linear layer here: nothing to export"


def _instead(adapted: Adapted) -> str:
    """The formats that would do."""
    if not adapted.adapter.mergeable:
        return "It depends on its input, so only lorafactory.load reads it"
    if _no_lora(adapted):
        return "Format merged would do"
    if all(delta.factors() is not None for _, delta in _deltas(adapted)):
        return "Formats lora (exactly) and merged would do"
    return "Formats lora with --rank (the nearest) and merged would do"


def _pair(delta: Delta, base: Any, rank: int | None, name: str, variant: str) -> tuple[tuple[Tensor, Tensor], float]:
    """(B, A) and the relative error."""
    found = delta.factors()
    if found is not None and (rank is None or found[1].shape[0] <= rank):
        return found, 0.0
    if rank is None:
        raise UserError(f"the update of {name} by {variant} is not exactly low-rank: give rank= for the nearest that is")
    update = delta.weight(base).double() - base.weight.double()
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    root = s[:rank].sqrt()
    lost = float((s[rank:].norm() / s.norm()).nan_to_num())
    return ((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()), lost


def _write(adapted: Adapted, out: Peft, folder: Path) -> None:
    if not out.layers:
        raise UserError(f"{adapted.variant} has no rank in any layer here: nothing to export")
    heads = adapted.adapter.copies()
    names = {n for n, _ in adapted.model.named_modules()}
    for h in heads:
        if also := [n for n in names if n.endswith(h) and n != h]:
            raise UserError(f"PEFT finds trained modules by the ends of their names: {h} would be {also[0]}, too; see bake()")
    tensors = {f"{PREFIX}{n}.{key}": t for n, layer in out.layers.items() for key, t in layer.items()} | out.shared
    tensors |= {f"{PREFIX}{h}.{n}": t for h, m in heads.items() for n, t in m.state_dict().items()}
    plain = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    vague = any(m.endswith("." + n) for n in out.layers for m in names - {*out.layers})  # a list matches by suffix, too
    places = {
        "base_model_name_or_path": getattr(getattr(adapted.model, "config", None), "_name_or_path", None),
        "target_modules": "|".join(map(re.escape, out.layers)) if vague else list(out.layers),
        "modules_to_save": list(heads) or None,
        "inference_mode": True,
    }
    if any(is_transposed(s.base.module) for s in adapted.adapter.sites if s.name in out.layers):
        places["fan_in_fan_out"] = True  # PEFT puts it right for each layer, and says so where a model has both kinds
    write_files(folder, {TENSORS: plain}, {CONFIG: out.fields | _scales(out) | places})


def _scales(out: Peft) -> dict[str, Any]:
    """Rank and alpha, and the layers that differ."""
    if not out.alphas:
        return {}
    (rank, ranks), (alpha, alphas) = common({n: out.rank(n) for n in out.alphas}), common(out.alphas)
    return {"r": rank, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": alphas, "bias": "none"}
