"""attach(model, "dora+pissa", ...) and what can be done with the result: run, train, merge, disable, save, detach."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from . import holder, registry, targets
from .adapter import Adapter, Stage
from .errors import UserError
from .mount import Mount
from .optim import Lifecycle

log = logging.getLogger(__name__)


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """torch's generator stands at `seed` inside and where it stood before afterwards; None: nothing is touched."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Adapted(nn.Module):
    """One module that holds a frozen base model and its adapter; call it as the model itself.

    seed: draws the adapter's random starts from a generator of its own; None: from torch's."""

    def __init__(self, model: nn.Module, config: Any, seed: int | None = None):
        super().__init__()
        if any(isinstance(m, holder.Holder) for m in model.modules()):
            raise UserError("this model already has an adapter: detach() it first, or merge it and save the result")
        structure = registry.chosen(config)[0]
        heads = targets.trained_modules(model, config.trained_modules)
        found = targets.find(model, config.target_modules, list(heads), structure.fits, structure.ties)
        with seeded(seed):
            self.adapter = Adapter(config, found.sites, heads).train(model.training)
        self.model = model
        self.seed, self.targets = seed, {e: len(names) for e, names in found.entries.items()}
        self.__dict__.update(_stage=None, _index=0)
        by_key = {s.key: s.base.module for s in found.sites}
        held: list[tuple[nn.Module, Any]] = [(by_key[k], d) for k, d in self.adapter.deltas.items()]
        self.mount = Mount(model, held + [(m, self.adapter.trained[n.replace(".", "/")]) for n, m in heads.items()])
        self.training = model.training
        self._rest()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)  # config, generate, device, …

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        self._rest()
        return self

    def _rest(self) -> None:
        if not len(self.adapter.deltas):
            self.model.eval()  # a base without deltas only computes features: its dropout would make them random

    def num_trainable(self) -> int:
        """Trainable numbers, the head's included; `cost()` counts them apart."""
        return sum(p.numel() for p in self.adapter.parameters() if p.requires_grad)

    def cost(self) -> dict[str, int]:
        """adapter, head and total (base with its own head) parameters; shared and tied ones once."""
        head = sum(p.numel() for p in self.adapter.heads())
        return {
            "adapter_parameters": self.num_trainable() - head,
            "head_parameters": head,
            "total_parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def remember_base(self) -> None:
        """Take the base's fingerprint now, once for every save() to come: nobody changes a base while it trains."""
        self.__dict__["_base"] = self.base_fingerprint()

    def base_fingerprint(self) -> str:
        """Of the base's numbers, what the adapter trains whole left out."""
        from .fingerprint import of_model

        return self.__dict__.get("_base") or of_model(self.model, list(self.adapter.copies()))

    # training

    def begin(self, batches: Any = None, loss: Any = None, mask: Any = None, index: int = 0) -> Adapted:
        """Give the adapter its values for a stage. batches: a list, or a function n -> n batches; loss: (model, batch)
        -> mean loss; mask: batch -> real positions. Raises UserError where a part starts from data and none came."""
        hungry = [p.name for p in self.adapter.all_parts() if p.data]
        if hungry and batches is None and not self.adapter.started:
            raise UserError(f"{hungry[0]!r} starts from data: give attach(…, batches=[…]), a list of training batches")
        self.__dict__.update(_index=index, _stage=self._stage_of(batches, loss, mask, index))
        with self._drawing(index):
            self.adapter.begin(self._stage)
        return self

    def end(self) -> bool:
        """Training of the stage is over: compress or consolidate. True: the function changed, so evaluate again."""
        with self._drawing(self._index):
            return self.adapter.end(self._stage or self._stage_of(index=self._index))

    def _drawing(self, index: int) -> contextlib.AbstractContextManager:
        """Each stage draws other numbers than the one before."""
        return seeded(None if self.seed is None else self.seed + index)

    def _stage_of(self, batches: Any = None, loss: Any = None, mask: Any = None, index: int = 0) -> Stage:
        of = batches if callable(batches) else lambda n: list(batches or ())[:n]
        measure = loss or _own_loss
        mask = mask or (lambda batch: batch.get("attention_mask") if hasattr(batch, "get") else None)
        return Stage(self, of, lambda batch: measure(self, batch), mask, index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stage": None}  # a copy has no data: batches and losses may be open files or lambdas

    def optimizer(self, make: Callable, total: int, head: dict[str, float] | None = None) -> torch.optim.Optimizer:
        """The stage's optimiser, with the adapter's life cycle hooked to its step(). make(groups) -> an optimiser with
        a learning rate, e.g. `lambda groups: AdamW(groups, lr=1e-3)`; total: how many steps there will be; head: group
        options of the trained heads. Variants with a penalty need `loss + adapted.penalty()` before backward()."""
        return Lifecycle(self.adapter, make, total, head, self._stage).optimizer

    def penalty(self) -> Tensor | float:
        """What the variant adds to the loss; 0.0 for most."""
        self.adapter.__dict__["penalty_taken"] = True
        return self.adapter.penalty()

    # the base, the merged model, and back

    def merge(self, dtype: torch.dtype | None = None, limit: float = 0.1) -> dict[str, float]:
        """Write the effective weights into the base; unmerge() takes them back. dtype: convert the model first (a bf16
        base cannot hold a small update). Returns, a layer, the share of the update that the cast lost; more than
        `limit` in any layer is a UserError and nothing is merged."""
        self._attached("merge")
        if not self.adapter.mergeable:
            raise UserError(f"{self.variant} depends on its input, so no single weight equals it: it cannot be merged")
        return self.mount.merge(dtype, limit)

    def unmerge(self) -> None:
        """The base's own weights, bit for bit, and the adapter on top again."""
        if not self.merged:
            raise UserError("not merged: nothing to unmerge")
        self.mount.unmerge()

    @property
    def merged(self) -> bool:
        return self.mount.merged

    @contextlib.contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Inside, the model is the base model bit for bit, its own head included."""
        was = self._attached("disable", within=True)
        try:
            self.mount.switch(False)
            yield self.model
        finally:
            self.mount.switch(was)

    def _attached(self, what: str, within: bool = False) -> bool:
        """Whether the adapter runs; UserError where it is merged, detached or, unless `within`, disabled."""
        if self.merged:
            raise UserError(f"cannot {what}: the adapter is merged; unmerge() it first")
        if not self.mount.held:
            raise UserError(f"cannot {what}: the adapter is detached; save() it and load() that to attach it again")
        if not self.mount.on and not within:
            raise UserError(f"cannot {what} inside disabled()")
        return self.mount.on

    def detach(self) -> nn.Module:
        """The base model, bit for bit as before attach(); the adapter lives on without it."""
        if self.merged:
            self.unmerge()
        if self.mount.held:
            self._attached("detach")
        return self.mount.release()

    def bake(self) -> nn.Module:
        """A plain model with the adapter merged into it for good."""
        if not self.merged:
            self.merge()
        return self.mount.release()

    def save(self, folder: str | Path) -> Path:
        """Write the adapter, its config and the base's fingerprint; see lorafactory.load."""
        from .checkpoint import save

        return save(self, Path(folder))

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: transformers' own would write the base without the adapter."""
        raise UserError("save(folder) writes the adapter; bake().save_pretrained(folder) the merged model")

    @property
    def variant(self) -> str:
        return registry.spell(self.adapter.config)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    out = model(**batch)
    loss = out["loss"] if isinstance(out, dict) else getattr(out, "loss", None)
    if loss is None:
        raise UserError("the model's output has no loss for these batches: give attach(…, loss=lambda model, batch: …)")
    return loss


def attach(
    model: nn.Module,
    variant: Any,
    *,
    batches: Iterable | Callable | None = None,
    loss: Callable | None = None,
    mask: Callable | None = None,
    seed: int | None = None,
    **options: Any,
) -> Adapted:
    """Adapt a model: `attach(model, "dora+pissa", rank=8, target_modules=["query"], init=dict(niter=16))`.

    variant: a spelling, or a config that registry.config made; options: fields of the structure's config, or an axis
    with a dict of that part's fields (`lorafactory show NAME` lists them). batches, loss, mask: what data-driven
    variants start from, see Adapted.begin. Raises UserError for every mistake before the model is touched."""
    if not isinstance(variant, str) and options:
        raise UserError(f"options {', '.join(options)} beside a ready config: put them into the config")
    config = registry.config(variant, **options) if isinstance(variant, str) else variant
    adapted = Adapted(model, config, seed)
    try:
        return adapted.begin(batches, loss, mask)
    except BaseException:
        adapted.detach()
        raise
