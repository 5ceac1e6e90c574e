"""Part: one registered name on one axis, what a variant is written from. Every method is optional."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn as nn
from torch import Tensor

from ..errors import UserError
from ..registry import WRAPPING
from .delta import Copy, Delta
from .low_rank import Moved
from .peft import Peft
from .site import Site, is_linear
from .wrapper import Wrapper

if TYPE_CHECKING:
    from ..optim import Lifecycle
    from .adapter import Adapter

Make = Callable[[Site], Delta | None]


@dataclass
class Stage:
    """What begin and end may use. One stage, one task; the first has index 0.

    batches(n): the first n training batches, the same at every call; loss(batch): the mean task loss [] of the
    adapted model on one; mask(batch): which positions [batch, tokens] are real, or None."""

    model: Any  # the Adapted module
    batches: Callable[[int], Iterable[Any]]
    loss: Callable[[Any], Tensor]
    mask: Callable[[Any], Tensor | None] = lambda batch: None
    index: int = 0


@dataclass(frozen=True)
class Step:
    """One optimiser step: its index from 0, how many there will be, and the optimiser."""

    index: int
    total: int
    lifecycle: Lifecycle

    @property
    def optimizer(self) -> Any:
        return self.lifecycle.optimizer

    @property
    def loss(self) -> Any:
        """The task loss [] or a number, of the whole step; None where the loop does not tell it."""
        return self.lifecycle.loss

    def rebuild_optimizer(self, moved: Moved | None = None) -> None:
        """Parameters were replaced: train the new ones, and drop the old ones' state but for what LowRank.keep moved."""
        self.lifecycle.rebuild(moved)

    def sum(self, t: Tensor) -> Tensor:
        """Over all processes: for what a part gathers of its own rows, beside the gradients."""
        return self.lifecycle.sum(t)

    @property
    def stage(self) -> Stage:
        """For what measures the loss while it trains. Raises UserError where this process has not begun one."""
        if self.lifecycle.stage is None:
            raise UserError("this variant measures the loss while it trains: give begin(batches=[…]) before optimizer(…)")
        return self.lifecycle.stage


class Part(nn.Module):
    """Hooks are called in the order of registry.AXES. Life: build each site -> attach -> (load | begin) -> steps -> end.

    What defines the function lives in deltas and structure; what only training needs lives here, as buffers."""

    axis: ClassVar[str]
    name: ClassVar[str]  # set by register()
    paper: ClassVar[str] = ""  # title's short form and arXiv id
    also: ClassVar[tuple[str, ...]] = ()  # further axes that it decides
    needs: ClassVar[frozenset[str]] = frozenset()  # words that the structure must give
    does: ClassVar[frozenset[str]] = frozenset()  # facts that another part may mind
    minds: ClassVar[frozenset[str]] = frozenset()
    over: ClassVar[str] = ""  # the structure when none is named; empty: the default one
    data: ClassVar[bool] = False  # begin() reads stage.batches

    def __init__(self, config: Any, adapter: Adapter):
        super().__init__()
        self.__dict__.update(config=config, adapter=adapter)  # plain references, not submodules

    if TYPE_CHECKING:
        config: Any
        adapter: Adapter

    def build(self, site: Site, make: Make) -> Delta | None:
        """Structure: the site's delta. Decomposition, routing: wrap make(site)."""
        return make(site)

    def attach(self) -> None:
        """All deltas exist: settle which tensors there are (gates, scores), not their values. Also before loading."""

    def begin(self, stage: Stage) -> None:
        """Values: data-driven starts, ranks, masks. Under no_grad; leaves the function as it is."""

    def end(self, stage: Stage) -> bool:
        """Compress or consolidate. True: the function changed, so evaluate again."""
        return False

    def options(self) -> dict[nn.Parameter, dict[str, float]]:
        """{parameter: {"lr_scale": 16.0, "weight_decay": 0.0}}, merged over the parts."""
        return {}

    def optimizer(self, groups: list[dict], make: Callable) -> Any:
        """Dynamics only: an optimiser of its own instead of make(groups)."""
        return None

    def rate(self, step: Step) -> float:
        """Multiplies the learning rate of this step."""
        return 1.0

    def before_forward(self, batch: Any) -> None:
        """Batch-level context, for routing."""

    def penalty(self) -> Tensor | float:
        """Added to the loss, in the same backward pass; clears the auxiliary losses that forward stored."""
        return 0.0

    def penalises(self) -> bool:
        """Whether penalty() adds anything under these options."""
        return type(self).penalty is not Part.penalty

    def before_step(self, step: Step) -> None:
        """Gradients are averaged and not yet clipped."""

    def after_step(self, step: Step) -> None:
        """Parameters are updated, gradients still there."""

    def complaints(self, state: dict[str, Tensor]) -> list[str]:
        """Why this checkpoint's tensors cannot be loaded, beyond names and shapes (a checksum that differs)."""
        return []

    def counters(self) -> dict[str, float]:
        """Numbers that prove the method acted (ranks dropped, restarts, refreshes): they go into the record."""
        return {}

    def truncations(self) -> dict[int, Callable[[], Any]]:
        """The ranks at which training has made it an adapter, too, and what cuts it down to each: a run scores them all."""
        return {}

    # in PEFT's words; reading mirrors writing: each part, the last one first, takes out what it would have added

    def to_peft(self, out: Peft) -> None:
        """Write what the part makes the adapter compute, on top of the parts before it. Raises UserError where PEFT has
        no word for it; a part that only trains has nothing to say."""
        if self.axis in ("structure", *WRAPPING):
            raise UserError(f"PEFT has no {self.name}")

    @classmethod
    def from_peft(cls, saved: Peft) -> dict[str, Any] | None:
        """The options under which this part is what PEFT saved, its fields taken out; None: it has no share in it."""
        return None

    def fill(self, saved: Peft) -> None:
        """Copy its tensors out of `saved`, into modules of their shapes."""


