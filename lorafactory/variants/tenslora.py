import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import List, Optional  # noqa: UP035  as in registry

import torch
import torch.nn as nn

from ..adapter import Additive, Elastic, Structure
from ..adapter.site import role
from ..errors import UserError
from ..registry import StructureConfig, register

MODES = ("att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth")
FORMS, STARTS = ("tucker", "cp"), ("orthogonal", "kaiming", "normal")


class Stack(Elastic):
    """The updates of a group of layers, transposed, as one tensor with the axes of `sizes`: inputs, then outputs (or
    within a head, heads), then projections and layers, where the mode has them. One factor [size, rank] an axis, trained.
    Tucker: a core [rank, ...], trained; CP: one rank for all, no core."""

    def __init__(self, sizes, c, site):
        super().__init__()
        self.sizes, self.head_major = sizes, c.head_major
        tucker, count = c.form == "tucker", len(sizes)
        ranks = c.ranks or [c.rank] * count
        root = math.prod(ranks) ** 0.5 if tucker else c.rank**0.5
        std = root ** -(1 / (count + 1) if tucker else 1 / count)
        self.register_parameter("core", nn.Parameter(site.new(*ranks)) if tucker else None)
        for axis, rank in zip(sizes, ranks, strict=True):
            self.register_parameter(axis, nn.Parameter(site.new(sizes[axis], rank)))
            self.draw(getattr(self, axis), c.start or ("orthogonal" if tucker else "kaiming"), std)
        if not tucker:
            nn.init.zeros_(self.inputs)
        self.register_buffer("scale", site.new(fill=c.scale))

    def draw(self, factor, start, std):
        if start == "orthogonal":
            nn.init.orthogonal_(factor)
        elif start == "kaiming":
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        else:
            nn.init.normal_(factor, std=std)

    def shapes(self):
        ranks = {axis: "r" if self.core is None else f"r{i}" for i, axis in enumerate(self.sizes)}
        core = {} if self.core is None else {"core": tuple(ranks.values())}
        return {**core, **{axis: (n, ranks[axis]) for axis, n in self.sizes.items()}, "scale": ()}

    def pair(self, place):
        """(B [d_out, r], A [r, d_in]) of the slice at a place, whose axes are the last ones; no tensor is formed."""
        rows = [getattr(self, axis)[at] for axis, at in place.items()]
        if self.core is None:
            weights = torch.stack(rows).prod(0) if rows else 1.0
            out = self.outputs if "outputs" in self.sizes else self.within[:, None] * self.heads
        else:
            weights, core = 1.0, self.core
            for row in reversed(rows):
                core = core @ row
            if "outputs" in self.sizes:
                out = self.outputs @ core.T
            else:
                out = torch.einsum("rij,ai,hj->ahr", core, self.within, self.heads)
        if out.dim() == 3:
            out = (out.transpose(0, 1) if self.head_major else out).flatten(0, 1)
        return out * (weights * self.scale), self.inputs.T

    def randomize(self):
        nn.init.normal_(self.inputs if self.core is None else self.core)


class TensLoRADelta(Additive):
    """W = W0 + s U^T, U [d_in, d_out] this layer's slice of a tensor that it shares; it owns no number"""

    def __init__(self, stack: Stack, place: dict[str, int]):
        super().__init__()
        self.__dict__.update(stack=stack, place=place)

    def factors(self):
        return self.stack.pair(self.place)

    def randomize(self):
        self.stack.randomize()


