"""Adapter: the deltas of all sites, the trained heads and the parts; everything that is trained and saved."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import kernels, registry
from ..errors import UserError
from .delta import Copy, Delta, exact
from .elastic import Elastic
from .low_rank import LowRank
from .part import Part, Posterior, Stage, Step, Structure
from .site import Site

WRITING = ("begin", "end", "before_step", "after_step")  # hooks that may change numbers


class Adapter(nn.Module):
    """One concrete class, never subclassed. structure, deltas and trained define the function; parts hold what only
    training needs. parameters() is what trains, state_dict() is the checkpoint."""

    config: Any
    sites: list[Site]

    def __init__(self, config: Any, sites: list[Site], heads: dict[str, nn.Module] | None = None):
        super().__init__()
        self.started = False  # its numbers come from begin() or a checkpoint: data-driven starts are over
        self.memo: dict = {}  # of the copies: tied modules stay tied
        self.__dict__.update(config=config, sites=sites)
        structure, *parts = registry.chosen(config)
        self.structure: Structure = structure(config, self)
        self.parts = nn.ModuleDict({c.axis: c(getattr(config, c.axis), self) for c in parts})
        make: Callable[[Site], Delta | None] = lambda site: self.structure.build(site, lambda s: None)  # noqa: E731
        for part in self.parts.values():  # AXES order: the decomposition wraps the structure, routing wraps both
            make = _wrapped(part, make)
        built = {s.key: make(s) for s in sites}
        self.deltas = nn.ModuleDict({k: d for k, d in built.items() if d is not None})
        self.trained = nn.ModuleDict({n.replace(".", "/"): Copy(m, self.memo) for n, m in (heads or {}).items()})
        self.memo.clear()
        self._each("attach")
        if not any(p.requires_grad for p in self.parameters()):
            raise UserError(f"{registry.spell(config)} would train nothing here: name a head in trained_modules")

    def all_parts(self) -> tuple[Part, ...]:
        return (self.structure, *self.parts.values())  # type: ignore[arg-type]

    def _each(self, hook: str, *args: Any) -> list:
        with exact():  # whatever the loop around it does
            found = [getattr(p, hook)(*args) for p in self.all_parts()]
        if hook in WRITING:
            kernels.changed()
        return found

    @property
    def posterior(self) -> Posterior | None:
        return next((p for axis, p in self.parts.items() if axis == "posterior"), None)  # type: ignore[return-value]

    # what is inside, however deeply wrapped

    def inside(self, kind: type) -> Iterator[tuple[Site, Any]]:
        """Every module of a kind within the deltas, and its site."""
        for s in self.sites:
            if s.key in self.deltas:
                yield from ((s, m) for m in self.deltas[s.key].modules() if isinstance(m, kind))

    def low_ranks(self) -> Iterator[tuple[Site, LowRank]]:
        """Every pair of factors, under experts too."""
        return self.inside(LowRank)

    def dense(self) -> Iterator[tuple[Site, nn.Parameter]]:
        """Every whole weight [d_out, d_in] that a delta trains."""
        return ((s, d.dense) for s, d in self.inside(Delta) if isinstance(getattr(d, "dense", None), nn.Parameter))

    def copies(self) -> dict[str, nn.Module]:
        """What is trained whole: the copies, by the names that the modules have in the model."""
        return {k.replace("/", "."): copy.module for k, copy in self.trained.items()}  # type: ignore[misc]

    def idle(self) -> set[str]:
        """Keys of the deltas whose pairs a budget left without any rank."""
        ranks: dict[str, int] = {}
        for s, low in self.low_ranks():
            ranks[s.key] = ranks.get(s.key, 0) + low.rank
        return {k for k, r in ranks.items() if not r}

    @property
    def mergeable(self) -> bool:
        return all(d.mergeable for _, d in self.inside(Delta))

    def heads(self) -> list[nn.Parameter]:
        return [p for p in self.trained.parameters() if p.requires_grad]

    def describe(self) -> list[dict[str, Any]]:
        """What was adapted: name, shape, rank and scale a layer."""
        found: dict[str, dict[str, Any]] = {}
        for s in self.sites:
            if s.key in self.deltas:
                shape = {"d_out": s.d_out, "d_in": s.d_in} if s.is_linear else {}
                found[s.name] = {"name": s.name, "delta": type(self.deltas[s.key]).__name__, **shape}
        for s, m in self.inside(Elastic):
            if hasattr(m, "rank") and hasattr(m, "scale"):  # a LowRank, or a delta with a rank of its own
                found[s.name]["rank"] = found[s.name].get("rank", 0) + m.rank
                found[s.name]["scale"] = float(m.scale)
        return list(found.values())

    # training

    @torch.no_grad()
    def begin(self, stage: Stage) -> None:
        self._each("begin", stage)
        self.started = True

    @torch.no_grad()
    def end(self, stage: Stage) -> bool:
        return any(self._each("end", stage))

    def before_forward(self, batch: Any) -> None:
        self._each("before_forward", batch)

    @property
    def has_penalty(self) -> bool:
        return any(p.penalises() for p in self.all_parts())

    def penalty(self) -> Tensor | float:
        return sum(self._each("penalty"))

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        self._each("before_step", step)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        self._each("after_step", step)

    def rate(self, step: Step) -> float:
        return math.prod(self._each("rate", step))

    def counters(self) -> dict[str, float]:
        return {k: v for c in self._each("counters") for k, v in c.items()}

    def truncations(self) -> dict[int, Callable[[], Any]]:
        return {k: v for c in self._each("truncations") for k, v in c.items()}

    @contextlib.contextmanager
    def tried(self, change: Callable[[], Any]) -> Iterator[None]:
        """Inside, the adapter as `change` leaves it; then as it was, its very tensors."""
        state = {n: t.clone() for n, t in self.state_dict().items()}
        kept: list[Any] = [(own, dict(own)) for m in self.modules() for own in (m._parameters, m._buffers)]
        try:
            with torch.no_grad():
                change()
            yield
        finally:
            for own, before in kept:
                own.clear()
                own.update(before)
            self.load_state_dict(state)

    # saving: state_dict() goes on training; export() defines the function

    def export(self) -> dict[str, Tensor]:
        """Loads into structure + decomposition + routing alone, without the parts that trained it."""
        wraps = [f"parts.{a}." for a in registry.WRAPPING]
        return {k: v for k, v in self.state_dict().items() if not k.startswith("parts.") or any(map(k.startswith, wraps))}

    def load(self, state: dict[str, Tensor]) -> None:
        """All or nothing: every tensor has its place and every place its tensor, or UserError names them."""
        elastic = {f"{p}.": m for p, m in self.named_modules() if isinstance(m, Elastic)}
        saved = {p: {n: state[p + n] for n in m.shapes() if p + n in state} for p, m in elastic.items()}
        theirs = {p + n for p, m in elastic.items() for n in m.shapes()}
        mine = {n: t for n, t in self.state_dict().items() if n not in theirs}
        bad = [p + c for p, m in elastic.items() for c in m.complaints(saved[p])]
        bad += [f"{n} is missing" for n in mine if n not in state]
        wrong = [n for n in mine if n in state and state[n].shape != mine[n].shape]
        bad += [f"{n} is {list(state[n].shape)}, not {list(mine[n].shape)}" for n in wrong]
        unknown = [n for n in state if n not in mine and n not in theirs]
        bad += [f"{n} is not known here" for n in unknown]
        bad += [c for p in self.all_parts() for c in p.complaints(state)] if not bad else []
        if bad:
            fine = len(state) - len(unknown) - len(wrong)
            raise UserError(f"{registry.spell(self.config)} cannot load this: {_few(bad)} ({fine} of {len(state)} tensors fit)")
        for p, m in elastic.items():
            m.allocate(saved[p])
        self.load_state_dict(state)
        kernels.changed()
        self.started = True
        self._tie(state)

    def _tie(self, state: dict[str, Tensor]) -> None:
        """Parameters of Elastic modules that were one when they were saved, and so are one tensor in `state`, are one again."""
        first: dict[int, tuple[Elastic, str]] = {}
        for prefix, m in self.named_modules():
            for name in m.shapes() if isinstance(m, Elastic) else ():
                saved = state.get(f"{prefix}.{name}")
                if saved is not None and saved.numel() and name in m._parameters:
                    owner, its = first.setdefault(id(saved), (m, name))
                    setattr(m, name, getattr(owner, its))


def _wrapped(part: Any, make: Callable[[Site], Delta | None]) -> Callable[[Site], Delta | None]:
    return lambda site: part.build(site, make)


def _few(texts: Iterable[str], most: int = 4) -> str:
    listed = list(texts)
    more = f"; and {len(listed) - most} more" if len(listed) > most else ""
    return "; ".join(listed[:most]) + more
