"""Spectral: structures that train few coefficients, at random positions, of a fixed transform: FourierFT, WaveFT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict  # noqa: UP035  as in registry

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..registry import StructureConfig
from ..targets import per_site
from .delta import Delta, alike, linear
from .elastic import Elastic
from .part import Structure
from .peft import common, exactly
from .site import Base, Site

WORTH = 512  # entries of a dense matrix that cost what one gathered and scattered entry does, on a CPU


@dataclass
class SpectralConfig(StructureConfig):
    """n: trained entries a layer; scale: s; position_seed: draws their positions, whatever the run's seed; n_pattern: another n
    for some layers, {name, suffix or regular expression: n}."""

    n: int = 1000
    scale: float = 1.0
    position_seed: int = 777
    n_pattern: Dict[str, int] = field(default_factory=dict)  # noqa: UP006

    def check(self) -> None:
        self.check_least(1, "n", "n_pattern")
        self.check_not_zero("scale")
        self.check_seeds("position_seed")


def drawn(size: int, n: int, seed: int) -> Tensor:
    """n of `size` positions, the first of a random permutation: PEFT's for this seed."""
    index = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n]
    return index.to(torch.int32 if size < 2**31 else torch.int64)


class Positions(Elastic):
    """index [n]: different entries of a matrix [d_out, d_in], row by row. One for all layers of a shape; a layer that
    trains fewer takes the first of them.

    Saved, not drawn again: once a shape it is little beside the values, which each layer has of its own, and no other
    torch can put these in other places."""

    index: Tensor

    def __init__(self, size: int, index: Tensor):
        super().__init__()
        self.size = size
        self.register_buffer("index", index)

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        return {"index": ("n",)}

    def complaints(self, saved: dict[str, Tensor]) -> list[str]:
        bad = super().complaints(saved)
        if not bad and (len(saved["index"].unique()) < len(saved["index"]) or not self.inside(saved["index"])):
            bad = [f"index is not of different entries, of {self.size}: the file is damaged"]
        return bad

    def inside(self, index: Tensor) -> bool:
        return bool((index >= 0).all() and (index < self.size).all())

    def allocate(self, saved: dict[str, Tensor]) -> None:
        self.index = self.index.new_empty(saved["index"].shape)


