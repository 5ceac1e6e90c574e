"""The counterpart of a variant: HF PEFT's where it has one, else plain PyTorch; told by our config, layer for layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from _sides import ADAMW, Side, batches, plain
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.loraga import preprocess_loraga

from lorafactory import linalg, targets
from lorafactory.variants.ia3 import SECOND
from lorafactory.variants.vb_lora import LONGEST

Make = Callable[[Any, Any, list[str], int], Side]


@dataclass(frozen=True)
class Counterpart:
    """label: what it is; note: where it does other work than ours; make(model, config, layers, total steps)."""

    label: str
    note: str
    make: Make


COUNTERPARTS: dict[str, Counterpart] = {}


def counterpart(label: str, spelling: str, note: str = "") -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        COUNTERPARTS[spelling] = Counterpart(label, note, make)
        return make

    return add


def theirs(model: Any, spelling: str, config: Any, names: list[str], total: int) -> Side:
    """names: the layers that ours adapts; total: optimiser steps that it will take."""
    logging.getLogger("peft").setLevel(logging.ERROR)
    return COUNTERPARTS[spelling].make(model, config, names, total)


def common(model: Any, names: list[str]) -> dict[str, Any]:
    return {"target_modules": names, "modules_to_save": targets.head_modules(model), "task_type": "SEQ_CLS"}


def lora_config(model: Any, c: Any, names: list[str], **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=c.rank, lora_alpha=c.alpha, lora_dropout=c.dropout, **common(model, names), **more)


def option(label: str, spelling: str, **options: Any) -> None:
    """A variant that PEFT spells as an option of its LoRA."""

    @counterpart(label, spelling)
    def make(model: Any, c: Any, names: list[str], total: int) -> Side:
        return plain(peft.get_peft_model(model, lora_config(model, c, names, **options)))


option("PEFT LoRA", "lora")
option("PEFT LoRA, use_rslora", "rslora", use_rslora=True)
option("PEFT LoRA, use_dora", "dora", use_dora=True)
option("PEFT LoRA, pissa", "pissa", init_lora_weights="pissa")
option("PEFT LoRA, use_dora, pissa", "dora+pissa", use_dora=True, init_lora_weights="pissa")


@counterpart("PEFT LoRA, create_loraplus_optimizer", "lora_plus")
def lora_plus(model: Any, c: Any, names: list[str], total: int) -> Side:
    made = peft.get_peft_model(model, lora_config(model, c, names))
    return plain(made, create_loraplus_optimizer(made, torch.optim.AdamW, loraplus_lr_ratio=c.dynamics.ratio, **ADAMW))


def rows(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    """All positions of a layer's input; PEFT's own function expects [batch, tokens, d], and a pooler reads one token."""
    return (layer_input[0] if isinstance(layer_input, tuple) else layer_input).flatten(0, -2)


@counterpart("PEFT LoRA, eva", "eva", "PEFT goes round the batches until every layer's directions have settled")
def eva(model: Any, c: Any, names: list[str], total: int) -> Side:
    options = peft.EvaConfig(rho=c.init.rho, tau=c.init.tau, whiten=c.init.whiten)
    made = peft.get_peft_model(model, lora_config(model, c, names, init_lora_weights="eva", eva_config=options))
    data = [{k: v for k, v in b.items() if k != "labels"} for b in batches(model)]
    layers = [made.base_model.model.get_submodule(n) for n in names]
    # PEFT's hash of an input fails on a slice, such as a pooler's first token
    whole = [m.register_forward_pre_hook(lambda m, args: (args[0].contiguous(),)) for m in layers]
    peft.initialize_lora_eva_weights(made, data, prepare_layer_inputs_fn=rows, show_progress_bar=False)
    for hook in whole:
        hook.remove()
    return plain(made)


@counterpart(
    "PEFT LoRA, lora_ga",
    "lora_ga",
    "PEFT's base becomes W - s B A; ours keeps W and subtracts the start, four more thin products",
)
def lora_ga(model: Any, c: Any, names: list[str], total: int) -> Side:
    options = lora_config(model, c, names, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    preprocess_loraga(model, options, lambda: [model(**b).loss.backward() for b in batches(model)])
    return plain(peft.get_peft_model(model, options))


@counterpart("PEFT VeRA", "vera")
def vera(model: Any, c: Any, names: list[str], total: int) -> Side:
    return plain(peft.get_peft_model(model, peft.VeraConfig(r=c.rank, d_initial=c.d_initial, **common(model, names))))


@counterpart("PEFT RandLoRA", "randlora")
def randlora(model: Any, c: Any, names: list[str], total: int) -> Side:
    options = {"r": c.rank, "randlora_alpha": round(c.scale * c.rank), "randlora_dropout": c.dropout}
    return plain(peft.get_peft_model(model, peft.RandLoraConfig(**options, sparse=c.basis == "sparse", **common(model, names))))


@counterpart("PEFT VB-LoRA", "vb_lora")
def vb_lora(model: Any, c: Any, names: list[str], total: int) -> Side:
    layers = [model.get_submodule(n) for n in names]
    every = math.gcd(*(d for m in layers for d in (m.in_features, m.out_features)))
    length = c.vector_length or max(d for d in linalg.divisors(every) if d <= LONGEST)
    options = {"r": c.rank, "num_vectors": c.num_vectors, "vector_length": length, "topk": c.top_k}
    return plain(peft.get_peft_model(model, peft.VBLoRAConfig(**options, vblora_dropout=c.dropout, **common(model, names))))


@counterpart("PEFT IA3", "ia3")
def ia3(model: Any, c: Any, names: list[str], total: int) -> Side:
    second = [n for n in names if any(targets.matches(e, n) for e in c.feedforward_modules or [SECOND])]
    return plain(peft.get_peft_model(model, peft.IA3Config(**common(model, names), feedforward_modules=second)))


@counterpart("PEFT HiRA", "hira", "PEFT multiplies by W0 and by the update; ours once, by their sum")
def hira(model: Any, c: Any, names: list[str], total: int) -> Side:
    return plain(peft.get_peft_model(model, peft.HiraConfig(r=c.rank, hira_dropout=c.dropout, **common(model, names))))


def lycoris(model: Any, make: Any, c: Any, names: list[str], **more: Any) -> Side:
    options = {"r": c.rank, "alpha": c.alpha, "rank_dropout": c.rank_dropout, "module_dropout": c.module_dropout}
    return plain(peft.get_peft_model(model, make(**options, **common(model, names), **more)))


@counterpart("PEFT LoHa", "loha", "PEFT forms the update; ours does where that is cheaper than a pair of rank rank^2")
def loha(model: Any, c: Any, names: list[str], total: int) -> Side:
    return lycoris(model, peft.LoHaConfig, c, names)


@counterpart("PEFT LoKr", "lokr", "PEFT forms the update; ours multiplies by the two factors")
def lokr(model: Any, c: Any, names: list[str], total: int) -> Side:
    more = {"decompose_both": c.decompose_both, "decompose_factor": c.decompose_factor}
    return lycoris(model, peft.LoKrConfig, c, names, **more)
@counterpart("PEFT OFT", "oft", "PEFT writes the blocks out where one is shared")
def oft(model: Any, c: Any, names: list[str], total: int) -> Side:
    series = {"use_cayley_neumann": c.terms is not None} | ({"num_cayley_neumann_terms": c.terms} if c.terms else {})
    bound = {"coft": True, "eps": c.epsilon} if c.epsilon else {}
    options = peft.OFTConfig(oft_block_size=c.block_size, block_share=c.block_share, module_dropout=c.dropout,
                             **series, **bound, **common(model, names))  # fmt: skip
    return plain(peft.get_peft_model(model, options))


@counterpart("PEFT HRA", "hra", "PEFT forms the chain as a [d_in, d_in] matrix and multiplies the base by it")
def hra(model: Any, c: Any, names: list[str], total: int) -> Side:
    return plain(peft.get_peft_model(model, peft.HRAConfig(r=c.rank, apply_GS=c.orthonormal, **common(model, names))))


@counterpart("PEFT MiSS", "miss")
def miss(model: Any, c: Any, names: list[str], total: int) -> Side:
    form = {"init_weights": "bat"} if c.bat else {"init_weights": "mini", "mini_r": c.tile} if c.tile else {}
    return plain(peft.get_peft_model(model, peft.MissConfig(r=c.rank, miss_dropout=c.dropout, **form, **common(model, names))))


@counterpart("PEFT SHiRA", "shira", "PEFT keeps a copy of every weight for its backward pass; ours forms it again")
def shira(model: Any, c: Any, names: list[str], total: int) -> Side:
    return plain(peft.get_peft_model(model, peft.ShiraConfig(r=c.rank, random_seed=0, **common(model, names))))


@counterpart("PEFT LN tuning", "ln_tuning")
def ln_tuning(model: Any, c: Any, names: list[str], total: int) -> Side:
    return plain(peft.get_peft_model(model, peft.LNTuningConfig(**common(model, names))))


@counterpart("PEFT DeLoRA", "delora")
def delora(model: Any, c: Any, names: list[str], total: int) -> Side:
    options = peft.DeloraConfig(r=c.rank, delora_lambda=c.bound, module_dropout=c.dropout, **common(model, names))
    return plain(peft.get_peft_model(model, options))


def spectral(model: Any, make: Any, c: Any, names: list[str], **more: Any) -> Side:
    options = {"n_frequency": c.n, "scaling": c.scale, "random_loc_seed": c.position_seed}
    return plain(peft.get_peft_model(model, make(**options, **common(model, names), **more)))


@counterpart("PEFT FourierFT", "fourierft", "PEFT forms the update, ours only where n is large; PEFT draws positions a layer")
def fourierft(model: Any, c: Any, names: list[str], total: int) -> Side:
    return spectral(model, peft.FourierFTConfig, c, names, init_weights=c.start == "zero")


@counterpart("PEFT WaveFT", "waveft", "PEFT forms the update, ours only where n is large; PEFT draws positions a layer")
def waveft(model: Any, c: Any, names: list[str], total: int) -> Side:
    more = {"use_idwt": c.wavelet is not None, "wavelet_family": c.wavelet or "db1"}
    return spectral(model, peft.WaveFTConfig, c, names, **more)


@counterpart("PEFT C3A", "c3a", "PEFT transforms as if x were complex, twice the work")
def c3a(model: Any, c: Any, names: list[str], total: int) -> Side:
    layers = {n: model.get_submodule(n) for n in names}
    sizes = {n: c.block_size or math.gcd(m.in_features, m.out_features) for n, m in layers.items()}
    start = {"xavier": "xavier_uniform", "kaiming": "kaiming_uniform", "normal": "gaussian", "zero": True}[c.start]
    options = peft.C3AConfig(block_size=1, block_size_pattern=sizes, init_weights=start, **common(model, names))
    return plain(peft.get_peft_model(model, options))


@counterpart("PEFT AdaLoRA", "adalora", "PEFT averages norms in its penalty, ours sums their squares, as the paper")
def adalora(model: Any, c: Any, names: list[str], total: int) -> Side:
    b = c.budget
    options = peft.AdaLoraConfig(
        init_r=c.rank, target_r=round(c.rank / 1.5 if b.target is None else b.target), deltaT=b.every,
        tinit=round(b.warmup * total), tfinal=round(b.final * total), total_step=total, beta1=b.beta1, beta2=b.beta2,
        orth_reg_weight=b.penalty, lora_alpha=c.alpha, lora_dropout=c.dropout, **common(model, names),
    )  # fmt: skip
    made = peft.get_peft_model(model, options)
    done = iter(range(total))
    return plain(made, after=lambda: made.base_model.update_and_allocate(next(done)))


@counterpart("plain PyTorch, every parameter", "full")
def full(model: Any, c: Any, names: list[str], total: int) -> Side:
    return plain(model.requires_grad_(True))


@counterpart(
    "plain PyTorch, biases and head",
    "bitfit",
    "ours adds the change to a layer's output; there it is in the layer's own bias",
)
def bitfit(model: Any, c: Any, names: list[str], total: int) -> Side:
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).bias.requires_grad_(True)
    for head in targets.head_modules(model):
        model.get_submodule(head).requires_grad_(True)
    return plain(model)
