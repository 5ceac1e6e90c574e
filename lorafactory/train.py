"""The one training loop. It knows an adapter's hooks and a task's loss, never which variant or task it trains."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from . import shard
from .attach import Adapted
from .config import TrainConfig
from .errors import UserError
from .evaluate import answer, score, to_device
from .optim import Lifecycle
from .plan import Plan, mix
from .resume import Checkpoints, Interrupt, how_to_go_on

log = logging.getLogger(__name__)
WATCHED = 5  # optimiser steps within which a gradient must have reached every delta


class Diverged(Exception):
    """The loss is not finite any more."""


@dataclass
class Progress:
    """How far a run has come: everything but tensors that a checkpoint must hold."""

    step: int = 0  # steps done
    curve: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None  # of the evaluations, by what the task selects by
    seconds: float = 0.0  # of training, earlier processes included
    reached: list[str] = field(default_factory=list)  # deltas that had a gradient
    answers: list[Any] = field(default_factory=list)  # of a task that is scored online: [row, prediction], in order

    def worse_since(self) -> int:
        """Evaluations after the best one."""
        return 0 if self.best is None else sum(e["step"] > self.best["step"] for e in self.evaluations)


class Trainer:
    """One stage of training of one adapted model; train() returns its Progress, the model stands trained."""

    def __init__(self, adapted: Adapted, task: Any, config: TrainConfig, seed: int, accelerator: Accelerator,
                 folder: Path, watch: Callable[[dict], None] = lambda row: None, index: int = 0):  # fmt: skip
        self.adapted, self.task, self.config, self.seed, self.accelerator = adapted, task, config, seed, accelerator
        self.watch = watch
        self.rows: Any = task.splits["train"]
        self.lengths = self.rows.lengths() if hasattr(self.rows, "lengths") else None
        self.plan = Plan(len(self.rows), config, seed)
        if task.couples and (config.micro_batch_size or accelerator.num_processes > 1):
            raise UserError("this loss sets the rows of a step against one another: one process, no train.micro_batch_size")
        head = {} if config.head_lr is None else {"lr_scale": config.head_lr / config.lr}
        self.checkpoints = Checkpoints(folder, adapted, accelerator)
        found = self.checkpoints.newest()
        adapted.begin(self._first_batches, lambda model, batch: task.loss(model, batch) / task.size(batch), index=index)
        adapted.remember_base()
        if config.shard:
            shard.shard(adapted, accelerator)
        self.lifecycle: Lifecycle = adapted.optimizer(self._make, self.plan.total, head).lifecycle  # type: ignore[attr-defined]
        self.lifecycle.clip, self.lifecycle.sum = config.clip or None, self._sum
        self.optimizer = accelerator.prepare(self.lifecycle.optimizer)
        self.call: Any = torch.compile(adapted) if config.compile else adapted
        self.progress = Progress()
        self.interrupt = Interrupt()
        if found is not None:
            self.progress = Progress(**self.checkpoints.restore(found, self.lifecycle.optimizer))
            self.lifecycle.index = self.progress.step

    def _make(self, groups: list[dict]) -> torch.optim.Optimizer:
        c = self.config
        if c.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=c.lr, weight_decay=c.weight_decay)
        beta1, beta2 = c.betas
        # fused: one pass over every number, not a dozen; but it takes gradients still scaled by fp16's loss scaler
        fused = c.precision != "fp16"
        return torch.optim.AdamW(groups, lr=c.lr, betas=(beta1, beta2), weight_decay=c.weight_decay, fused=fused)

    def _first_batches(self, count: int) -> Iterator[dict[str, Any]]:
        """What data-driven starts see: the run's own first training batches, each row once, the same in every process."""
        for step in range(min(count, self.plan.per_epoch)):
            batch = self.task.training_batch([self.rows[i] for i in self.plan.batch(step)])
            yield to_device(batch, self.adapted.device)  # the model's: one to be sharded has not moved yet

    def train(self) -> Progress:
        """Raises Diverged, or KeyboardInterrupt after a last checkpoint."""
        self.adapted.train()
        with checkpointing(self.adapted, self.config.gradient_checkpointing), self.interrupt:
            began = time.perf_counter() - self.progress.seconds
            while self.progress.step < self.plan.total and not self._enough():
                row, stop = self._step(self.progress.step)
                self.progress.step += 1
                self.progress.seconds = time.perf_counter() - began
                self._note(row)
                if self.config.eval_every and self.progress.step % self.config.eval_every == 0:
                    self._evaluate()
                    began = time.perf_counter() - self.progress.seconds  # the clock of training stands meanwhile
                due = self.config.checkpoint_every and self.progress.step % self.config.checkpoint_every == 0
                if due or stop:
                    self.checkpoints.save(self.progress, self.lifecycle.optimizer)
                if stop:
                    raise KeyboardInterrupt(how_to_go_on(self.checkpoints.folder))
        if self.config.keep == "best" and self.progress.best is not None:
            self.checkpoints.restore_best()
        self.adapted.end()
        return self.progress

    def _enough(self) -> bool:
        return bool(self.config.patience) and self.progress.worse_since() >= self.config.patience

    def _step(self, step: int) -> tuple[dict[str, float], bool]:
        """One optimiser step: its row of the curve, and whether to stop after it, the same in every process. Losses are
        summed over examples or tokens and divided by how many there are in the whole step, so micro-batches and
        processes give the gradient of the one big batch."""
        accelerator, adapter = self.accelerator, self.adapted.adapter
        mine = self._micro_batches(step)
        batches = [to_device(self.task.training_batch([self.rows[i] for i in index]), accelerator.device) for index in mine]
        answers: list[Any] = []
        sizes = [self.task.size(b) for b in batches]
        for _ in range(self._fillers(step, len(batches))):
            first = self.task.training_batch([self.rows[self.plan.batch(step)[0]]])
            batches, sizes = [*batches, to_device(first, accelerator.device)], [*sizes, 0]
        own = torch.tensor([float(sum(sizes)), float(self.interrupt.wanted)], device=accelerator.device)
        units, stop = self._sum(own).tolist()
        total = torch.zeros((), device=accelerator.device)
        for k, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            torch.manual_seed(mix(self.seed, step, accelerator.process_index, k))
            adapter.before_forward(batch)
            if self.task.online:
                answers += zip(mine[k], answer(self.adapted, self.task, batch, accelerator), strict=True)
            with accelerator.autocast():
                loss = self.task.loss(self.call, batch) * (size > 0) / units
                penalty = self.adapted.penalty() if adapter.has_penalty else 0.0
            total += loss.detach()
            accelerator.backward(loss + penalty * (size / units))
        if not batches:
            self.adapted.penalty()  # a process without rows in this step has no loss to add it to
        value = float(self._sum(total))
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} at step {step + 1} of {self.plan.total}")
        if self.task.online:
            self._tell(answers)
        self._average()
        self._reached(step)
        for group in self.lifecycle.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.plan.rate(step)
        self.lifecycle.loss = value
        torch.manual_seed(mix(self.seed, step))  # what parts draw in their hooks is the same in every process
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"step": step + 1, "loss": value, "lr": self.config.lr * self.plan.rate(step)}, bool(stop)

    def _micro_batches(self, step: int) -> list[list[int]]:
        """This process's rows of a step. Those of like length go together: less padding, the same sum."""
        mine = self.plan.batch(step)[self.accelerator.process_index :: self.accelerator.num_processes]
        size = self.config.micro_batch_size or len(mine)
        if self.lengths and size < len(mine):
            mine.sort(key=self.lengths.__getitem__)
        return [mine[i : i + size] for i in range(0, len(mine), size)] if mine else []

    def _fillers(self, step: int, own: int) -> int:
        """Batches that count nothing: a sharded base runs as often in every process, or one would wait for ever."""
        if not self.config.shard:
            return 0
        most = math.ceil(len(self.plan.batch(step)) / self.accelerator.num_processes)
        return math.ceil(most / (self.config.micro_batch_size or most)) - own

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.accelerator.num_processes == 1 else self.accelerator.reduce(value, "sum")

    def _tell(self, answers: list[Any]) -> None:
        """Of every process, one a row: the first, before any step has learnt from it."""
        if self.accelerator.num_processes > 1:
            answers = gather_object(answers)
        known = {row for row, _ in self.progress.answers}
        self.progress.answers += [[row, a] for row, a in answers if row not in known]

    def _average(self) -> None:
        """One flat sum of the gradients over the processes; a wrapper would miss parameters that appear later."""
        if self.accelerator.num_processes == 1:
            return
        params = [p for p in self.adapted.adapter.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = self._sum(torch.cat([g.flatten().float() for g in grads]))
        for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)

    def _reached(self, step: int) -> None:
        """B35: a delta that no gradient reaches would look like a variant that does not learn."""
        if step >= WATCHED:
            return
        adapter = self.adapted.adapter
        idle = adapter.idle()
        deltas = {n.replace("/", "."): [p for p in d.parameters() if p.requires_grad and p.numel()]
                  for n, d in adapter.deltas.items() if n not in idle}  # fmt: skip
        missing = {n: ps for n, ps in deltas.items() if ps and n not in self.progress.reached}
        self.progress.reached += [n for n, ps in missing.items() if any(p.grad is not None and p.grad.any() for p in ps)]
        lost = [n for n in missing if n not in self.progress.reached]
        if not lost or step + 1 != min(WATCHED, self.plan.total):
            return
        told = f"no gradient reached {', '.join(lost[:3])} ({len(lost)} of {len(deltas)} adapted layers) in {step + 1} steps"
        if list(self.adapted.targets) == ["all"] and len(lost) < len(deltas):
            log.warning("%s: the loss does not depend on them, so they stay as they are", told)  # CLIP's last norm, say
        else:
            raise UserError(f"{told}: the model does not call them; name other target_modules")

    def _note(self, row: dict[str, float]) -> None:
        every = max(1, math.ceil(self.plan.total / 200))
        if self.progress.step % every == 0 or self.progress.step == self.plan.total:
            self.progress.curve.append(row)
        self.watch(row)

    def _evaluate(self) -> None:
        metrics, _ = score(self.adapted, self.task, "selection", self.config.eval_batch_size, self.accelerator)
        found = {"step": self.progress.step, "selection": metrics}
        self.progress.evaluations.append(found)
        value = metrics.get(self.task.selects)
        best = self.progress.best
        if value is not None and (best is None or value > best["selection"][self.task.selects]):
            self.progress.best = found
            if self.config.keep == "best":
                self.checkpoints.save_best()


@contextlib.contextmanager
def checkpointing(adapted: Adapted, on: bool) -> Iterator[None]:
    """Gradient checkpointing while it lasts; never re-entrant (stored auxiliary losses would be silently wrong)."""
    if not on:
        yield
        return
    model: Any = adapted.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"{type(model).__name__} has no gradient checkpointing: train.gradient_checkpointing=false")
    cache = getattr(model.config, "use_cache", None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        if cache is not None:
            model.config.use_cache = cache
