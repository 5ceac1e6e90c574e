"""A tiny random BERT (nn.Linear) and GPT-2 (Conv1D) with task heads, square and non-square targets, wide initial weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from support import needs_head, on_linear, perturb, small
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from lorafactory import Adapted, attach, registry

IDS = torch.arange(12).reshape(2, 6) + 1
_g = torch.Generator().manual_seed(0)
BATCHES = [{"input_ids": torch.randint(1, 50, (16, 6), generator=_g), "labels": torch.arange(16) % 3} for _ in range(5)]


def bert() -> Any:
    sizes = dict(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return _biased(BertForSequenceClassification(BertConfig(**sizes, **off, initializer_range=0.2, num_labels=3)))


def gpt2() -> Any:
    sizes = dict(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=16, pad_token_id=0, num_labels=3)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return _biased(GPT2ForSequenceClassification(GPT2Config(**sizes, **off, initializer_range=0.15)))


@torch.no_grad()
def _biased(model: Any) -> Any:
    for n, p in model.named_parameters():
        if n.endswith("bias"):  # zero at first, and what is scaled wrongly would not show
            p.normal_(0, 0.2)
    return model.eval()


MODELS: dict[str, Any] = {
    "bert": (bert, ["query", "output.dense", "intermediate.dense"]),
    "gpt2": (gpt2, ["c_attn", "c_fc", "c_proj"]),
}


def adapt(kind: str, spelling: str, **options: Any) -> Adapted:
    """Attached, begun and perturbed, heads too."""
    base, targets = MODELS[kind]
    torch.manual_seed(0)
    made = {k: v for k, v in small(spelling).items() if k != "trained_modules"}
    structure = registry.parse(spelling)[0].name
    if on_linear(structure) and not needs_head(structure):
        made["target_modules"] = targets
    made |= options
    adapted = attach(base(), spelling, batches=BATCHES, seed=1, **made).eval()
    perturb(adapted.adapter, 0.3)
    return adapted


def bare(adapted: Adapted) -> Any:
    """A copy of the base as it was."""
    return copy.deepcopy(adapted).detach()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return float((a - b).abs().max() / b.abs().max())