class SpectralDelta(Elastic, Delta):
    """W = W0 + s T_out F T_in^T; F is zero but for c [n], trained, at the positions; T_out and T_in are fixed. c has a name
    of its own in each method: another must not load it.

    analyse(x) is T_in^T x, synthesise(z) is T_out z, transform(F) is T_out F T_in^T."""

    own: ClassVar[str]
    positions: Positions
    scale: Tensor

    def __init__(self, positions: Positions, site: Site, n: int, scale: float):
        super().__init__()
        self.__dict__["positions"] = positions
        self.d_in, self.d_out = site.d_in, site.d_out
        self.register_parameter(self.own, nn.Parameter(site.new(n)))
        self.register_buffer("scale", site.new(fill=scale))

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        return {self.own: ("n",), "scale": ()}

    @property
    def c(self) -> Tensor:
        return getattr(self, self.own)

    def at(self) -> tuple[Tensor, Tensor]:
        """Row and column in F of each entry of c."""
        index = self.positions.index[: len(self.c)].to(self.c.device).long()
        return index // self.d_in, index % self.d_in

    def size(self) -> tuple[int, int]:
        """Of F."""
        return self.d_out, self.d_in

    def analyse(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def synthesise(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def transform(self, f: Tensor) -> Tensor:
        raise NotImplementedError

    def dense(self, c: Tensor) -> Tensor:
        """The update [d_out, d_in]."""
        return self.transform(c.new_zeros(self.size()).index_put(self.at(), self.scale * c))

    def sparse(self, x: Tensor, c: Tensor) -> Tensor:
        """The update times x."""
        rows, columns = self.at()
        z = self.analyse(x)[..., columns] * (self.scale * c)
        return self.synthesise(z.new_zeros(*x.shape[:-1], self.size()[0]).index_add(-1, rows, z))

    def weight(self, base: Base) -> Tensor:
        return base.weight + self.dense(self.c)

    @property
    def many(self) -> bool:
        """Entries, so that the update is sooner formed than applied."""
        return WORTH * len(self.c) >= self.d_in * self.d_out

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.many and alike(x, self.c) and alike(x, base.weight):  # a 4-bit weight is not decoded in vain
            return F.linear(x, self.weight(base), base.bias)
        return super().forward(x, base)

    def update(self, x: Tensor, base: Base, y: Tensor) -> Tensor:
        if self.many:
            return linear(x, self.dense(self.c))
        # backward keeps x alone, not n numbers a position
        return checkpoint(self.sparse, x.to(self.c.dtype), self.c, use_reentrant=False, preserve_rng_state=False)


class Spectral(Structure):
    """In PEFT's words: c under the method's own name, and the seed; positions are not saved there."""

    kind: ClassVar[str]  # PEFT's name of the method
    n: dict[str, int]

    def __init__(self, config: Any, adapter: Any):
        super().__init__(config, adapter)
        found = per_site(config.n_pattern, adapter.sites, "n_pattern")
        self.__dict__["n"] = {s.name: found.get(s.name, config.n) for s in adapter.sites}
        self.positions = nn.ModuleDict()
        for s in adapter.sites:
            n, size = self.n[s.name], s.d_out * s.d_in
            if n > size:
                raise UserError(f"n is {n}; {s.name} [{s.d_out}, {s.d_in}] has {size} entries: at most that many")
            if s.sizes not in self.positions:
                most = max(self.n[t.name] for t in adapter.sites if t.sizes == s.sizes)
                self.positions[s.sizes] = Positions(size, self.draw(s, most).to(s.new().device))

    def draw(self, site: Site, n: int) -> Tensor:
        """Positions for the layers of this one's shape."""
        return drawn(site.d_out * site.d_in, n, self.config.position_seed)

    def found(self) -> Iterator[tuple[Site, Any]]:
        return self.adapter.inside(SpectralDelta)

    def complaints(self, state: dict[str, Tensor]) -> list[str]:
        pairs = [(f"{n}.{d.own}", k) for d, n, k in self.sharing(SpectralDelta, "positions")]
        few = [(d, k) for d, k in pairs if len(state[d]) > len(state[f"{k}.index"])]
        return [f"{d} has more entries than {k}.index has positions" for d, k in few]

    def to_peft(self, out: Any) -> None:
        seed, deltas = self.config.position_seed, dict(self.found())
        n, others = common({s.name: len(d.c) for s, d in deltas.items()})
        for s, d in deltas.items():
            index = d.positions.index.cpu()
            if not torch.equal(index, drawn(d.positions.size, len(index), seed)):
                raise UserError(
                    f"PEFT has {self.name} at positions that its seed draws, and seed {seed} draws others here"
                )
            alike = [o.name for o in deltas if o.name.endswith(f".{s.name}")]
            if alike and len(d.c) != n:
                raise UserError(f"PEFT has one n for names that end alike, {s.name} and {alike[0]}")
            out.layers[s.name] = {f"{self.kind.lower()}_spectrum": d.c}
        pattern = {s.name: len(d.c) for s, d in deltas.items() if exactly(s.name) in others}
        out.fields |= {"peft_type": self.kind, "n_frequency": n, "n_frequency_pattern": pattern}
        out.fields |= {"scaling": float(next(iter(deltas.values())).scale), "random_loc_seed": seed}

    @classmethod
    def from_peft(cls, saved: Any) -> dict[str, Any] | None:
        f, name = saved.fields, f"{cls.kind.lower()}_spectrum"
        if f.get("peft_type") != cls.kind:
            return None
        lengths = {n: len(t[name]) for n, t in saved.layers.items() if name in t}
        if not lengths:
            raise UserError(f"it has no {name}")
        n, others = common(lengths)
        options = {"n": n, "n_pattern": others, "scale": float(f["scaling"]), "position_seed": f["random_loc_seed"]}
        saved.drop("peft_type", "n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights")
        return options

    def fill(self, saved: Any) -> None:
        for site, d in self.found():
            saved.take(site.name, f"{self.kind.lower()}_spectrum", d.c)
