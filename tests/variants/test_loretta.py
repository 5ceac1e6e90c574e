import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, perturb, roberta_base, updates

from lorafactory import UserError, attach, linalg

CHANGES = {"start": (["zero"], {})}
FINE = {"start": "zero"}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def test_equation_by_hand():
    """rank 2 of [2, 3]: A^T = (1, 2, 3) kron (1, -1) as [3, 2], B^T = (1, 1) kron (1, 2) as [2, 2]; alpha / rank = 2."""
    module = nn.Linear(3, 2)
    adapted = attach(nn.Sequential(module), "loretta", rank=2, alpha=4.0, tt_rank=1, order=2)
    d = adapted.adapter.deltas["0"]
    assert [tuple(c.shape) for n in "AB" for c in d.cores(n)] == [(1, 3, 1), (1, 2, 1), (1, 2, 1), (1, 2, 1)]
    with torch.no_grad():
        for core, values in zip(d.cores("A") + d.cores("B"), ([1, 2, 3], [1, -1], [1, 1], [1, 2]), strict=True):
            core.copy_(torch.tensor(values).view(1, -1, 1))
    a, b = torch.tensor([[1.0, 2, 3], [-1, -2, -3]]), torch.tensor([[1.0, 1], [2, 2]])
    assert close(d.whole("A").T, a) and close(d.whole("B").T, b) and close(updates(adapted)[0], 2 * b @ a)
    with torch.no_grad():
        d.B0.copy_(torch.tensor([1.0, 3.0]).view(1, 2, 1))
    b = torch.tensor([[1.0, 3], [2, 6]])
    x = torch.randn(4, 3)
    assert close(adapted(x), F.linear(x, module.weight + 2 * b @ a, module.bias)) and (b @ a).any()


@pytest.mark.parametrize("order", [2, 3, 5])
def test_a_train_is_the_sum_over_its_inner_ranks(order):
    """Outputs and gradients in float64 against one einsum over all cores, read input first as in the authors' code."""
    adapted = attach(nn.Sequential(nn.Linear(20, 12)).double(), "loretta", rank=4, tt_rank=3, order=order)
    perturb(adapted.adapter, 1.0)
    d, s = adapted.adapter.deltas["0"], adapted.adapter.sites[0]
    inner = "pqrstu"[: order + 1]
    terms = ",".join(f"{inner[i]}{'abcde'[i]}{inner[i + 1]}" for i in range(order))
    a = torch.einsum(f"{terms}->{'abcde'[:order]}", *d.cores("A")).reshape(20, 4)
    b = torch.einsum(f"{terms}->{'abcde'[:order]}", *d.cores("B")).reshape(4, 12)
    x = torch.randn(2, 6, 20, dtype=torch.float64, requires_grad=True)
    got, want = d.update(x, s.base, None), 4 * x @ a @ b
    g = torch.randn_like(got)
    of = (*d.cores("A"), *d.cores("B"), x)
    mine, true = (torch.autograd.grad(y, of, g) for y in (got, want))
    assert close(got, want) and want.abs().max() > 1e-3
    assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def test_ranks():
    """rank(dW) <= rank; with all inner ranks one, A^T is a Kronecker product."""
    adapted = attach(Net().double(), "loretta", rank=3, tt_rank=50, **TARGETS)
    perturb(adapted.adapter, 1.0)
    assert [int(torch.linalg.matrix_rank(u, rtol=1e-9)) for u in updates(adapted)] == [3, 3, 3]
    adapted = attach(nn.Sequential(nn.Linear(12, 12)).double(), "loretta", rank=2, tt_rank=1, order=3)
    d = adapted.adapter.deltas["0"]
    one, two, three = (core.flatten() for core in d.cores("A"))
    assert close(d.whole("A").flatten(), torch.kron(torch.kron(one, two), three))


