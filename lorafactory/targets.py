"""Which modules of a model an adapter goes to: names, suffixes, regular expressions, `all-linear`, `all`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn as nn

from .adapter import Base, Site
from .adapter.site import has_parameters, is_linear
from .errors import UserError
from .registry import nearest

log = logging.getLogger(__name__)
WORDS = ("all-linear", "all")
_REGEX = re.compile(r"[\\^$*+?{}\[\]|()]")


def matches(entry: str, name: str) -> bool:
    """An entry is a full name, a dotted suffix, or a regular expression for the full name."""
    if not _REGEX.search(entry):
        return name == entry or name.endswith("." + entry)
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as e:
        raise UserError(f"{entry!r} is no regular expression: {e}") from None


def base_name(model: nn.Module) -> str:
    """Where a transformers model keeps its base model; "": nowhere. CLIP's classifier names a whole that it is only a
    part of: there it is the one child that is a transformers model itself."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or hasattr(model, prefix):
        return prefix
    inner = [n for n, m in model.named_children() if hasattr(m, "base_model_prefix")]
    return inner[0] if len(inner) == 1 else ""


def head_modules(model: nn.Module) -> list[str]:
    """The task head of a transformers model: what lies beside its base model and does not hold the output embedding."""
    prefix, output = base_name(model), _output(model)
    if not prefix:
        return []
    beside = [(n, m) for n, m in model.named_children() if n != prefix and all(x is not output for x in m.modules())]
    return [n for n, m in beside if any(True for _ in m.parameters())]


def trained_modules(model: nn.Module, entries: list[str] | None) -> dict[str, nn.Module]:
    """The modules to train whole, the outermost of those that match; None: the task head. Raises UserError for an entry
    that matches nothing, or what has no parameters."""
    found: dict[str, nn.Module] = {}
    for entry in head_modules(model) if entries is None else entries:
        named = {n: m for n, m in model.named_modules() if n and matches(entry, n)}
        if not named:
            last = {n.rpartition(".")[2] for n, _ in model.named_modules() if n}
            raise UserError(f"trained_modules entry {entry!r} matches no module; {nearest(entry, last)}")
        if idle := [n for n, m in named.items() if next(m.parameters(), None) is None]:
            raise UserError(f"trained_modules entry {entry!r} matches {idle[0]}, which has no parameters")
        found |= named
    return {n: m for n, m in found.items() if not inside(n.rpartition(".")[0], found)}


def _output(model: Any) -> nn.Module | None:
    """The output embedding of a transformers model that has one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in parents)


def tied(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Modules that share a parameter with another one -> the names of all that share it."""
    owners: dict[int, list[str]] = {}
    for name, m in model.named_modules():
        for p in m._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(name)
    return {model.get_submodule(n): names for names in owners.values() if len(names) > 1 for n in names}


def _unreachable(model: nn.Module) -> dict[nn.Module, str]:
    """Linear layers whose forward is never called: their owner reads the weight itself."""
    owners = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    return {m.out_proj: "nn.MultiheadAttention reads its weight without calling it" for m in owners}


def _shares(name: str, names: list[str]) -> str:
    return next((f"it shares its weight with {o}" for o in names if o != name), "")


class Found:
    """sites: the modules to adapt, in model order. entries: target -> names it matched."""

    def __init__(self, sites: list[Site], entries: dict[str, list[str]]):
        self.sites, self.entries = sites, entries


