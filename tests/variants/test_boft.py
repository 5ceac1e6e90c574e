import pytest
import torch
import torch.nn as nn
from support import Net, close, linear_sites, perturb, roberta_base

from lorafactory import UserError, attach
from lorafactory.variants.boft import butterfly

SMALL = {"factors": 2}
CHANGES = {"dropout": ([0.5], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def turned(size=0.3, **options):
    adapted = attach(Net(), "boft", **TARGETS, **options).eval()
    perturb(adapted.adapter, size)
    return adapted


def rotation(q):
    """(I + Q)(I - Q)^-1, without the library's own functions."""
    b = round((1 + (1 + 8 * len(q)) ** 0.5) / 2)
    skew = torch.zeros(b, b)
    skew[tuple(torch.triu_indices(b, b, 1))] = q
    skew = skew - skew.T
    return (torch.eye(b) + skew) @ torch.linalg.inv(torch.eye(b) - skew)


def dense(q):
    """R = B_m ... B_1 [d_in, d_in], each factor entry by entry: its block k of a group holds halves k and k + 2^j."""
    m, n, columns = q.shape
    b = round((1 + (1 + 8 * columns) ** 0.5) / 2)
    half, total = b // 2, torch.eye(n * b)
    for j in range(m):
        factor, block = torch.zeros(n * b, n * b), 0
        for group in range(0, 2 * n, 2 * 2**j):
            for k in range(2**j):
                where = [(group + k) * half + i for i in range(half)] + [(group + k + 2**j) * half + i for i in range(half)]
                factor[torch.tensor(where)[:, None], torch.tensor(where)] = rotation(q[j, block])
                block += 1
        total = factor @ total
    return total


def test_halves_that_a_block_reads():
    """Blocks of two: neighbours; inputs two apart; four apart."""
    assert butterfly(8, 2, 0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert butterfly(8, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert butterfly(8, 2, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert butterfly(8, 4, 1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_equation_by_hand():
    """Two factors of blocks of two on four inputs, a quarter turn (q = 1) in one block of each; s = (1, 2)."""
    module = nn.Linear(4, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
        module.bias.copy_(torch.tensor([10.0, 20.0]))
    adapted = attach(nn.Sequential(module), "boft", block_size=2, factors=2)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.q.copy_(torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]]))
        d.s.copy_(torch.tensor([1.0, 2.0]))
    # a quarter turn sends (x, y) W to (y, -x) in W's columns: inputs 0 and 1 first, then inputs 1 and 3
    want = torch.tensor([[2.0, 4.0, 3.0, 1.0], [12.0, 16.0, 14.0, 10.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), want)
    assert close(adapted(torch.eye(4)), want.T + torch.tensor([10.0, 20.0])), "the bias is not scaled"
    adapted.merge()
    assert close(module.weight, want)


@pytest.mark.parametrize("m, b", [(1, 8), (2, 4), (3, 2), (2, 12)])
def test_the_paper_s_matrices(m, b):
    """W = diag(s) W0 R^T, R orthogonal; the fast path is that, and the wrapper's path too."""
    adapted = attach(Net(), "boft", factors=m, block_size=b, target_modules=["fc1", "fc3"], trained_modules=[]).eval()
    perturb(adapted.adapter, 0.5)
    for s, d in linear_sites(adapted):
        r, w0 = dense(d.q), s.base.weight
        w, x = d.weight(s.base), torch.randn(9, s.d_in)
        assert close(r.T @ r, torch.eye(s.d_in)) and not close(r, torch.eye(s.d_in), 100)
        assert close(w, d.s[:, None] * (w0 @ r.T))
        y = x @ w0.T + (0 if s.base.bias is None else s.base.bias)
        assert close(y + d.update(x, s.base, y), d(x, s.base), 2)
        with torch.no_grad():
            d.s.fill_(1.0)
        assert close(torch.linalg.svdvals(d.weight(s.base)), torch.linalg.svdvals(w0))


def test_enough_factors_make_a_dense_rotation_and_one_makes_blocks():
    """m = log2(2 d / block): every input meets every other."""
    for m, entries in ((1, 32 * 4), (2, 32 * 8), (3, 32 * 16), (4, 32 * 32)):
        adapted = attach(nn.Sequential(nn.Linear(32, 3)), "boft", factors=m, block_size=4)
        perturb(adapted.adapter, 3.0)
        assert int((dense(adapted.adapter.deltas["0"].q) != 0).sum()) == entries
        r = adapted.adapter.deltas["0"].turn(torch.eye(32))
        assert close(r, dense(adapted.adapter.deltas["0"].q)), "a row x becomes x R"


def test_one_factor_is_oft():
    mine, oft = turned(block_size=8), attach(Net(), "oft", block_size=8, **TARGETS)
    with torch.no_grad():
        for (s, d), (_, other) in zip(linear_sites(mine), linear_sites(oft), strict=True):
            other.q.copy_(d.q[0])
            d.s.fill_(1.0)
            assert close(d.weight(s.base), other.weight(s.base)) and not close(d.weight(s.base), s.base.weight, 100)


def test_orders_are_indices_and_not_saved():
    adapted = turned(factors=3, block_size=2)
    d = adapted.adapter.deltas["fc1"]
    assert d.order.shape == (3, 24) and d.order.dtype == torch.long
    assert set(adapted.adapter.state_dict()) == {f"deltas.fc{i}.{n}" for i in (1, 2, 3) for n in ("q", "s")}


def test_dropout_makes_some_blocks_of_one_factor_the_identity_in_training():
    adapted = turned(factors=2, dropout=0.4)
    d, eye = adapted.adapter.deltas["fc2"], torch.eye(4)
    assert d.blocks().shape == (2, 10, 4, 4) and not (d.blocks() == eye).all((2, 3)).any()
    adapted.train()
    seen = torch.stack([(d.blocks() == eye).all((2, 3)) for _ in range(60)])
    assert (seen.sum((1, 2)) == 4).all() and (seen.any(2).sum(1) == 1).all() and seen.any(0).all()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"block_size": 1}, "block_size is 1"),
        ({"factors": 0}, "factors is 0"),
        ({"block_size": 3, "factors": 2}, "block_size is 3; several factors exchange halves: it must be even"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"block_size": 16}, "block_size 16 with factors 1 needs a multiple of 16 inputs, and fc1 has 24"),
        ({"factors": 3}, "block_size 4 with factors 3 needs a multiple of 16 inputs, and fc1 has 24"),
        ({"block_size": 8, "dropout": 0.1}, "dropout is 0.1, which is none of the 3 blocks of fc1: at least 0.333"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "boft", **TARGETS, **options)


def test_counts():
    """m d_in (b - 1) / 2, and d_out scales: BOFT(2, 8) on one layer of RoBERTa-base, 5,376 and 768."""
    import copy

    adapted = attach(
        copy.deepcopy(roberta_base()), "boft", factors=2, block_size=8, target_modules=["layer.0.attention.self.query"]
    )
    d = next(iter(adapted.adapter.deltas.values()))
    assert (d.q.numel(), d.s.numel()) == (2 * 768 * 7 // 2, 768) == (5_376, 768)


def test_dora_over_it_is_void():
    with pytest.raises(UserError, match="'dora' does not work with 'boft' .scales rows."):
        attach(Net(), "boft+dora")
