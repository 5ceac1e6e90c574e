"""What is compared: the bare model, ours, and the counterpart, each as a function that takes one training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import lorafactory
from lorafactory import registry, targets
from lorafactory.adapter import Delta

ROWS, TOKENS, BATCHES = 16, 48, 4
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "fused": True}  # every side's, as lorafactory/train.py has it
Batch = dict[str, torch.Tensor]


@dataclass
class Side:
    """step(batch): forward, backward, optimiser step. trainable: how many numbers, the head's included."""

    step: Callable[[Batch], None]
    trainable: int


def batches(model: Any, size: tuple[int, int] = (ROWS, TOKENS)) -> list[Batch]:
    """Full rows of random tokens with labels, the same at every call; what is trained on and what starts see."""
    g, c = torch.Generator().manual_seed(0), model.config
    made = []
    for _ in range(BATCHES):
        ids = torch.randint(5, c.vocab_size, size, generator=g)
        labels = torch.randint(0, c.num_labels, (size[0],), generator=g)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **ADAMW)


def config_of(spelling: str, rank: int) -> Any:
    """The variant's config; what has a rank gets this one."""
    known = registry.parse(spelling)[0].Config.__dataclass_fields__
    return registry.config(spelling, **({"rank": rank} if "rank" in known else {}))


def layers(model: nn.Module, config: Any) -> list[str]:
    """Dotted names of what the config adapts."""
    heads = targets.head_modules(model)
    return [s.name for s in targets.find(model, config.target_modules, heads, registry.chosen(config)[0].fits).sites]


def bare(model: nn.Module) -> Side:
    """The model as it is, training its head alone."""
    model.requires_grad_(False)
    for head in targets.head_modules(model):
        model.get_submodule(head).requires_grad_(True)
    return plain(model)


def norms(model: nn.Module) -> Side:
    """The model's norms and head alone: gradients pass through every layer, as they must for an adapter."""
    made = bare(model)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.requires_grad_(True)
    return plain(model) if made.trainable else made


def plain(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, after: Callable[[], None] | None = None
) -> Side:
    """Whatever of the model requires gradients, in a plain loop; after(): what the loop must call after each step."""
    params = [p for p in model.parameters() if p.requires_grad]
    chosen = optimizer or adamw(params)
    model.train()

    def step(batch: Batch) -> None:
        model(**batch).loss.backward()
        chosen.step()
        if after is not None:
            after()
        chosen.zero_grad()

    return Side(step, sum(p.numel() for p in params))


def dense(model: nn.Module, config: Any, total: int) -> Side | None:
    """Ours, each layer by its definition, (V x) + bias with V = W0 + the whole update formed in every pass. None where
    that is not the variant: it has no weight, or trains one."""
    adapted = lorafactory.attach(model, config, batches=batches(model), seed=0)
    deltas = adapted.adapter.deltas
    found = [(s, deltas[s.key]) for s in adapted.adapter.sites if s.is_linear and s.key in deltas]
    if not found or not adapted.adapter.mergeable or any(d.replaces or type(d).weight is Delta.weight for _, d in found):
        return None
    for _, delta in found:
        delta.forward = lambda x, base, delta=delta: F.linear(x, delta.weight(base), delta.bias(base))
    return stepping(adapted, total)


def ours(model: nn.Module, config: Any, total: int) -> Side:
    """lorafactory's variant in the same plain loop. total: optimiser steps that will be taken."""
    return stepping(lorafactory.attach(model, config, batches=batches(model), seed=0), total)


def stepping(adapted: lorafactory.Adapted, total: int) -> Side:
    adapted.train()
    optimizer = adapted.optimizer(adamw, total)

    def step(batch: Batch) -> None:
        adapted.adapter.before_forward(batch)
        (adapted(**batch).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Side(step, adapted.num_trainable())