@register("tenslora")
class TensLoRA(Structure):
    """TensLoRA: W = W0 + s U^T; the updates U of many layers are slices of one tensor, factored: Tucker's form or CP.

    Marmoret et al. 2025. `mode` says what a tensor joins: att, the heads of one projection, [d_in, d_out / h, h]; qkv, the
    projections of a layer; depth, the layers of a projection; and all together. A projection is a name but for its
    numbers, a layer the place of such a name in its sequence. All factors train. Tucker's core starts at zero, in CP
    the first factor. The last two axes of att are unfolded as in the authors' code: outputs are d_out / h groups of h, so
    that `heads` are no heads of the model; head_major puts that right (inferred). Layers of unlike shape are no slices of
    one tensor and refused; the authors' code averages groups of a d_in wide update for grouped queries, per_shape makes
    a tensor a shape. Their tensor dropout is left out.

    Cost: r (d_in + d_out) products a position, r the rank of the inputs, as a LoRA; a layer's B is contracted once a
    step, in r_1 r_2 d_out products (Tucker; of att r_1 r_2 r_3 d_out / h more), and the core is read by every layer."""

    paper = "TensLoRA, arXiv 2509.19391"
    gives = frozenset({"additive", "weight"})
    does = frozenset({"shares every number"})
    layers: dict[str, int]
    places: dict[str, tuple[str, dict[str, int]]]

    @dataclass
    class Config(StructureConfig):
        """mode: what a tensor joins; form: tucker or cp; rank: of every axis; ranks: of each axis, in place of rank
        (Tucker); scale: s; heads: h of the att modes; head_major: unfold head by head; start: of the factors, orthogonal
        (null with Tucker), kaiming (null with CP) or normal; per_shape: unlike shapes have a tensor each (false: are refused)."""

        mode: str = "qkv_depth"
        form: str = "tucker"
        rank: int = 8
        ranks: Optional[List[int]] = None  # noqa: UP006, UP045
        scale: float = 1.0
        heads: int = 1
        head_major: bool = False
        start: Optional[str] = None  # noqa: UP045
        per_shape: bool = True

        def check(self):
            self.check_least(1, "rank", "heads")
            self.check_choices(mode=MODES, form=FORMS, start=(None, *STARTS))
            axes = 2 + len(self.mode.split("_"))
            if self.ranks is not None and (self.form != "tucker" or len(self.ranks) != axes or min(self.ranks) < 1):
                raise UserError(f"ranks is {self.ranks}; mode {self.mode} takes {axes} in Tucker's form, none in CP's")
            self.check_not_zero("scale")
            if self.heads > 1 and "att" not in self.mode.split("_"):
                raise UserError(f"heads is {self.heads}, of which mode {self.mode} has no axis: choose a mode with att")
            if self.head_major and self.heads == 1:
                raise UserError("head_major is true, which with one head changes nothing: give heads")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        met: Counter[str] = Counter()
        self.__dict__["layers"] = {}
        for s in adapter.sites:
            self.layers[s.name] = met[role(s.name)]
            met[role(s.name)] += 1
        groups: dict[str, list] = {}
        for s in adapter.sites:
            groups.setdefault(self.group(s), []).append(s)
        self.stacks = nn.ModuleDict()
        self.__dict__["places"] = {}
        for key, members in groups.items():
            self.join(key, members)

    def projection(self, site) -> str:
        return role(site.name).replace(".", "/")

    def layer(self, site) -> int:
        """Among the layers of its projection."""
        return self.layers[site.name]

    def group(self, site) -> str:
        """The tensor's name."""
        words = self.config.mode.split("_")
        own = [] if "qkv" in words else [self.projection(site)]
        own += [] if "depth" in words else [str(self.layer(site))]
        own += [site.sizes] if self.config.per_shape else []
        return "-".join(own) or "all"

    def join(self, key, members):
        c, first = self.config, members[0]
        for s in members:
            if s.base.shape != first.base.shape:
                both = " and ".join(f"{t.name} [{t.d_out}, {t.d_in}]" for t in (first, s))
                raise UserError(
                    f"{both} have no meaning as slices of one tensor: choose layers of a shape or per_shape=true"
                )
            if s.d_out % c.heads:
                raise UserError(f"heads is {c.heads}; it must divide {s.d_out}, the outputs of {s.name}")
        seen = {axis: list(dict.fromkeys(of(s) for s in members)) for axis, of in self.axes().items()}
        outputs = (
            {"within": first.d_out // c.heads, "heads": c.heads}
            if "att" in c.mode.split("_")
            else {"outputs": first.d_out}
        )
        sizes = {"inputs": first.d_in, **outputs, **{axis: len(found) for axis, found in seen.items()}}
        self.stacks[key] = Stack(sizes, c, first)
        for s in members:
            self.places[s.name] = (key, {axis: seen[axis].index(of(s)) for axis, of in self.axes().items()})

    def axes(self) -> dict[str, Callable]:
        """The axes that a layer has one place in, and how to tell it."""
        words = self.config.mode.split("_")
        found = {"qkv": ("projections", self.projection), "depth": ("layers", self.layer)}
        return dict(found[word] for word in words if word in found)

    def build(self, site, make):
        key, place = self.places[site.name]
        return TensLoRADelta(self.stacks[key], place)
