import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, load, registry

CHANGES = {"tile": ([8], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
FORMS = [{}, {"tile": 4}, {"bat": True}]


def test_equation_by_hand():
    """D = [[1, 2], [3, 4]] on five inputs: every pair of columns is D^T, the last one its first column."""
    module = nn.Linear(5, 2)
    adapted = attach(nn.Sequential(module), "miss", rank=2)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.D.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    update = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0], [2.0, 4.0, 2.0, 4.0, 2.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), module.weight + update)
    x = torch.randn(4, 5)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


def test_every_shard_is_D_where_rank_divides_the_inputs_or_not():
    for rank in (4, 7, 24):
        adapted = attach(Net(), "miss", rank=rank, **TARGETS).eval()
        perturb(adapted.adapter, 1.0)
        for s, d in linear_sites(adapted):
            update = d.weight(s.base) - s.base.weight
            for j in range(s.d_in):
                assert close(update[:, j], d.D[j % rank])
            assert int(torch.linalg.matrix_rank(update)) == min(rank, s.d_in, s.d_out)
            b, a = d.factors()
            x = torch.randn(9, s.d_in)
            assert close(d.update(x, s.base, x), x @ a.T @ b.T, 2), "a LoRA with a fixed A"


def test_tiles_repeat_along_the_outputs():
    adapted = attach(Net(), "miss", rank=6, tile=4, **TARGETS).eval()
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        assert d.D.shape == (6, 4)
        update, x = d.weight(s.base) - s.base.weight, torch.randn(9, s.d_in)
        for i in range(s.d_out):
            assert close(update[i, :6], d.D[:, i % 4])
        assert close(d.update(x, s.base, x), x @ update.T, 2)


def test_bat_block_by_block():
    """dW_ij = W_ij D_i + D_i."""
    adapted = attach(Net(), "miss", rank=8, bat=True, **TARGETS).eval()
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        w, w0 = d.weight(s.base), s.base.weight
        for i in range(s.d_out // 8):
            for j in range(s.d_in // 8):
                block = w0[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
                assert close(w[8 * i : 8 * i + 8, 8 * j : 8 * j + 8], block + block @ d.D[i] + d.D[i])
        assert int(torch.linalg.matrix_rank(w - w0)) > 8


@pytest.mark.parametrize("options", FORMS)
def test_zero_at_the_start_and_a_gradient_in_the_first_step(options, tmp_path):
    """One matrix, no saddle. Perturbed, it is merged and reloaded."""
    base, x = Net(), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "miss", rank=4, **TARGETS, **options)
    assert torch.equal(adapted(x), base(x))
    adapted(x).square().sum().backward()
    assert all((d.D.grad.abs().flatten(1).sum(1) > 0).all() for _, d in linear_sites(adapted))
    perturb(adapted.adapter, 1.0)
    y = adapted(x).detach()
    assert not close(y, base(x), 100)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y)
    adapted.merge()
    assert close(adapted(x), y)
    adapted.unmerge()
    other = attach(copy.deepcopy(base), "miss", rank=8, **TARGETS, **options)
    other.adapter.load(adapted.adapter.state_dict())
    assert torch.equal(other(x), y)


def test_what_cancels_within_a_residue_class_is_not_seen():
    adapted = attach(nn.Sequential(nn.Linear(6, 3)), "miss", rank=2)
    perturb(adapted.adapter, 1.0)
    d, base = adapted.adapter.deltas["0"], adapted.adapter.sites[0].base
    blind = torch.tensor([[1.0, 2.0, -3.0, 0.5, 2.0, -2.5]])
    assert close(d.update(blind, base, blind), torch.zeros(1, 3)) and d.update(blind.abs(), base, blind).any()


def test_dropout_is_of_what_is_summed():
    adapted = attach(Net(), "miss", rank=5, dropout=0.5, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    (b, a), module, x = adapted.adapter.deltas["fc1"].factors(), adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ a.T @ b.T, 2)


def test_bat_is_not_additive():
    """Its update is no product of factors: parts that need one are refused by the registry."""
    assert registry.config("miss", bat=True).gives() == {"weight"}
    assert registry.config("miss").gives() == {"additive", "weight"}
    adapted = attach(Net(), "miss", rank=4, bat=True, **TARGETS)
    assert all(d.factors() is None for _, d in linear_sites(adapted))


def test_blocks_and_ranks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="rank 25 is more than the 24 inputs of fc1"):
        attach(Net(), "miss", rank=25, **TARGETS)
    with pytest.raises(UserError, match="tile is 5; it must divide the 24 outputs of fc2"):
        attach(Net(), "miss", rank=4, tile=5, **TARGETS)
    with pytest.raises(UserError, match=r"rank 5 must divide both sides of fc1 \[40, 24\] with bat"):
        attach(Net(), "miss", rank=5, bat=True, **TARGETS)
    adapted = attach(Net(), "miss", rank=4, **TARGETS)
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    with pytest.raises(UserError, match="deltas.fc2.D has rank 5, the others 4"):
        adapted.adapter.load({**state, "deltas.fc2.D": torch.ones(5, 24)})
    adapted = attach(Net(), "miss", rank=4, bat=True, **TARGETS)
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    with pytest.raises(UserError, match=r"deltas.fc2.D is \[7, 4, 4\], no blocks of this layer"):
        adapted.adapter.load({**state, "deltas.fc2.D": torch.ones(7, 4, 4)})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 0}, "rank is 0"),
        ({"tile": 0}, "tile is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"bat": True, "tile": 4}, "tile is 4, of no effect on bat"),
        ({"bat": True, "dropout": 0.1}, "dropout is 0.1, of no effect on bat"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "miss", **options)


def test_counts():
    """Llama-2-7B, all seven linear layers, rank 64: 87,031,808; bat has as many."""
    sizes = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
    for bat in (False, True):
        with torch.device("meta"):
            llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, **sizes))
        assert attach(llama, "miss", rank=64, bat=bat).num_trainable() == 87_031_808
