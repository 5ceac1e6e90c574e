import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from support import Net, Regression, adamw, attached, close, linear_sites, perturb, roberta_base, train
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, load

SMALL = {"vector_length": 8, "num_vectors": 12, "bound": 0.3}
FINE = {"bound": 0.02}
CHANGES = {"vector_length": ([4], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
HERE = {**SMALL, "rank": 3, **TARGETS}


def bank_of(adapted):
    return adapted.adapter.structure.bank


def test_equation_by_hand():
    """Vectors (1, 2), (3, 4), (5, 6). A, one row: 1/4 of the first and 3/4 of the second; then the third and the second
    alike. B: the two columns have the first vector in the upper half, halves of first and third in the lower."""
    module = nn.Linear(4, 4)
    adapted = attach(nn.Sequential(module), "vb_lora", rank=1, num_vectors=3, vector_length=2, top_k=2)
    d, log3, low = adapted.adapter.deltas["0"], torch.tensor(3.0).log(), -100.0
    with torch.no_grad():
        bank_of(adapted).vectors.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        d.logits_A.copy_(torch.tensor([[[0.0, log3, -1.0], [low, 7.0, 7.0]]]))
        d.logits_B.copy_(torch.tensor([[[100.0, 0.0, -1.0]], [[2.0, 1.9, 2.0]]]))
    b, a = d.factors()
    assert close(a, torch.tensor([[2.5, 3.5, 4.0, 5.0]])) and close(b, torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    x = torch.randn(5, 4)
    assert close(adapted(x), F.linear(x, module.weight + b @ a, module.bias))


def dense(vectors, logits, k):
    """Softmax over all vectors, those beyond the top k at minus infinity."""
    kept = logits >= logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(~kept, float("-inf")).softmax(-1) @ vectors


@pytest.mark.parametrize("k", [1, 2, 12])
def test_outputs_and_gradients_are_those_of_a_masked_softmax(k):
    """k = 1: a row of the bank itself; k = h: the whole softmax. In float64."""
    adapted = attach(Net().double(), "vb_lora", top_k=k, **HERE)
    perturb(adapted.adapter, 1.0)
    vectors = bank_of(adapted).vectors
    for s, d in linear_sites(adapted):
        assert d.logits_A.shape == (3, s.d_in // 8, 12) and d.logits_B.shape == (s.d_out // 8, 3, 12)
        a = torch.stack([torch.cat(list(dense(vectors, row, k))) for row in d.logits_A])
        b = torch.stack([torch.cat(list(dense(vectors, column, k))) for column in d.logits_B.unbind(1)], 1)
        x = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True)
        y, z = d.update(x, s.base, None), F.linear(x, b @ a)
        g = torch.randn_like(y)
        mine, true = (torch.autograd.grad(t, (d.logits_A, d.logits_B, vectors, x), g) for t in (y, z))
        assert close(y, z) and close(d.weight(s.base), s.base.weight + b @ a) and z.abs().max() > 1e-3
        assert all(close(m, t) for m, t in zip(mine, true, strict=True)) and mine[2].any()
        chosen = (mine[0] != 0).sum(-1)
        assert (chosen == (0 if k == 1 else k)).all(), "one weight is 1 whatever its logit"
        if k == 1:
            assert all((row == vectors).all(-1).any() for row in d.parts("A").flatten(0, 1))


def test_one_bank_serves_all_layers_and_is_saved_once(tmp_path):
    adapted = attach(Net(), "vb_lora", **HERE)
    assert all(d.bank is bank_of(adapted) for _, d in linear_sites(adapted))
    assert sum(p.shape == (12, 8) for p in adapted.adapter.parameters()) == 1
    adapted(torch.randn(5, 24)).square().sum().backward()
    alone = [attach(Net(), "vb_lora", **{**HERE, "target_modules": [n]}) for n in ("fc1", "fc2", "fc3")]
    assert bank_of(adapted).vectors.grad.any() and all(bank_of(a).vectors.shape == (12, 8) for a in alone)
    adapted.save(tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert sum(t.numel() for t in saved.values()) == adapted.num_trainable()


def test_start_is_small_and_not_zero():
    adapted = attach(nn.Sequential(nn.Linear(512, 512)), "vb_lora", rank=4)
    vectors, d = bank_of(adapted).vectors, adapted.adapter.deltas["0"]
    assert vectors.shape == (256, 256) and 0.019 < vectors.abs().max() <= 0.02
    assert float(d.logits_A.detach().std()) == pytest.approx(0.1, rel=0.1)
    b, a = d.factors()
    assert 0 < (b @ a).abs().max() < 4 * 0.02**2


def test_rank_is_at_most_its_own():
    adapted = attach(Net().double(), "vb_lora", **HERE)
    perturb(adapted.adapter, 1.0)
    found = [torch.linalg.matrix_rank(d.weight(s.base) - s.base.weight, rtol=1e-10) for s, d in linear_sites(adapted)]
    assert [int(r) for r in found] == [3, 3, 3]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_compact_keeps_the_function_and_no_logits(k, tmp_path):
    """h b numbers, and k indices and k - 1 weights a sub-vector; what trains is gone, and says so."""
    base = Net()
    data, x = Regression(base), torch.randn(6, 24)
    adapted = attached("vb_lora", base, data, rank=3, compact=True, top_k=k, **TARGETS)
    train(adapted, data, adapted.optimizer(adamw, 3), steps=3)
    perturb(adapted.adapter, 1.0)
    y = adapted(x).detach()
    assert adapted.end() and close(adapted(x), y)
    y = adapted(x).detach()
    adapted.save(tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    parts = 3 * sum((s.d_in + s.d_out) // 8 for s, _ in linear_sites(adapted))
    assert sum(t.numel() for t in saved.values()) == 12 * 8 + parts * (2 * k - 1)
    assert {t.dtype for n, t in saved.items() if "index" in n} == {torch.uint8}
    for other in ({"compact": True}, {}):
        again = attached("vb_lora", base, data, rank=2, top_k=k, **other, **TARGETS)
        again.adapter.load(adapted.adapter.state_dict())
        assert torch.equal(again(x), y) and same_kind(again, adapted)
        with pytest.raises(UserError, match="logits were not kept"):
            again.optimizer(adamw, 1)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y)
    whole = attached("vb_lora", base, data, rank=3, top_k=k, **TARGETS)
    again.adapter.load(whole.adapter.state_dict())
    assert torch.equal(again(x), whole(x)) and again.optimizer(adamw, 1)


def same_kind(a, b):
    return all(p.index_A.dtype == q.index_A.dtype for (_, p), (_, q) in zip(linear_sites(a), linear_sites(b), strict=True))


def test_indices_take_the_fewest_bytes():
    for h, kind in ((256, torch.uint8), (257, torch.int16), (40_000, torch.int32)):
        adapted = attach(nn.Sequential(nn.Linear(4, 4)), "vb_lora", num_vectors=h, vector_length=4, rank=1)
        d = adapted.adapter.deltas["0"]
        want = d.factors()
        d.compact()
        assert d.index_A.dtype == kind and all(close(p, q) for p, q in zip(d.factors(), want, strict=True))


def test_logits_learn_at_a_rate_of_their_own():
    adapted = attach(Net(), "vb_lora", **HERE)
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3), 1)
    rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates.pop(bank_of(adapted).vectors) == 1e-3 and set(rates.values()) == {1e-2} and len(rates) == 6


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "vb_lora", dropout=0.5, **HERE).train()
    perturb(adapted.adapter, 1.0)
    (b, a), module, x = adapted.adapter.deltas["fc1"].factors(), adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ a.T @ b.T)


def test_counts_and_the_default_length():
    """h b + rank (d_in + d_out) h / b a layer: a grouped-query 3B Llama; RoBERTa-base's feed-forward at 768 and 3072."""
    sizes = dict(hidden_size=3072, intermediate_size=64, num_hidden_layers=28, num_attention_heads=24, head_dim=128)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=8, **sizes))
    adapted = attach(llama, "vb_lora", target_modules=["q_proj", "v_proj"])
    assert adapted.num_trainable() == 65_536 + 28 * 40_960 == 1_212_416
    roberta = attach(copy.deepcopy(roberta_base()), "vb_lora", num_vectors=90, target_modules=["query", "intermediate.dense"])
    assert bank_of(roberta).vectors.numel() == 23_040
    assert bank_of(attach(Net(), "vb_lora", **TARGETS)).vectors.shape == (256, 8)


def test_nonsense():
    wrong = ({"rank": 0}, {"num_vectors": 0}, {"top_k": 0}, {"top_k": 13}, {"vector_length": 0}, {"vector_length": 16},
             {"bound": 0.0}, {"logits_std": -1.0}, {"logits_lr": -1.0}, {"dropout": 1.0})  # fmt: skip
    for options in wrong:
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "vb_lora", **{"num_vectors": 12, **options}, **TARGETS)


def test_parts_that_disagree_are_refused():
    adapted = attach(Net(), "vb_lora", **HERE)
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    for changed in (torch.ones(12, 4), torch.ones(11, 8)):
        with pytest.raises(UserError, match="not for a bank of"):
            adapted.adapter.load({**state, "structure.bank.vectors": changed})
    with pytest.raises(UserError, match="logits_A is missing"):
        adapted.adapter.load({n: t for n, t in state.items() if ".fc1.logits" not in n})
