"""Plain LoRA in the folder layout of HF PEFT, which vLLM, diffusers and others read as well: written and read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from . import holder, registry
from .adapter import Delta
from .adapter.delta import exact
from .adapter.site import is_transposed
from .attach import Adapted
from .checkpoint import read_json, read_tensors, refuse_foreign, write_files
from .errors import UserError

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


@torch.no_grad()
def export_lora(adapted: Adapted, folder: str | Path, rank: int | None = None) -> dict[str, float]:
    """Write adapter_config.json and adapter_model.safetensors for `PeftModel.from_pretrained(base, folder)`.

    rank: None, only what is exactly low-rank; else the nearest update of that rank in the Frobenius norm (Eckart-Young),
    a layer, for whatever can be merged. Returns |update - written| / |update| a layer, 0.0 where it is exact. Raises
    UserError, before anything is written, for what a LoRA cannot express: other layers than linear ones, trained
    biases, outputs that depend on x in more than a linear way, no base to compare with."""
    if not adapted.mount.held or adapted.merged:
        raise UserError("export_lora() reads the update beside its base: attach the adapter, unmerged")
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}; it must be at least 1")
    refuse_foreign(Path(folder), CONFIG)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, float] = {}
    transposed = set()
    deltas: dict[str, Any] = dict(adapted.adapter.deltas.items())
    for s in adapted.adapter.sites:
        if (delta := deltas.get(s.key)) is None:
            continue
        base = holder.held(s.base.module).base
        if not s.is_linear:
            raise UserError(f"{adapted.variant} changes {s.name}, a {type(s.base.module).__bases__[-1].__name__}: "
                            "a LoRA changes linear layers only; bake() gives the merged model")  # fmt: skip
        if not adapted.adapter.mergeable:
            raise UserError(f"{adapted.variant} depends on its input, so no LoRA equals it")
        if delta.shift(base) is not None:
            raise UserError(f"{adapted.variant} changes the bias of {s.name}, which a LoRA cannot; see bake()")
        with exact():
            pairs[s.name], errors[s.name] = _pair(delta, base, rank, s.name, adapted.variant)
        transposed.add(is_transposed(s.base.module))
    pairs = {n: p for n, p in pairs.items() if p[1].shape[0]}  # a budget may have left a layer without any rank
    if not pairs:
        raise UserError(f"{adapted.variant} adapts no linear layer here: nothing to export")
    if len(transposed) > 1:
        raise UserError("some layers are Conv1D and some Linear: one PEFT config cannot hold both")
    tensors = {f"{PREFIX}{n}.lora_{w}.weight": t for n, (b, a) in pairs.items() for w, t in (("A", a), ("B", b))}
    heads: dict[str, Any] = {k.replace("/", "."): copy.module for k, copy in adapted.adapter.trained.items()}
    tensors |= {f"{PREFIX}{h}.{n}": t for h, m in heads.items() for n, t in m.state_dict().items()}
    plain = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    config = _config(adapted, {n: a.shape[0] for n, (_, a) in pairs.items()}, list(heads), transposed.pop())
    write_files(Path(folder), {TENSORS: plain}, {CONFIG: config})
    return errors


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


def _config(adapted: Adapted, ranks: dict[str, int], heads: list[str], transposed: bool) -> dict[str, Any]:
    """alpha equals the rank everywhere: PEFT's scale alpha / rank is 1, ours is inside B."""
    r = max(ranks.values())
    others = {f"^{re.escape(n)}$": k for n, k in ranks.items() if k != r}
    names = {n for n, _ in adapted.model.named_modules()} - {*ranks}
    vague = [n for n in ranks if any(m.endswith("." + n) for m in names)]  # a list matches by suffix, too
    config = getattr(adapted.model, "config", None)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(config, "_name_or_path", None),
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": "|".join(map(re.escape, ranks)) if vague else list(ranks),
        "modules_to_save": heads or None,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


@torch.no_grad()
def load_lora(model: nn.Module, folder: Path) -> Adapted:
    """Attach a LoRA that PEFT saved. PEFT notes no fingerprint, so the base is the caller's word. Raises UserError for
    other methods, and for tensors that a plain LoRA does not have."""
    about, tensors = read_json(folder / CONFIG), read_tensors(folder / TENSORS)
    if about.get("peft_type") != "LORA":
        raise UserError(f"{folder} is a PEFT adapter of type {about.get('peft_type')}; only LORA is read")
    pairs: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, t in tensors.items():
        name = key.removeprefix(PREFIX)
        if found := re.fullmatch(r"(.+)\.lora_(A|B)\.weight", name):
            pairs.setdefault(found[1], {})[found[2]] = t
        elif about.get("modules_to_save") and "lora_" not in name:
            owner, _, own = name.rpartition(".")
            heads.setdefault(owner, {})[own] = t
        else:
            strange.append(name)
    known = {n for n, _ in model.named_modules()}
    strange += [n for n in (*pairs, *heads) if n not in known]
    if strange or not pairs or any(len(p) != 2 for p in pairs.values()):
        what = f"{strange[0]} has no place in a plain LoRA on this model" if strange else "it lacks an A or a B"
        raise UserError(f"{folder} cannot be read: {what} (use_dora={about.get('use_dora', False)})")
    ranks = {_exactly(n): p["A"].shape[0] for n, p in pairs.items()}
    config = registry.config(
        about["peft_type"].lower(),
        rank=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern={_exactly(n): _scale(about, n, p["A"].shape[0]) * p["A"].shape[0] for n, p in pairs.items()},
        target_modules=list(ranks),
        trained_modules=[_exactly(h) for h in sorted(heads)],
    )
    adapted = Adapted(model, config, seed=0)
    try:
        for site, low in adapted.adapter.low_ranks():
            _fill({"A": low.A, "B": low.B}, pairs[site.name], site.name, folder)
        trained: dict[str, Any] = dict(adapted.adapter.trained.items())
        for key, copy in trained.items():
            head = key.replace("/", ".")
            _fill(copy.module.state_dict(), heads[head], head, folder)
    except BaseException:
        adapted.detach()
        raise
    adapted.adapter.started = True
    return adapted


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _scale(about: dict[str, Any], name: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) under use_rslora; by PEFT's own rule of patterns."""
    pattern = about.get("alpha_pattern") or {}
    key = next((k for k in pattern if re.match(rf"(.*\.)?({k})$", name)), None)
    alpha = about["lora_alpha"] if key is None else pattern[key]
    return float(alpha) / (rank**0.5 if about.get("use_rslora") else rank)


def _fill(mine: dict[str, Tensor], theirs: dict[str, Tensor], name: str, folder: Path) -> None:
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in theirs.items()}:
        shapes = {n: list(t.shape) for n, t in theirs.items()}, {n: list(t.shape) for n, t in mine.items()}
        raise UserError(f"{folder}: {name} is {shapes[0]} there and {shapes[1]} in this model")
    for n, t in theirs.items():
        mine[n].copy_(t)
