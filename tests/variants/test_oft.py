import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close, linear_sites, perturb, train
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, linalg
from lorafactory.adapter.turned import some_identity

SMALL = {"block_size": 4}
CHANGES = {"terms": ([5], {}), "epsilon": ([1e-3], {}), "dropout": ([0.5], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def turned(options=None, size=0.3):
    adapted = attach(Net(), "oft", block_size=8, **TARGETS, **(options or {})).eval()
    perturb(adapted.adapter, size)
    return adapted


def change(d, base):
    return d.weight(base) @ torch.linalg.pinv(base.weight)


def test_equation_by_hand():
    """Q = [[0, 1/2], [-1/2, 0]]: R = (I + Q)(I - Q)^-1 = [[.6, .8], [-.8, .6]], whatever q is in one block of two."""
    module = nn.Linear(4, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[5.0, 0.0, 0.0, 10.0], [0.0, 5.0, 1.0, 0.0]]))
        module.bias.copy_(torch.tensor([1.0, 2.0]))
    adapted = attach(nn.Sequential(module), "oft", block_size=2)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.q.copy_(torch.tensor([[0.5], [0.0]]))
    want = torch.tensor([[3.0, -4.0, 0.0, 10.0], [4.0, 3.0, 1.0, 0.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), want)
    assert close(adapted(torch.eye(4)), want.T + torch.tensor([1.0, 2.0]))
    adapted.merge()
    assert close(module.weight, want)


def test_the_paper_s_matrices():
    """R_i = (I + Q)(I - Q)^-1 block by block, W = W0 R^T."""
    adapted = turned()
    for s, d in linear_sites(adapted):
        blocks = []
        for q in d.q:
            skew = torch.zeros(8, 8)
            skew[tuple(torch.triu_indices(8, 8, 1))] = q
            skew = skew - skew.T
            blocks.append((torch.eye(8) + skew) @ torch.linalg.inv(torch.eye(8) - skew))
        r = torch.block_diag(*blocks)
        assert close(d.weight(s.base), s.base.weight @ r.T) and not close(r, torch.eye(len(r)), 100)


@pytest.mark.parametrize("options", [{}, {"block_share": True}])
def test_angles_lengths_and_singular_values_stay(options):
    adapted = turned(options)
    for s, d in linear_sites(adapted):
        w, w0 = d.weight(s.base), s.base.weight
        assert close(d.blocks() @ d.blocks().mT, torch.eye(8).expand(len(d.blocks()), 8, 8))
        assert not close(w, w0, 100)
        assert close(w @ w.T, w0 @ w0.T), "every inner product of two neurons"
        assert close(torch.linalg.svdvals(w), torch.linalg.svdvals(w0))


def test_a_shared_block_is_one_and_saved_once():
    adapted = turned({"block_share": True})
    assert {tuple(p.shape) for p in adapted.adapter.parameters()} == {(1, 28)}
    for s, d in linear_sites(adapted):
        r = torch.block_diag(*[d.blocks()[0]] * (s.d_in // 8))
        assert close(d.weight(s.base), s.base.weight @ r.T)


def test_the_series_nears_the_exact_rotation_and_leaves_orthogonality_as_q_grows():
    torch.manual_seed(0)
    upper = torch.randn(3, 32 * 31 // 2, dtype=torch.float64)
    for size, terms, bound in ((0.01, 5, 1e-3), (0.01, 9, 1e-6)):
        s = linalg.skew(size * upper, 32)
        assert (linalg.cayley(s, terms) - linalg.cayley(s)).abs().max() < bound
        assert (linalg.cayley(s, terms) - linalg.cayley(-s)).abs().max() > 0.03
    drift = [
        float((r.mT @ r - torch.eye(32)).abs().max())
        for r in (linalg.cayley(linalg.skew(size * upper, 32), 5) for size in (0.01, 0.1))
    ]
    assert drift[0] < 1e-3 < 0.1 < drift[1]


def test_cut_series():
    """terms = 4: I + 2 S + 2 S^2 + S^3; 5: I + 2 S + 2 S^2 + 2 S^3 + S^4."""
    s = linalg.skew(torch.randn(6), 4)
    eye = torch.eye(4)
    assert close(linalg.cayley(s, 4), eye + 2 * s + 2 * s @ s + s @ s @ s)
    assert close(linalg.cayley(s, 5), eye + 2 * s + 2 * s @ s + 2 * s @ s @ s + s @ s @ s @ s)
    assert close(linalg.upper(s), linalg.upper(linalg.skew(linalg.upper(s), 4)))


def test_cofts_bound_holds_after_every_step():
    """|Q_i|_F <= epsilon / sqrt(n), where the free one goes well beyond."""
    base = Net()
    data = Regression(base)
    for epsilon in (None, 0.02):
        adapted = attached("oft", base, data, block_size=8, epsilon=epsilon, trained_modules=[])
        train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
        for s, d in linear_sites(adapted):
            norms = linalg.skew(d.q, 8).flatten(1).norm(dim=1)
            bound = 0.02 / (s.d_in // 8) ** 0.5
            assert (norms <= bound * (1 + 1e-5)).all() if epsilon else (norms > 2 * bound).all()
    before = d.q.detach().clone()
    with torch.no_grad():
        d.project(0.02)
    assert close(d.q, before), "a block within the bound stays"


def test_dropout_makes_some_blocks_the_identity_in_training():
    adapted = turned({"dropout": 0.4})
    d, eye = adapted.adapter.deltas["fc2"], torch.eye(8)
    assert len(d.blocks()) == 5 and not (d.blocks() == eye).all((1, 2)).any()
    adapted.train()
    seen = torch.stack([(d.blocks() == eye).all((1, 2)) for _ in range(40)])
    assert (seen.sum(1) == 2).all() and seen.any(0).all()
    assert (some_identity(torch.zeros(7, 2, 2), 0.5).diagonal(dim1=1, dim2=2).sum(1) > 0).sum() == 3


def test_one_product_with_the_base_and_blocks_of_block_size():
    """Layers of other shapes than the blocks are refused by name."""
    with pytest.raises(UserError, match="block_size is 16; it must divide the 24 inputs of fc1$"):
        attach(Net(), "oft", block_size=16, **TARGETS)
    with pytest.raises(UserError, match="dropout is 0.1, which is none of the 3 blocks of fc1: at least 0.333"):
        attach(Net(), "oft", block_size=8, dropout=0.1, **TARGETS)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"block_size": 1}, "block_size is 1"),
        ({"terms": 3}, "terms is 3; it must be at least 4"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": 0.5, "block_share": True}, "of no effect on the one block of block_share"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "oft", **options)


def test_counts():
    """63,488 in a layer of 4096 inputs; 0.13 % of a Llama-2-7B in blocks of 16."""
    sizes = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, **sizes))
    one = attach(copy.deepcopy(llama), "oft", target_modules=["layers.0.self_attn.q_proj"])
    assert one.num_trainable() == 4096 * 31 // 2 == 63_488
    cost = attach(llama, "oft", block_size=16).cost()
    assert cost["adapter_parameters"] == 32 * (6 * 4096 + 11008) * 15 // 2
    assert round(100 * cost["adapter_parameters"] / cost["total_parameters"], 2) == 0.13