def find(
    model: nn.Module, wanted: list[str], heads: list[str], fits: Callable[[nn.Module], bool], ties: bool = False
) -> Found:
    """Sites for the entries of target_modules; ties: modules that share a parameter are adapted as one. Raises UserError
    for an entry that matches nothing that fits, or a module that cannot be adapted; warns where an entry is found in
    only some of the blocks."""
    modules = {n: m for n, m in model.named_modules() if n and not inside(n, heads)}
    able = {n: m for n, m in modules.items() if fits(m)}
    shared, unreachable = tied(model), _unreachable(model)
    output = _output(model)
    entries: dict[str, list[str]] = {}
    for entry in wanted:
        if entry == "all" and fits(model):
            raise UserError("target 'all': the model itself owns parameters, outside any layer; wrap it in a module")
        if entry in WORDS:
            names = [n for n, m in able.items() if m not in unreachable and (ties or m not in shared)]
            if entry == "all-linear":
                names = [n for n in names if is_linear(able[n]) and able[n] not in shared and able[n] is not output]
        else:
            names = [n for n in able if matches(entry, n)]
            if names and not _REGEX.search(entry):
                _refuse_unfit(entry, modules, able)
            for n in names:
                if why := unreachable.get(able[n]) or (not ties and _shares(n, shared.get(able[n], []))):
                    raise UserError(f"target {entry!r} matches {n}, which cannot be adapted: {why}")
        if not names:
            _nothing(model, entry, modules, able, heads)
        entries[entry] = names
        _coverage(entry, names, modules)
    chosen = {n for names in entries.values() for n in names}
    for names in shared.values():
        some = [n for n in names if n in chosen or inside(n, heads)]
        if some and len(some) < len(names):
            raise UserError(f"{some[0]} cannot be trained alone, {_shares(some[0], names)}: leave it out, or add that")
    outermost = [n for n in able if n in chosen and not inside(n.rpartition(".")[0], chosen)]
    sites = [Site(n, Base(able[n]), i, len(outermost), able[n] in shared) for i, n in enumerate(outermost)]
    return Found(sites, entries)


def _nothing(model: nn.Module, entry: str, modules: dict, able: dict, heads: list[str]) -> None:
    in_heads = [n for n, _ in model.named_modules() if inside(n, heads) and matches(entry, n)] if entry not in WORDS else []
    if in_heads:
        raise UserError(f"target {entry!r} matches only {in_heads[0]}, which belongs to the head and is trained whole")
    if entry not in WORDS and (unfit := [n for n in modules if matches(entry, n)]):
        raise _unfit(entry, unfit[0], modules)
    last = {n.rpartition(".")[2] for n in able}
    raise UserError(f"target {entry!r} matches no module; {nearest(entry, last) if last else 'nothing here can be adapted'}")


def _refuse_unfit(entry: str, modules: dict[str, nn.Module], able: dict[str, nn.Module]) -> None:
    """B04: a name means all that bear it; a convolution among linear layers is not passed over."""
    for n, m in modules.items():
        if n not in able and has_parameters(m) and matches(entry, n):
            raise _unfit(entry, n, modules)


def _unfit(entry: str, name: str, modules: dict[str, nn.Module]) -> UserError:
    return UserError(f"target {entry!r} matches {name}, a {type(modules[name]).__name__} that this variant cannot adapt")


def _coverage(entry: str, names: list[str], modules: dict[str, nn.Module]) -> None:
    """B08: a projection that is missing in some blocks is said, not passed over."""
    blocks = {n: len(m) for n, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential)}
    for stack, count in blocks.items():
        tails = Counter(n[len(stack) + 1 :].partition(".")[2] for n in names if n.startswith(stack + "."))
        for tail, seen in tails.items():
            if tail and seen < count and (entry not in WORDS and not _REGEX.search(entry)):
                log.warning("target %r: %s.*.%s exists in %d of %d blocks", entry, stack, tail, seen, count)


def per_site(table: dict[str, Any], sites: list[Site], what: str) -> dict[str, Any]:
    """A pattern table (rank_pattern, alpha_pattern) resolved on its own: site name -> value.

    Raises UserError for an entry that matches no site, or two that match one."""
    found: dict[str, tuple[str, Any]] = {}
    for entry, value in table.items():
        names = [s.name for s in sites if matches(entry, s.name)]
        if not names:
            raise UserError(f"{what} entry {entry!r} matches no adapted layer")
        for n in names:
            if n in found:
                raise UserError(f"{what} entries {found[n][0]!r} and {entry!r} both match {n}: make one narrower")
            found[n] = (entry, value)
    return {n: v for n, (_, v) in found.items()}
