import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, Regression, adamw, attached, cloned, close, perturb, roberta_base, same, train
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from lorafactory import UserError, attach

SIZES = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)


def test_only_norms_move():
    base = Net()
    data, before = Regression(base), cloned(base.state_dict())
    adapted = attached("ln_tuning", base, data, trained_modules=["head"])
    train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
    assert list(adapted.adapter.deltas) == ["norm"] and adapted.cost()["adapter_parameters"] == 2 * 24
    adapted.merge()
    after = adapted.model.state_dict()
    moved = {n for n, t in after.items() if not torch.equal(t, before[n])}
    assert moved == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert same(adapted.detach().state_dict(), before)


def test_by_hand():
    """x = (1, 3): normed (-1, 1); gain (2, 5), bias (1, 0): (-1, 5)."""
    adapted = attach(nn.Sequential(nn.LayerNorm(2, eps=0.0)), "ln_tuning")
    copy = adapted.adapter.deltas["0"].module
    x = torch.tensor([[1.0, 3.0]])
    assert close(adapted(x), torch.tensor([[-1.0, 1.0]]))
    with torch.no_grad():
        copy.weight.copy_(torch.tensor([2.0, 5.0]))
        copy.bias.copy_(torch.tensor([1.0, 0.0]))
    assert close(adapted(x), torch.tensor([[-1.0, 5.0]]))
    with adapted.disabled() as plain:
        assert close(plain(x), torch.tensor([[-1.0, 1.0]]))


def models():
    yield "bert", BertModel, BertConfig(vocab_size=50, **SIZES), 5, True
    yield "llama", LlamaModel, LlamaConfig(vocab_size=50, **SIZES), 5, False
    yield "t5", T5Model, T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2), 12, False
    yield "vit", ViTModel, ViTConfig(image_size=32, **SIZES), 5, True


@pytest.mark.parametrize("kind, cls, config, count, bias", list(models()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_norm_of_a_model_is_found(kind, cls, config, count, bias):
    """The last one too; an RMSNorm has a gain alone."""
    with torch.device("meta"):
        base = cls(config)
    adapted = attach(base, "ln_tuning")
    names = [s.name for s in adapted.adapter.sites]
    assert len(names) == count and all("norm" in n.lower() for n in names)
    assert adapted.num_trainable() == count * 8 * (2 if bias else 1)


def test_a_perturbed_model_is_the_merged_one_and_the_base_waits():
    torch.manual_seed(0)
    base = LlamaModel(LlamaConfig(vocab_size=50, initializer_range=0.3, **SIZES)).eval()
    before, ids = cloned(base.state_dict()), torch.randint(0, 50, (2, 5))
    y0 = base(ids).last_hidden_state
    adapted = attach(base, "ln_tuning")
    assert torch.equal(adapted(ids).last_hidden_state, y0)
    perturb(adapted.adapter, 0.5)
    y = adapted(ids).last_hidden_state.detach()
    assert not close(y, y0, 100)
    last = adapted.adapter.deltas["norm"].module
    seen = []
    hook = last.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    assert close(adapted(ids).last_hidden_state, last.weight * F.rms_norm(seen[0], (8,), eps=last.variance_epsilon))
    hook.remove()
    adapted.merge()
    assert torch.equal(adapted(ids).last_hidden_state, y)
    assert same(adapted.detach().state_dict(), before)


def test_counts():
    """RoBERTa-base: 25 LayerNorms, beside its head; LLaMA-7B: 65 gains."""
    assert attach(copy.deepcopy(roberta_base()), "ln_tuning").cost()["adapter_parameters"] == 2 * 768 * 25 == 38_400
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=64, num_hidden_layers=32))
    assert attach(llama, "ln_tuning").num_trainable() == 65 * 4096 == 266_240


def test_what_is_no_norm_is_refused():
    with pytest.raises(UserError, match="fc1, a Linear that this variant cannot adapt"):
        attach(Net(), "ln_tuning", target_modules=["fc1"])
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), nn.BatchNorm1d(4))
    with pytest.raises(UserError, match="'all' matches no module"):
        attach(plain, "ln_tuning")


def test_gains_are_not_decayed():
    adapted = attach(Net(), "ln_tuning")
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3, weight_decay=0.5), 1)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0}, "decay would pull a gain from 1 to 0"


def test_some_of_the_norms():
    """Named as any layer is named."""
    with torch.device("meta"):
        base = LlamaModel(LlamaConfig(vocab_size=50, **SIZES))
    adapted = attach(base, "ln_tuning", target_modules=["input_layernorm"])
    assert [s.name for s in adapted.adapter.sites] == [f"layers.{i}.input_layernorm" for i in range(2)]