def test_large_inner_ranks_represent_any_matrix():
    """Two cores are A^T = U V, so that an inner rank of min(k_1, k_2) is enough."""
    adapted = attach(nn.Sequential(nn.Linear(16, 16)).double(), "loretta", rank=4, tt_rank=8, order=2)
    d, a = adapted.adapter.deltas["0"], torch.randn(4, 16, dtype=torch.float64)
    with torch.no_grad():
        d.A0.copy_(a.T.reshape(8, 8)[None])
        d.A1.copy_(torch.eye(8)[..., None])
    assert close(d.factors()[1], a)


def test_lengths_are_about_equal():
    assert linalg.split(8 * 768, 4) == [8, 8, 8, 12] and linalg.split(768, 3) == [8, 8, 12]
    assert linalg.split(7 * 29, 3) == [1, 7, 29] and linalg.split(5, 1) == [5] and linalg.split(1, 3) == [1, 1, 1]
    for n in (24, 40, 96, 1000, 4096, 14336 * 16, 97):
        for parts in (2, 3, 4, 5):
            assert math.prod(linalg.split(n, parts)) == n and len(linalg.split(n, parts)) == parts
    adapted = attach(nn.Sequential(nn.Linear(768, 768)), "loretta")
    assert [c.shape[1] for c in adapted.adapter.deltas["0"].cores("A")] == [8, 8, 12, 8], "as the authors have it"


def test_starts():
    """Entries of A^T have deviation 1/sqrt(d_in + rank), of B^T 1/sqrt(d_out + rank)."""
    base, x = nn.Sequential(nn.Linear(768, 768)), torch.randn(5, 768)
    found = []
    for seed in range(12):
        d = attach(copy.deepcopy(base), "loretta", seed=seed).adapter.deltas["0"]
        found.append((d.whole("A").square().mean() * 776, d.whole("B").square().mean() * 776))
    assert all(float(sum(f) / 12) == pytest.approx(1, rel=0.4) for f in zip(*found, strict=True))
    assert not close(attach(copy.deepcopy(base), "loretta", seed=0)(x), base(x))
    zero = attach(copy.deepcopy(base), "loretta", start="zero", seed=0)
    assert torch.equal(zero(x), base(x))
    zero(x).square().sum().backward()
    d = zero.adapter.deltas["0"]
    assert d.B3.grad.any() and not any(c.grad.any() for c in (*d.cores("A"), *d.cores("B")[:-1]))
    d.randomize()
    assert updates(zero)[0].any()


def test_loading_takes_the_saved_rank():
    base, x = Net(), torch.randn(3, 24)
    saved = attach(copy.deepcopy(base), "loretta", rank=6, tt_rank=2, alpha=3.0, **TARGETS)
    other = attach(copy.deepcopy(base), "loretta", rank=2, **TARGETS)
    state = {n: t.clone() for n, t in saved.adapter.state_dict().items()}
    other.adapter.load(state)
    assert torch.equal(other(x), saved(x)) and other.adapter.deltas["fc1"].rank == 6
    assert {a["rank"] for a in other.adapter.describe()} == {6} and {a["scale"] for a in other.adapter.describe()} == {
        0.5
    }
    longer = torch.cat([state["deltas.fc1.A1"]] * 2, 1)
    with pytest.raises(
        UserError, match=r"A0 and B0 with their trains have 288 and 240 entries, of no rank in \[40, 24\]"
    ):
        other.adapter.load({**state, "deltas.fc1.A1": longer})


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "loretta", rank=4, dropout=0.5, **TARGETS).train()
    (b, a), module, x = adapted.adapter.deltas["fc1"].factors(), adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ a.T @ b.T)


def test_counts():
    """RoBERTa-base, query and value: twice 40 + 200 + 300 + 40 a matrix."""
    adapted = attach(copy.deepcopy(roberta_base()), "loretta", target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24 * 2 * 580 == 27_840


def test_nonsense():
    with pytest.raises(UserError, match=r"rank 25 is more than fc3 \[24, 24\] can have"):
        attach(Net(), "loretta", rank=25, target_modules=["fc3"])
    for options in ({"rank": 0}, {"tt_rank": 0}, {"order": 1}, {"start": "one"}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "loretta", **options)
