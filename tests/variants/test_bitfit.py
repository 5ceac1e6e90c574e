import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, cloned, close, perturb, roberta_base, same, train
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach

CHANGES = {"add_missing": ([True], {})}


def test_only_biases_move():
    base = Net()
    data, before = Regression(base), cloned(base.state_dict())
    adapted = attached("bitfit", base, data, trained_modules=["head"])
    train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
    biases = {"fc1": 40, "fc2": 24, "norm": 24}
    assert {k: list(d.delta.shape) for k, d in adapted.adapter.deltas.items()} == {k: [n] for k, n in biases.items()}
    assert all(d.delta.any() for d in adapted.adapter.deltas.values())
    adapted.merge()
    after = adapted.model.state_dict()
    moved = {n for n, t in after.items() if not torch.equal(t, before[n])}
    assert moved == {"fc1.bias", "fc2.bias", "norm.bias", "head.weight", "head.bias"}
    assert same(adapted.detach().state_dict(), before)


def test_by_hand():
    adapted = attach(nn.Sequential(nn.Linear(2, 3)), "bitfit")
    x = torch.randn(4, 2)
    y = adapted(x).detach()
    with torch.no_grad():
        adapted.adapter.deltas["0"].delta.copy_(torch.tensor([1.0, -2.0, 0.5]))
    assert close(adapted(x), y + torch.tensor([1.0, -2.0, 0.5]))


@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 5, 5)),
        (nn.Conv1d(4, 4, 3, padding=1, groups=4), (2, 4, 4)),
        (nn.BatchNorm2d(5), (2, 5, 5, 5)),
        (nn.BatchNorm1d(5), (5, 5)),
        (nn.GroupNorm(5, 5), (5, 5, 5)),
        (nn.LayerNorm([4, 5]), (5, 4, 5)),
    ],
)
def test_biases_of_other_layers_B04(module, shape):
    """On outputs whose other dimensions are as large as the channels: a bias along the wrong one would not fail."""
    plain = nn.Sequential(module).eval()
    adapted, x = attach(copy.deepcopy(plain), "bitfit"), torch.randn(shape)
    delta = adapted.adapter.deltas["0"].delta
    with torch.no_grad():
        delta.normal_()
        plain[0].bias.add_(delta)
    assert close(adapted(x), plain(x))
    assert close(adapted.bake()(x), plain(x))


def test_counts_on_roberta():
    """All biases, and the half-size choice of queries and first feed-forward layers."""
    assert attach(copy.deepcopy(roberta_base()), "bitfit").cost()["adapter_parameters"] == 102_144
    half = attach(copy.deepcopy(roberta_base()), "bitfit", target_modules=["query", "intermediate.dense"])
    assert half.cost()["adapter_parameters"] == 12 * (768 + 3072)


def test_a_layer_without_a_bias_is_refused_by_name_or_gets_one():
    with pytest.raises(UserError, match="fc3 .1 of 2 targets. have no bias: add_missing=true"):
        attach(Net(), "bitfit", target_modules=["fc1", "fc3"])
    assert "fc3" not in attach(Net(), "bitfit").adapter.deltas, "`all` is every bias that there is"
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    llama, ids = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), torch.randint(3, 50, (2, 5))
    keys = set(llama.state_dict())
    with pytest.raises(UserError, match="and more .8 of 8 targets. have no bias"):
        attach(llama, "bitfit")
    y0 = llama(ids).logits
    adapted = attach(llama, "bitfit", target_modules="all-linear", add_missing=True)
    assert torch.equal(adapted(ids).logits, y0) and adapted.num_trainable() == 4 * 16 + 2 * 24 + 16
    perturb(adapted.adapter, 1.0)
    y = adapted(ids).logits.detach()
    adapted.merge()
    assert close(adapted(ids).logits, y, 2) and not close(y, y0)
    assert set(adapted.model.state_dict()) > keys
    adapted.unmerge()
    assert set(adapted.detach().state_dict()) == keys and torch.equal(llama(ids).logits, y0)


def test_biases_are_not_decayed_and_a_keys_bias_has_no_gradient():
    """softmax(q (k + c)) is softmax(q k): expected, not a fault."""
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    adapted = attach(BertModel(BertConfig(**sizes, initializer_range=0.3)).eval(), "bitfit", trained_modules=[])
    adapted(torch.randint(0, 50, (3, 7))).last_hidden_state.cos().sum().backward()
    size = {s.name: float(adapted.adapter.deltas[s.key].delta.grad.abs().max()) for s in adapted.adapter.sites[:-1]}
    key = next(n for n in size if n.endswith("key"))
    assert size.pop(key) < 1e-4 < 1e-2 < min(size.values())
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3, weight_decay=0.5), 1)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0}
