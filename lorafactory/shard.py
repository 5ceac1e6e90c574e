"""A base whose numbers lie spread over the processes (FSDP2): each holds its share, and a block's are gathered while it
runs. The adapter stays whole in every process, for its shapes may change.

Starts that read the base (an SVD, gradients) have run by then, on the whole base in each process, so they give what one
process gives. What would need whole weights later, merge() and detach(), is refused."""

from __future__ import annotations

import os

import torch.nn as nn
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from .attach import Adapted
from .errors import UserError


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def refuse_one(kind: str | None, accelerator: Accelerator) -> None:
    """Raises UserError where the option would have no effect."""
    if kind and accelerator.num_processes == 1:
        raise UserError(f"train.shard={kind} needs several processes, this is one: torchrun --nproc_per_node=2 -m lorafactory …")


def refuse_plugins() -> None:
    """Raises UserError where Accelerate was told to wrap the model: the loop does not hand it one."""
    for engine, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(f"Accelerate's {engine} plug-in would do nothing here: launch without it, with train.shard=fsdp2")


def shard(adapted: Adapted, accelerator: Accelerator) -> None:
    """Spread the base of a model that has begun. For good: nothing makes it whole again."""
    model = adapted.model
    unread = {p for m, delta in adapted.mount.held if delta.replaces for p in m.parameters()}
    if unread >= set(model.parameters()):
        raise UserError(f"train.shard: nothing is left to shard, for {adapted.variant} replaces every weight of the base")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=unread)
    fully_shard(model, mesh=mesh, ignored_params=unread)
    adapted.adapter.to(accelerator.device)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered at once, inner ones first: the layers that transformers says are not to be split, else every
    entry of a list."""
    whole, modules = set(getattr(model, "_no_split_modules", None) or ()), list(model.modules())[::-1]
    found = [m for m in modules if type(m).__name__ in whole]
    return found or [m for parent in modules if isinstance(parent, nn.ModuleList) for m in parent]


def local_bytes(model: nn.Module) -> int:
    """Of the base's numbers, what this process holds."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]  # type: ignore[operator]
    return sum(p.numel() * p.element_size() for p in local)
