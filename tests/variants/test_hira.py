import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base, updates
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import attach

SMALL = {"alpha": 32.0}  # else its updates, W0 times what LoRA's are, are small in a short run
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def test_equation_by_hand():
    """W0 = [[1, 2, 0], [3, 4, 5]], B = [1; -1], A = [2, 3, 4]: W0 * B A = [[2, 6, 0], [-6, -12, -20]]."""
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]))
    adapted = attach(nn.Sequential(module), "hira", rank=1)
    low = adapted.adapter.deltas["0"].hadamard
    with torch.no_grad():
        low.B.copy_(torch.tensor([[1.0], [-1.0]]))
        low.A.copy_(torch.tensor([[2.0, 3.0, 4.0]]))
    update = torch.tensor([[2.0, 6.0, 0.0], [-6.0, -12.0, -20.0]])
    assert float(low.scale) == 1.0 and close(updates(adapted)[0], update)
    x = torch.randn(4, 3)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_sum_over_ranks(transposed):
    """h = W0 x + sum_k B_k * W0 (A_k * x), in one product or beside the base's."""
    adapted = attach(Net(transposed).double(), "hira", rank=3, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        x, w, low = torch.randn(6, s.d_in, dtype=torch.float64), s.base.weight, d.hadamard
        want = sum(low.B[:, k] * F.linear(low.A[k] * x, w) for k in range(3))
        assert want.abs().max() > 1e-2
        assert close(d(x, s.base), s.base(x) + want) and close(d.update(x, s.base, None), want)


def test_a_base_of_ones_is_lora_without_scale():
    base, x = nn.Sequential(nn.Linear(12, 20)), torch.randn(5, 12)
    with torch.no_grad():
        base[0].weight.fill_(1.0)
    hira = attach(copy.deepcopy(base), "hira", rank=3)
    lora = attach(copy.deepcopy(base), "lora", rank=3, alpha=3.0)
    perturb(lora.adapter, 1.0)
    hira.adapter.deltas["0"].hadamard.load_state_dict(lora.adapter.deltas["0"].low_rank.state_dict())
    assert close(hira(x), lora(x)) and not close(hira(x), base(x))


def test_what_is_zero_in_the_base_stays_zero_B65():
    base = Net()
    with torch.no_grad():
        base.fc1.weight[3] = 0
        base.fc1.weight[:, 5] = 0
    adapted = attach(base, "hira", rank=4, **TARGETS)
    perturb(adapted.adapter, 1.0)
    zero = base.fc1.weight == 0
    adapted(torch.randn(9, 24)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapted.adapter.parameters())
    adapted.merge()
    assert zero.sum() > 60 and not base.fc1.weight[zero].any() and base.fc1.weight[~zero].all()


def test_rank_is_up_to_the_bases_times_its_own():
    base = nn.Sequential(nn.Linear(24, 40))
    for of_base, rank in ((2, 3), (3, 1), (4, 4), (24, 2)):
        with torch.no_grad():
            base[0].weight.copy_(torch.randn(40, of_base) @ torch.randn(of_base, 24))
        adapted = attach(copy.deepcopy(base).double(), "hira", rank=rank)
        perturb(adapted.adapter, 1.0)
        assert int(torch.linalg.matrix_rank(updates(adapted)[0], rtol=1e-6)) == min(of_base * rank, 24)


def test_merging_brings_the_base_back_where_no_division_could():
    base = nn.Sequential(nn.Linear(6, 6))
    adapted = attach(copy.deepcopy(base), "hira", rank=1)
    low = adapted.adapter.deltas["0"].hadamard
    with torch.no_grad():
        low.B.fill_(-1.0)
        low.A.fill_(1.0)  # 1 + B A = 0
    adapted.merge()
    assert not adapted.model[0].weight.any()
    assert torch.equal(adapted.detach()[0].weight, base[0].weight)


def test_gradients_are_those_of_the_weight_times_the_base():
    adapted = attach(nn.Sequential(nn.Linear(5, 7)).double(), "hira", rank=2)
    perturb(adapted.adapter, 1.0)
    low, w, x = adapted.adapter.deltas["0"].hadamard, adapted.model[0].weight, torch.randn(9, 5, dtype=torch.float64)
    y = torch.randn(9, 7, dtype=torch.float64)
    (adapted(x) * y).sum().backward()
    g = (y.T @ x) * w
    assert close(low.B.grad, g @ low.A.T) and close(low.A.grad, low.B.T @ g) and low.A.grad.any()


def test_dropout_is_of_what_the_update_reads():
    adapted = attach(Net(), "hira", rank=4, dropout=0.5, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    d, module, x = adapted.adapter.deltas["fc1"], adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    want = F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ (module.weight * d.hadamard.product()).T
    assert close(got, want)


@pytest.mark.parametrize("dtype, autocast", [("bfloat16", False), ("bfloat16", True), ("float32", True)])
def test_in_a_narrow_dtype_the_update_is_formed_apart(dtype, autocast):
    """1 + B A in bfloat16 is 1 where |B A| < 2^-9."""
    base, x = nn.Sequential(nn.Linear(24, 40)).to(getattr(torch, dtype)), torch.randn(9, 24).to(getattr(torch, dtype))
    adapted = attach(base, "hira", rank=2)
    d, b = adapted.adapter.deltas["0"], adapted.adapter.sites[0].base
    with torch.no_grad():
        d.hadamard.A.fill_(1.0)
        d.hadamard.B.fill_(2.0**-11)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        u, y = d.update(x, b, None), b(x)
        assert torch.equal(adapted(x), y + u.to(y.dtype))
    assert close(1024 * u, x.float() @ b.weight.float().T)


def test_an_alpha_scales_it():
    plain, scaled = (attach(Net(), "hira", rank=4, seed=1, **o, **TARGETS) for o in ({}, {"alpha": 12.0}))
    scaled.adapter.load_state_dict({n: t for n, t in plain.adapter.state_dict().items() if "scale" not in n}, strict=False)
    assert {float(d.hadamard.scale) for _, d in linear_sites(scaled)} == {3.0}
    for adapted in (plain, scaled):
        perturb(adapted.adapter, 1.0)
    pairs = zip(linear_sites(plain), linear_sites(scaled), strict=True)
    assert all(close(3 * a.hadamard.product(), b.hadamard.product()) for (_, a), (_, b) in pairs)


def test_counts():
    """As LoRA of the same rank: RoBERTa-base; Llama-3-8B's q, k, v, up, down at 32."""
    adapted = attach(copy.deepcopy(roberta_base()), "hira", rank=8, target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24 * 8 * (768 + 768)
    with torch.device("meta"):
        sizes = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32)
        llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=8, vocab_size=100, **sizes))
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    count = attach(llama, "hira", target_modules=targets, trained_modules=[]).num_trainable()
    assert count == 2 * 32 * (8192 + 2 * 5120 + 2 * 18432) == 2 * 1_769_472
