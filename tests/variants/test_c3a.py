import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base, updates
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach
from lorafactory.variants.c3a import C3ADelta

FINE = {"start": "zero"}
CHANGES = {"block_size": ([4], {}), "block_pattern": ([{"fc1": 2}], {}), "start": (["zero"], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def test_equation_by_hand():
    """[2, 4] of blocks [2, 2]: w = (4, 8) and (12, 0), each row the one above moved to the right, all over d_in = 4."""
    module = nn.Linear(4, 2)
    adapted = attach(nn.Sequential(module), "c3a", block_size=2)
    with torch.no_grad():
        adapted.adapter.deltas["0"].w.copy_(torch.tensor([[[4.0, 8.0], [12.0, 0.0]]]))
    update = torch.tensor([[1.0, 2.0, 3.0, 0.0], [2.0, 1.0, 0.0, 3.0]])
    assert close(updates(adapted)[0], update)
    x = torch.randn(5, 4)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


def test_each_row_is_moved_to_the_right():
    adapted = attach(nn.Sequential(nn.Linear(24, 16)).double(), "c3a", block_size=8)
    w, u = adapted.adapter.deltas["0"].w.detach(), updates(adapted)[0]
    for m in range(2):
        for n in range(3):
            block = u[8 * m : 8 * m + 8, 8 * n : 8 * n + 8]
            assert all(close(24 * block[k], w[m, n].roll(k)) for k in range(8))


@pytest.mark.parametrize("size", [None, 1, 2, 4, 8])
def test_fast_path_is_the_dense_product(size):
    """Outputs and gradients in float64; blocks of even and of odd size."""
    base = Net() if size else nn.Sequential(nn.Linear(45, 27))
    targets = TARGETS if size else {}
    adapted = attach(base.double(), "c3a", block_size=size, **targets)
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        assert d.w.shape[-1] == (size or 9)
        x = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True)
        got, want = d.update(x, s.base, None), F.linear(x, d.dense())
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, (d.w, x), g) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-3
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def test_no_update_is_formed_with_blocks_of_eight(monkeypatch):
    adapted = attach(Net(), "c3a", block_size=8, **TARGETS)
    monkeypatch.setattr(C3ADelta, "dense", None)
    adapted(torch.randn(3, 24)).sum().backward()
    assert all(d.w.grad.any() for _, d in linear_sites(adapted))


def test_one_block_can_be_the_identity_and_blocks_of_one_are_all_matrices():
    adapted = attach(nn.Sequential(nn.Linear(12, 12)), "c3a")
    with torch.no_grad():
        adapted.adapter.deltas["0"].w.zero_()[..., 0] = 12
    assert close(updates(adapted)[0], torch.eye(12))
    adapted = attach(nn.Sequential(nn.Linear(12, 7)), "c3a", block_size=1)
    perturb(adapted.adapter, 1.0)
    assert close(updates(adapted)[0], adapted.adapter.deltas["0"].w.detach()[..., 0] / 12)


def test_rank_is_that_of_the_transform():
    """A circulant has as many ranks as non-zero Fourier coefficients: a cosine two, a constant one, at random all."""
    adapted = attach(nn.Sequential(nn.Linear(16, 16)).double(), "c3a")
    w = adapted.adapter.deltas["0"].w
    wave = torch.cos(2 * math.pi * 3 / 16 * torch.arange(16).double())
    for row, rank in ((wave, 2), (torch.ones(16).double(), 1), (torch.randn(16).double(), 16)):
        with torch.no_grad():
            w.copy_(row)
        assert int(torch.linalg.matrix_rank(updates(adapted)[0], rtol=1e-9)) == rank


@pytest.mark.parametrize("start, std", [("xavier", (2 / 1200) ** 0.5), ("kaiming", (1 / 2400) ** 0.5), ("normal", 1.0)])
def test_starts_away_from_the_base(start, std):
    base, x = nn.Sequential(nn.Linear(800, 400)), torch.randn(5, 800)
    adapted = attach(copy.deepcopy(base), "c3a", start=start, block_size=100, seed=0)
    w = adapted.adapter.deltas["0"].w.detach()
    assert float(w.std()) == pytest.approx(std, rel=0.1) and not close(adapted(x), base(x))
    assert start == "normal" or float(w.abs().max()) == pytest.approx(3**0.5 * std, rel=0.02)


def test_start_at_the_base():
    base, x = nn.Sequential(nn.Linear(24, 16)), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "c3a", start="zero")
    assert close(adapted(x), base(x))
    adapted(x).square().sum().backward()
    assert adapted.adapter.deltas["0"].w.grad.all()


def test_blocks_are_as_large_as_they_can_be_or_as_told():
    adapted = attach(Net(), "c3a", block_pattern={"fc1": 4}, **TARGETS)
    assert [tuple(d.w.shape) for _, d in linear_sites(adapted)] == [(10, 6, 4), (3, 5, 8), (1, 1, 24)]
    assert {adapted.adapter.deltas[n].w.numel() for n in ("fc2", "fc3")} == {24 * 40 // 8, 24}


def test_loading_takes_the_saved_blocks():
    base, x = Net(), torch.randn(3, 24)
    saved = attach(copy.deepcopy(base), "c3a", block_size=2, **TARGETS)
    other = attach(copy.deepcopy(base), "c3a", **TARGETS)
    state = {n: t.clone() for n, t in saved.adapter.state_dict().items()}
    other.adapter.load(state)
    assert torch.equal(other(x), saved(x))
    with pytest.raises(UserError, match=r"w is \[20, 12, 3\], which are no blocks of \[40, 24\]"):
        other.adapter.load({**state, "deltas.fc1.w": torch.ones(20, 12, 3)})


def test_counts():
    """RoBERTa-base, query and value; a grouped-query 3B Llama at 64: d_in d_out / b a layer."""
    for size, count in ((768, 18_432), (128, 110_592)):
        adapted = attach(copy.deepcopy(roberta_base()), "c3a", block_size=size, target_modules=["query", "value"])
        assert adapted.cost()["adapter_parameters"] == count
    sizes = dict(hidden_size=3072, intermediate_size=64, num_hidden_layers=28, num_attention_heads=24, head_dim=128)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=8, **sizes))
    assert attach(llama, "c3a", block_size=64, target_modules=["q_proj", "v_proj"]).num_trainable() == 5_505_024


def test_nonsense():
    with pytest.raises(UserError, match=r"block_size is 16; it must divide \[40, 24\], the shape of fc1"):
        attach(Net(), "c3a", block_size=16)
    for options in ({"block_size": 0}, {"block_pattern": {"fc1": 0}}, {"start": "one"}):
        with pytest.raises(UserError, match=f"{next(iter(options))}.* is"):
            attach(Net(), "c3a", **options)
