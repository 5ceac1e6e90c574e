"""The counterpart of a variant: HF PEFT's where it has one, else plain PyTorch; told by our config, layer for layer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import peft
import torch.nn as nn
from _sides import LR, Side, adamw, batches, plain
from peft.optimizers import create_loraplus_optimizer

from lorafactory import targets

Make = Callable[[Any, Any, list[str], int], Side]
COUNTERPARTS: dict[str, tuple[str, Make]] = {}  # spelling -> (what it is, how it is made)


def counterpart(label: str, *spellings: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        COUNTERPARTS.update({s: (label, make) for s in spellings})
        return make

    return add


def theirs(model: Any, spelling: str, config: Any, names: list[str], total: int) -> Side:
    """names: the layers that ours adapts; total: optimiser steps that will be taken."""
    logging.getLogger("peft").setLevel(logging.ERROR)
    return COUNTERPARTS[spelling][1](model, config, names, total)


def common(model: Any, names: list[str]) -> dict[str, Any]:
    return {"target_modules": names, "modules_to_save": targets.head_modules(model), "task_type": "SEQ_CLS"}


def lora_config(model: Any, c: Any, names: list[str], **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=c.rank, lora_alpha=c.alpha, lora_dropout=c.dropout, **common(model, names), **more)


def with_options(label: str, spelling: str, **options: Any) -> None:
    """A variant that PEFT spells as an option of its LoRA."""

    @counterpart(label, spelling)
    def make(model: Any, c: Any, names: list[str], total: int) -> Side:
        return plain(peft.get_peft_model(model, lora_config(model, c, names, **options)))


with_options("PEFT LoRA", "lora")
with_options("PEFT LoRA, use_rslora", "rslora", use_rslora=True)
with_options("PEFT LoRA, use_dora", "dora", use_dora=True)
with_options("PEFT LoRA, pissa", "pissa", init_lora_weights="pissa")
with_options("PEFT LoRA, use_dora, pissa", "dora+pissa", use_dora=True, init_lora_weights="pissa")


@counterpart("PEFT LoRA, create_loraplus_optimizer", "lora_plus")
def lora_plus(model: Any, c: Any, names: list[str], total: int) -> Side:
    made = peft.get_peft_model(model, lora_config(model, c, names))
    optimizer = create_loraplus_optimizer(made, type(adamw([nn.Parameter()])), lr=LR, loraplus_lr_ratio=c.dynamics.ratio)
    return plain(made, optimizer)


@counterpart("PEFT LoRA, eva", "eva")
def eva(model: Any, c: Any, names: list[str], total: int) -> Side:
    options = peft.EvaConfig(rho=c.init.rho)
    made = peft.get_peft_model(model, lora_config(model, c, names, init_lora_weights="eva", eva_config=options))
    data = [{k: v for k, v in b.items() if k != "labels"} for b in batches(model)]
    peft.initialize_lora_eva_weights(made, data, show_progress_bar=False)
    return plain(made)


@counterpart("PEFT LoRA, lora_ga", "lora_ga")
def lora_ga(model: Any, c: Any, names: list[str], total: int) -> Side:
    from peft.tuners.lora.loraga import preprocess_loraga

    options = lora_config(model, c, names, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    preprocess_loraga(model, options, lambda: [model(**b).loss.backward() for b in batches(model, c.init.batches)])
    return plain(peft.get_peft_model(model, options))


@counterpart("PEFT VeRA", "vera")
def vera(model: Any, c: Any, names: list[str], total: int) -> Side:
    return plain(peft.get_peft_model(model, peft.VeraConfig(r=c.rank, d_initial=c.d_initial, **common(model, names))))


@counterpart("PEFT IA3", "ia3")
def ia3(model: Any, c: Any, names: list[str], total: int) -> Side:
    options = peft.IA3Config(**common(model, names), feedforward_modules=[])
    return plain(peft.get_peft_model(model, options))


@counterpart("PEFT AdaLoRA", "adalora")
def adalora(model: Any, c: Any, names: list[str], total: int) -> Side:
    options = peft.AdaLoraConfig(init_r=c.rank, target_r=c.rank // 2, lora_alpha=c.alpha, lora_dropout=c.dropout,
                                 total_step=total, **common(model, names))  # fmt: skip
    made = peft.get_peft_model(model, options)
    done = iter(range(total))
    return plain(made, after=lambda: made.base_model.update_and_allocate(next(done)))


@counterpart("plain PyTorch, every parameter", "full")
def full(model: Any, c: Any, names: list[str], total: int) -> Side:
    return plain(model.requires_grad_(True))


@counterpart("plain PyTorch, biases and head", "bitfit")
def bitfit(model: Any, c: Any, names: list[str], total: int) -> Side:
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).bias.requires_grad_(True)
    for head in targets.head_modules(model):
        model.get_submodule(head).requires_grad_(True)
    return plain(model)