class Structure(Part):
    """Which function a site computes. gives, in words that a test derives from what is really built:
    low_rank   it trains LowRank modules (Adapter.low_ranks finds them)
    input      the A of each of them reads the site's own input
    dense      it trains whole weights (Adapter.dense finds them)
    weight     it has and changes an effective weight: Delta.weight is overridden and the delta is mergeable
    additive   that weight is W0 + B A: Delta.factors and randomize are overridden"""

    axis = "structure"
    gives: ClassVar[frozenset[str]] = frozenset()
    default: ClassVar[bool] = False  # what parts stand on when no structure is named
    zero_start: ClassVar[bool] = True  # attaching leaves the output as it is
    fits = staticmethod(is_linear)  # which modules can be sites
    ties: ClassVar[bool] = False  # modules that share a parameter are trained as one

    def build(self, site: Site, make: Make) -> Delta | None:
        raise NotImplementedError

    def sharing(self, kind: type, name: str) -> list[tuple[Any, str, str]]:
        """(delta, its name in a checkpoint, that of the module it refers to as `name`) for all deltas of a kind."""
        names = {m: n for n, m in self.adapter.named_modules()}
        return [(m, n, names[getattr(m, name)]) for m, n in names.items() if isinstance(m, kind)]

    def one_rank(self, state: dict[str, Tensor], kind: type, name: str, dim: int) -> list[str]:
        """Complains where the tensors of this name have not one length along dim, in all deltas of a kind."""
        found = {n: state[f"{n}.{name}"].shape[dim] for n, m in self.adapter.named_modules() if isinstance(m, kind)}
        usual = max(found.values(), key=list(found.values()).count, default=0)
        return [f"{n}.{name} has rank {r}, the others {usual}" for n, r in found.items() if r != usual]


class Decomposition(Part):
    """Re-scales the effective weight of any structure that has one."""

    axis, needs = "decomposition", frozenset({"weight"})
    delta: ClassVar[type[Wrapper]]

    def build(self, site: Site, make: Make) -> Delta | None:
        inner = make(site)
        # what is not linear (an embedding, a norm) or is copied whole (a tied weight) has no rows to re-scale
        if inner is None or isinstance(inner, Copy) or not site.is_linear:
            return inner
        return self.delta(inner, site)  # type: ignore[call-arg]


class Posterior(Part):
    """A distribution over an adapter's numbers: training draws from it. Evaluation uses its mean, or where `samples` asks
    for it, the mean of what so many draws predict."""

    axis = "posterior"

    @property
    def samples(self) -> int:
        """Draws that an evaluation averages over; 0: none, the mean of the numbers is evaluated."""
        return 0

    @contextlib.contextmanager
    def drawn(self) -> Iterator[None]:
        """Inside, the adapter computes with one draw, the same for every batch."""
        raise NotImplementedError
        yield


class Init(Part):
    """Values of fresh factors: once in an adapter's life, in the first stage, never after loading."""

    axis = "init"

    def begin(self, stage: Stage) -> None:
        if stage.index == 0 and not self.adapter.started:
            self.start(stage)

    def start(self, stage: Stage) -> None:
        raise NotImplementedError
