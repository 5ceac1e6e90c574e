import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, cloned, close, linear_sites, perturb, roberta_base, updates

from lorafactory import UserError, attach, export_peft, load
from lorafactory.adapter import kronecker
from lorafactory.variants.lokr import split

peft = pytest.importorskip("peft")
SMALL = {"rank": 2}
CHANGES = {
    "rank_dropout_scale": ([True], {"rank_dropout": 0.5}),
    "rank_pattern": ([{"fc1": 3}], {}),
    "zero": (["W2"], {}),
    "unit_full": ([True], {"rank": 6}),
}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
FORMS = [{"rank": 2}, {"rank": 2, "decompose_both": True}, {"rank": 20}, {"rank": 3, "decompose_factor": 2}]


def test_equation_by_hand():
    """s = 3 / 1, W1 = [[1, 2]] (2 = 1 2, 4 = 2 2), W2 = [1; -1] [2, 3]: 3 [[2, 3, 4, 6], [-2, -3, -4, -6]]."""
    module = nn.Linear(4, 2)
    adapted = attach(nn.Sequential(module), "lokr", rank=1, alpha=3.0)
    d = adapted.adapter.deltas["0"]
    assert d.W1.shape == (1, 2) and d.W2.shape == (2, 2), "rank 1 is half of 2 already"
    with torch.no_grad():
        d.W1.copy_(torch.tensor([[1.0, 2.0]]))
        d.W2.copy_(torch.tensor([[2.0, 3.0], [-2.0, -3.0]]))
    update = torch.tensor([[6.0, 9.0, 12.0, 18.0], [-6.0, -9.0, -12.0, -18.0]])
    assert close(updates(adapted)[0], update)
    x = torch.randn(5, 4)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


@pytest.mark.parametrize("a, c, b, d", [(2, 5, 3, 4), (5, 2, 4, 3), (3, 3, 1, 7), (1, 1, 4, 6), (4, 6, 1, 1)])
def test_the_two_products_are_the_kronecker_product(a, c, b, d):
    w1, left, right = torch.randn(a, c), torch.randn(b, 2), torch.randn(2, d)
    for w2 in ((left @ right,), (right, left)):
        x = torch.randn(2, 3, c * d)
        assert close(kronecker(x, w1, *w2), x @ torch.kron(w1, left @ right).T)


def test_split():
    """Near the square root, or at the factor; a prime is 1 times itself. As PEFT splits, for all that may occur."""
    from peft.tuners.lokr.layer import factorization

    assert [split(n, -1) for n in (768, 3072, 127, 1, 2)] == [(24, 32), (48, 64), (1, 127), (1, 1), (1, 2)]
    assert split(768, 4) == (4, 192) and split(10, 4) == (2, 5) and split(16, 8) == (8, 2)
    for n in range(1, 200):
        assert all(split(n, f) == factorization(n, f) for f in (-1, *range(1, 30))), n


@pytest.mark.parametrize("options", FORMS)
def test_fast_path_rank_and_forms(options):
    """rank(W1 kron W2) = rank(W1) rank(W2), whatever the two are made of."""
    adapted = attach(Net().double(), "lokr", **options, **TARGETS)
    perturb(adapted.adapter, 1.0)
    for (s, d), u in zip(linear_sites(adapted), updates(adapted), strict=True):
        x = torch.randn(6, s.d_in, dtype=torch.float64)
        assert close(d.product(x), x @ u.T) and u.abs().max() > 1e-4
        ranks = [int(torch.linalg.matrix_rank(w)) for w in d.matrices()]
        assert int(torch.linalg.matrix_rank(u, rtol=1e-10)) == ranks[0] * ranks[1] > 2
    seen = {n for _, d in linear_sites(adapted) for n, _ in d.named_parameters()}
    want = {2: {"W1", "W2a", "W2b"}, 20: {"W1", "W2"}, 3: {"W1", "W2a", "W2b"}}[options["rank"]]
    assert seen == want | ({"W1a", "W1b"} if options.get("decompose_both") else set())


def test_with_a_split_of_one_it_is_lora():
    base, x = nn.Sequential(nn.Linear(12, 20)), torch.randn(5, 12)
    lokr = attach(copy.deepcopy(base), "lokr", rank=3, alpha=6.0, decompose_factor=1)
    lora = attach(copy.deepcopy(base), "lora", rank=3, alpha=6.0)
    perturb(lora.adapter, 1.0)
    d, low = lokr.adapter.deltas["0"], lora.adapter.deltas["0"].low_rank
    with torch.no_grad():
        d.W1.fill_(1.0)
        d.W2a.copy_(low.B)
        d.W2b.copy_(low.A)
    assert close(lokr(x), lora(x)) and not close(lokr(x), base(x))


@pytest.mark.parametrize("zero, moved", [("W1", {"W1", "W1a"}), ("W2", {"W2", "W2b"})])
@pytest.mark.parametrize("options", FORMS)
def test_start(zero, moved, options):
    """Zero, and in the first step the zero matrix alone has a gradient; the others are uniform."""
    base, x = Net(), torch.randn(9, 24)
    adapted = attach(copy.deepcopy(base), "lokr", zero=zero, **options, **TARGETS)
    assert close(adapted(x), base(x))
    adapted(x).square().sum().backward()
    for _, d in linear_sites(adapted):
        graded = {n for n, p in d.named_parameters() if p.grad.any()}
        assert graded <= moved and len(graded) == 1
        for n, p in d.named_parameters():
            bound = 0 if n in graded else p.shape[1] ** -0.5
            assert bound * 0.5 <= p.abs().max() <= bound


