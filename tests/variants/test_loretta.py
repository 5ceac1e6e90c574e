import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, Regression, adamw, cloned, close, linear_sites, perturb, roberta_base, train, updates

from lorafactory import UserError, attach, linalg, load, registry

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
    wrong = {"rank": 0, "tt_rank": 0, "order": 1, "start": "one", "alpha": 0.0, "dropout": 1.0, "adapter": "elu"}
    for options in ({k: v} for k, v in wrong.items()):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "loretta", **options)


# LoRETTA_adp

ADAPTER = {"adapter": "tanh", "rank": 4, "alpha": 8.0, **TARGETS}


def test_an_adapter_by_hand():
    """A^T = (1, 2) kron (1, -1) as [2, 2], B^T = (1, 1) kron (1, 2), a = (1, 0), b = (0, 5), s = 2, of y = W x + c."""
    module = nn.Linear(3, 2)
    adapted = attach(nn.Sequential(module), "loretta", rank=2, alpha=4.0, tt_rank=1, order=2, adapter="relu")
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        for core, values in zip(d.cores("A") + d.cores("B"), ([1, 2], [1, -1], [1, 1], [1, 2]), strict=True):
            core.copy_(torch.tensor(values).view(1, -1, 1))
        d.a.copy_(torch.tensor([1.0, 0]))
        d.b.copy_(torch.tensor([0.0, 5]))
    x = torch.randn(9, 3)
    y = F.linear(x, module.weight, module.bias)
    down, up = torch.tensor([[1.0, 2], [-1, -2]]), torch.tensor([[1.0, 1], [2, 2]])
    want = y + 2 * (torch.relu(y @ down.T + torch.tensor([1.0, 0])) @ up.T + torch.tensor([0.0, 5]))
    assert close(adapted(x), want) and not adapted.adapter.mergeable


@pytest.mark.parametrize("adapter, act", [("relu", torch.relu), ("tanh", torch.tanh), ("gelu", F.gelu)])
def test_an_adapter_reads_what_the_layer_gives(adapter, act):
    """Outputs and gradients in float64, dropout of y included, which the layer's own output is spared."""
    adapted = attach(Net().double(), "loretta", **{**ADAPTER, "adapter": adapter}, dropout=0.4).train()
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        x = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True)
        y, (a, b) = s.base(x), (d.whole("A").T, d.whole("B").T)
        torch.manual_seed(1)
        got = d(x, s.base)
        torch.manual_seed(1)
        want = y + 2 * (act(F.dropout(y, 0.4) @ a.T + d.a) @ b.T + d.b)
        g = torch.randn_like(got)
        of = (*d.cores("A"), *d.cores("B"), d.a, d.b, x)
        mine, true = (torch.autograd.grad(out, of, g, retain_graph=True) for out in (got, want))
        assert a.shape == (4, s.d_out) and close(got, want)
        assert all(close(m, t, 5) and t.any() for m, t in zip(mine, true, strict=True))


def test_an_adapter_from_zero_is_the_base_and_learns():
    torch.manual_seed(0)
    base = Net()
    data, x = Regression(base), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "loretta", start="zero", **ADAPTER)
    assert torch.equal(adapted(x), base(x))
    losses = train(adapted, data, adapted.optimizer(adamw, 16), steps=16)
    assert losses[-1] < losses[0] and not close(adapted(x), base(x))


def test_an_adapter_comes_back_and_has_no_weight(tmp_path):
    base, x = Net().double(), torch.randn(5, 24, dtype=torch.float64)
    adapted = attach(copy.deepcopy(base), "loretta", **ADAPTER)
    perturb(adapted.adapter, 0.5)
    y = adapted.eval()(x)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y) and not close(y, base(x))
    with pytest.raises(UserError, match="merge"):
        adapted.merge()
    with pytest.raises(UserError, match="under these options"):
        registry.config("loretta+dora", adapter="relu")
    other = attach(copy.deepcopy(base), "loretta", **{**ADAPTER, "rank": 6})
    state = cloned(adapted.adapter.state_dict())
    other.adapter.load(state)
    assert torch.equal(other.eval()(x), y)
    for wrong, said in (("a", "a is of rank 5"), ("b", r"b is \[5\]")):
        with pytest.raises(UserError, match=said):
            other.adapter.load({**state, f"deltas.fc1.{wrong}": torch.zeros(5)})


def test_a_bottleneck_as_the_authors_count_it():
    """RoBERTa-base after a dense layer of 768, bottleneck 64: twice five cores, of length 8 but one of 12, and both biases."""
    adapted = attach(copy.deepcopy(roberta_base()), "loretta", adapter="relu", rank=64, alpha=64.0, order=5,
                     trained_modules=[], target_modules=["attention.output.dense"])  # fmt: skip
    cores = 8 * 5 + 5 * 8 * 5 + 5 * 12 * 5 + 5 * 8 * 5 + 5 * 8
    assert adapted.num_trainable() == 12 * (2 * cores + 64 + 768)
    assert {a["scale"] for a in attach(Net(), "loretta", **{**ADAPTER, "alpha": 4.0}).adapter.describe()} == {1.0}
