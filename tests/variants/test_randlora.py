import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import Net, close, linear_sites, perturb, roberta_base, updates
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, load
from lorafactory.adapter import Peft

SMALL = {"scale": 20.0}
CHANGES = {
    "form": (["product"], {}),
    "basis": (["normal", "sparse"], {}),
    "sparsity": ([2.0], {"basis": "sparse"}),
}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def bank_of(adapted):
    return adapted.adapter.structure.bank


def put(adapted, name, *values):
    d = adapted.adapter.deltas[name]
    with torch.no_grad():
        for mine, value in zip((d.Lambda, d.Gamma, bank_of(adapted).A, bank_of(adapted).B), values, strict=True):
            mine.copy_(torch.tensor(value))


@pytest.mark.parametrize("wide", [False, True])
def test_equation_by_hand(wide):
    """rank 1, two terms: s (B_1 l_1 A diag(g_1) + B_2 l_2 A diag(g_2)), on the smaller side whichever that is.

    A = [1, 2]; l = 1, -1; g_1 = (1, 3), g_2 = (2, 1): U = [[1, 6], [-2, -2]]; B's columns (1, 0, 2) and (0, 1, 1);
    s = 2 / sqrt(2): s [[1, 6], [-2, -2], [0, 10]]."""
    module = nn.Linear(3, 2) if wide else nn.Linear(2, 3)
    adapted = attach(nn.Sequential(module), "randlora", rank=1)
    put(adapted, "0", [[1.0, -1.0]], [[1.0, 3.0], [2.0, 1.0]], [[1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    k = math.sqrt(2) * torch.tensor([[1.0, 6.0], [-2.0, -2.0], [0.0, 10.0]])
    assert close(updates(adapted)[0], k.T if wide else k)
    x = torch.randn(4, module.in_features)
    assert close(adapted(x), F.linear(x, module.weight + (k.T if wide else k), module.bias))


@pytest.mark.parametrize("share_a", [True, False])
@pytest.mark.parametrize("form", ["sum", "product"])
def test_explicit_sum_over_terms_and_gradients(form, share_a):
    """B_j is every n-th column; in float64, outputs and gradients of the dense form."""
    adapted = attach(Net().double(), "randlora", rank=5, form=form, share_a=share_a, **TARGETS)
    perturb(adapted.adapter, 1.0)
    bank = bank_of(adapted)
    assert bank.A.shape == (5 if share_a else 40, 40) and bank.B.shape == (40, 40)
    for s, d in linear_sites(adapted):
        n, small, large = -(-24 // 5), 24, max(s.d_in, s.d_out)
        assert d.Lambda.shape == (5, n) and d.Gamma.shape == (n, small)
        columns, rows = bank.B[:large, : 5 * n], bank.A[: 5 * (1 if share_a else n), :small]
        b = [columns[:, j::n] for j in range(n)]
        a = [rows if share_a else rows[j::n] for j in range(n)]
        left = [b[j] * d.Lambda[:, j] for j in range(n)]
        right = [a[j] * d.Gamma[j] for j in range(n)]
        k = sum(p @ q for p, q in zip(left, right, strict=True)) if form == "sum" else sum(left) @ sum(right)
        want = 2 / math.sqrt(n) * (k if s.d_out >= s.d_in else k.T)
        x = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True)
        y, z = d.update(x, s.base, None), F.linear(x, want)
        g = torch.randn_like(y)
        mine, true = (torch.autograd.grad(t, (d.Lambda, d.Gamma, x), g) for t in (y, z))
        assert close(y, z) and close(d.weight(s.base), s.base.weight + want) and want.abs().max() > 1e-3
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def ranks(**options):
    adapted = attach(Net().double(), "randlora", **options, **TARGETS)
    with torch.no_grad():
        for p in adapted.adapter.parameters():
            p.normal_()
    return [int(torch.linalg.matrix_rank(u, rtol=1e-10)) for u in updates(adapted)]


@pytest.mark.parametrize("basis", ["uniform", "normal"])
@pytest.mark.parametrize("rank", [1, 5, 8, 24, 60])
def test_the_update_has_full_rank(rank, basis):
    assert ranks(rank=rank, basis=basis) == [24, 24, 24]


def test_a_sparse_base_of_small_rank_misses_what_is_zero_in_all_its_rows():
    for rank, full in ((1, False), (4, False), (30, True)):
        options = {"rank": rank, "basis": "sparse", **TARGETS}
        reached = int(bank_of(attach(Net(), "randlora", **options)).A[:, :24].any(0).sum())
        assert ranks(rank=rank, basis="sparse") == [reached] * 3 and (reached == 24) == full
    assert ranks(rank=4, basis="sparse", share_a=False) == [24, 24, 24]


def test_the_controls_have_less_rank():
    assert ranks(rank=4, coverage=0.5) == [12, 12, 12]
    assert ranks(rank=4, coverage=0.01) == [4, 4, 4]
    assert ranks(rank=4, form="product") == [4, 4, 4]
    product, whole = (attach(Net(), "randlora", rank=4, form=f, **TARGETS).num_trainable() for f in ("product", "sum"))
    assert product == whole


def test_one_term_of_full_rank_is_b_lambda_a_gamma():
    adapted = attach(nn.Sequential(nn.Linear(6, 9)), "randlora", rank=6, by_terms=False, scale=3.0)
    perturb(adapted.adapter, 1.0)
    d, bank = adapted.adapter.deltas["0"], bank_of(adapted)
    assert d.Lambda.shape == (6, 1)
    assert close(updates(adapted)[0], 3 * bank.B * d.Lambda[:, 0] @ bank.A * d.Gamma[0])


def test_start_and_first_gradient():
    base, x = Net(), torch.randn(9, 24)
    adapted = attach(copy.deepcopy(base), "randlora", rank=4, **TARGETS)
    assert torch.equal(adapted(x), base(x))
    adapted(x).square().sum().backward()
    for _, d in linear_sites(adapted):
        assert not d.Lambda.any() and (d.Gamma == 1 / 24).all()
        assert d.Lambda.grad.all() and not d.Gamma.grad.any()
    assert (attach(Net(), "randlora", rank=1, target_modules=["fc1"]).adapter.deltas["fc1"].Gamma == 1 / 24).all()


def test_bases_have_unit_variance():
    for basis, s in (("uniform", None), ("normal", None), ("sparse", None), ("sparse", 2.0), ("sparse", 12.0)):
        adapted = attach(nn.Sequential(nn.Linear(160, 170)), "randlora", rank=16, basis=basis, sparsity=s)
        for t in (bank_of(adapted).A, bank_of(adapted).B):
            assert abs(float(t.mean())) < 0.1 and float(t.square().mean()) == pytest.approx(1, rel=0.15)
            if basis == "sparse":
                share = 2 / (s or 6)
                assert len(t.unique()) == (2 if s == 2 else 3)
                assert float((t != 0).float().mean()) == pytest.approx(share, rel=0.15)


def test_one_bank_serves_all_layers_and_is_not_saved(tmp_path):
    base, x = Net(), torch.randn(5, 24)
    for keep, share_a in ((False, True), (True, True), (False, False), (True, False)):
        adapted = attach(copy.deepcopy(base), "randlora", rank=5, save_bank=keep, share_a=share_a, **TARGETS)
        assert all(d.bank is bank_of(adapted) for _, d in linear_sites(adapted))
        perturb(adapted.adapter, 1.0)
        folder = adapted.save(tmp_path / f"{keep}{share_a}")
        saved = load_file(folder / "adapter.safetensors")
        held = 40 * 40 + (5 * 40 if share_a else 40 * 40) if keep else 0
        assert sum(t.numel() for t in saved.values()) == adapted.num_trainable() + 5 + 3 + held
        y = adapted(x)
        again = load(adapted.detach(), folder)
        assert torch.equal(again(x), y)
        again.detach()


@pytest.mark.parametrize("keep", [False, True])
def test_another_bank_is_refused_B21(keep, tmp_path):
    base = Net()
    attach(copy.deepcopy(base), "randlora", rank=5, save_bank=keep, **TARGETS).save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    state = load_file(file)
    for name, value in (("A", "damaged"), ("B", "damaged")) if keep else (("checksum", "bank_seed 0 draws another bank"),):
        changed = state[f"structure.bank.{name}"].clone()
        changed.view(-1)[3] += 1
        save_file({**state, f"structure.bank.{name}": changed}, file)
        with pytest.raises(UserError, match=value):
            load(base, tmp_path)
    if keep:
        save_file({**state, "structure.bank.B": torch.zeros(40, 45)}, file)
        with pytest.raises(UserError, match=r"B is \[40, 45\], not \[40, 40\]"):
            load(base, tmp_path)


def test_parts_that_disagree_are_refused():
    adapted = attach(Net(), "randlora", rank=5, **TARGETS)
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    for shape in ((4, 5), (5, 9)):
        state |= {"deltas.fc2.Lambda": torch.ones(shape), "deltas.fc2.Gamma": torch.ones(shape[1], 24)}
        with pytest.raises(UserError, match="deltas.fc2.Lambda is .*, the bank 5 by 8"):
            adapted.adapter.load(state)


def test_the_scale_is_saved_and_counts():
    plain, wide = (attach(Net(), "randlora", rank=5, seed=1, **o, **TARGETS) for o in ({}, {"scale": 6.0, "by_terms": False}))
    for adapted in (plain, wide):
        perturb(adapted.adapter, 1.0)
    assert {float(d.scale) for _, d in linear_sites(wide)} == {6.0}
    for a, b in zip(updates(plain), updates(wide), strict=True):
        assert close(3 * math.sqrt(5) * a, b)


def test_in_peft_s_words_all_layers_have_one_scale():
    """The layers' own are in Lambda."""
    adapted = attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 20), nn.Linear(20, 20)), "randlora", rank=4)
    perturb(adapted.adapter, 1.0)
    out = Peft()
    adapted.adapter.structure.to_peft(out)
    assert len({float(d.scale) for _, d in linear_sites(adapted)}) == 2
    for s, d in linear_sites(adapted):
        theirs = out.layers[s.name]["randlora_lambda"]
        assert close(theirs * out.fields["randlora_alpha"] / 4, d.Lambda * d.scale)
    for options in ({"form": "product"}, {"coverage": 0.5}, {"share_a": False}):
        with pytest.raises(UserError, match="PEFT has randlora as a sum over one A"):
            attach(Net(), "randlora", rank=4, **options).adapter.structure.to_peft(Peft())


def test_dropout_is_of_what_the_update_reads():
    adapted = attach(Net(), "randlora", rank=5, dropout=0.5, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    update, module, x = updates(adapted)[0], adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ update.T, 2)


def test_counts():
    """n (rank + small) a layer: RoBERTa-base's queries and values, rank 64; a grouped-query 3B Llama at 32."""
    adapted = attach(copy.deepcopy(roberta_base()), "randlora", rank=64, target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24 * 12 * (64 + 768) == 239_616
    sizes = dict(hidden_size=3072, intermediate_size=64, num_hidden_layers=28, num_attention_heads=24, head_dim=128)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=8, **sizes))
    adapted = attach(llama, "randlora", rank=32, target_modules=["q_proj", "v_proj"])
    assert adapted.num_trainable() == 28 * (297_984 + 33_792) == 9_289_728


def test_nonsense():
    wrong = ({"rank": 0}, {"scale": 0.0}, {"dropout": 1.0}, {"coverage": 0.0}, {"coverage": 1.1}, {"form": "mean"},
             {"basis": "binary"}, {"sparsity": 4.0}, {"sparsity": 1.0, "basis": "sparse"}, {"bank_seed": -1})  # fmt: skip
    for options in wrong:
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "randlora", **options)