def test_scale_where_nothing_has_a_rank():
    """alpha / rank as PEFT, or 1 as LyCORIS; a layer with a rank keeps alpha / rank."""
    for unit, want in ((False, [2.0, 2.0, 2.0]), (True, [2.0, 2.0, 1.0])):
        adapted = attach(Net(), "lokr", rank=3, alpha=6.0, unit_full=unit, **TARGETS)
        assert [float(d.scale) for _, d in linear_sites(adapted)] == want
        assert [d.W2 is not None for _, d in linear_sites(adapted)] == [False, False, True]


@pytest.mark.parametrize("options", [*FORMS, {"rank": 3, "unit_full": True, "zero": "W2"}])
def test_peft_computes_the_same(options, tmp_path):
    """Outputs and gradients of every form; and the folder that we write, from which ours comes back."""
    x, base = torch.randn(5, 24), Net()
    adapted = attach(copy.deepcopy(base), "lokr", alpha=5.0, **options, **TARGETS)
    perturb(adapted.adapter, 1.0)
    export_peft(adapted, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    got, want = adapted(x), theirs(x)
    assert close(got, want, 0.5) and not close(got, base(x), 100)
    got.square().sum().backward()
    want.square().sum().backward()
    for s, d in linear_sites(adapted):
        layer = theirs.get_submodule(f"base_model.model.{s.name}")
        for n, p in d.named_parameters():
            q = getattr(layer, d.names[n])["default"]
            assert q.grad.any() and close(p.grad, q.grad, 0.5)
    again = load(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(x), adapted(x))
    assert {n for n, _ in again.adapter.named_parameters()} == {n for n, _ in adapted.adapter.named_parameters()}


def test_a_rank_that_only_says_whole_matrices(tmp_path):
    """PEFT takes any rank for that, 10000 by custom; here the largest that means anything, with the same scale."""
    base, x = Net(), torch.randn(5, 24)
    config = peft.LoKrConfig(r=10_000, alpha=10_000, target_modules=TARGETS["target_modules"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    perturb(theirs, 1.0)
    theirs.save_pretrained(tmp_path)
    ours = load(copy.deepcopy(base), tmp_path)
    assert close(ours(x), theirs(x), 0.5) and not close(ours(x), base(x), 100)
    assert all(float(d.scale) == 1.0 for _, d in linear_sites(ours))
    with pytest.raises(UserError, match="rank 10000 is more than fc1 .* at most 24"):
        attach(Net(), "lokr", rank=10_000)
    thin = attach(nn.Sequential(nn.Linear(2, 1000)), "lokr", rank=20).adapter.deltas["0"]
    assert thin.W2.shape == (40, 2), "where the layer's own rank is 2"
    with pytest.raises(UserError, match="at most 20"):
        attach(nn.Sequential(nn.Linear(2, 1000)), "lokr", rank=21)


def test_counts():
    """24 24 + 8 (32 + 32) a matrix of 768 by 768; 48 24 + 8 (64 + 32) of 3072 by 768."""
    adapted = attach(copy.deepcopy(roberta_base()), "lokr", target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24 * 1_088
    adapted = attach(copy.deepcopy(roberta_base()), "lokr", target_modules=["intermediate.dense"])
    assert adapted.cost()["adapter_parameters"] == 12 * 1_920


def test_primes():
    adapted = attach(nn.Sequential(nn.Linear(13, 17)), "lokr", rank=3)
    d = adapted.adapter.deltas["0"]
    assert {n: tuple(p.shape) for n, p in d.named_parameters()} == {"W1": (1, 1), "W2a": (17, 3), "W2b": (3, 13)}


def test_both_forms_or_none_are_refused_and_either_is_loaded():
    adapted = attach(Net(), "lokr", rank=2, **TARGETS)
    perturb(adapted.adapter, 1.0)
    state, x = cloned(adapted.adapter.state_dict()), torch.randn(3, 24)
    with pytest.raises(UserError, match="fc1.W2 is there whole and as a product"):
        adapted.adapter.load({**state, "deltas.fc1.W2": torch.ones(8, 6)})
    with pytest.raises(UserError, match="fc1.W2 is missing"):
        adapted.adapter.load({n: t for n, t in state.items() if n not in ("deltas.fc1.W2a", "deltas.fc1.W2b")})
    whole = {n: t for n, t in state.items() if n not in ("deltas.fc1.W2a", "deltas.fc1.W2b")}
    y = adapted(x)
    adapted.adapter.load({**whole, "deltas.fc1.W2": state["deltas.fc1.W2a"] @ state["deltas.fc1.W2b"]})
    assert close(adapted(x), y) and adapted.adapter.deltas["fc1"].W2a is None


def test_nonsense():
    for options in ({"rank": 0}, {"decompose_factor": 0}, {"decompose_factor": -2}, {"zero": "W1a"}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "lokr", **options)
