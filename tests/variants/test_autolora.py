"""AutoLoRA: a search on two parts of the data by hand and against autograd, and ranks by their weights."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, loss, same, train

from lorafactory import UserError, attach, load, registry
from lorafactory.bilevel import Bilevel
from lorafactory.variants.autolora import selected

SMALL = {"steps": 4, "logit_lr": 0.1, "lr": 0.01}
CHANGES = {"held_out": ([0.5], {}), "scale_by_rank": ([False], {})}


def built(spelling="autolora", **budget):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached(spelling, base, data, budget={**SMALL, **budget})


def pairs(adapted):
    return [low for _, low in adapted.adapter.low_ranks()]


def search(adapted, steps=3, second_order=False, logit_lr=0.1, logits=None, lr=0.01):
    """A search over softmax gates on an adapter that has not begun it."""
    lows = pairs(adapted)
    logits = [torch.ones(low.rank, requires_grad=True) for low in lows] if logits is None else logits
    gates = lambda: [a.softmax(0) for a in logits]  # noqa: E731
    return Bilevel(adapted._stage, lows, logits, gates, steps, 0.3, lr, logit_lr, (0.5, 0.999), second_order), logits


@pytest.mark.parametrize(("weights", "want"), [
    ([0.25, 0.25, 0.25, 0.25], 4), ([0.3, 0.3, 0.2, 0.2], 2), ([0.97, 0.01, 0.01, 0.01], 1), ([1 / 3, 1 / 3, 1 / 3], 3),
    ([0.26, 0.26, 0.26, 0.22], 3), ([1.0], 1),
])  # fmt: skip
def test_ranks_by_their_weights(weights, want):
    assert selected(torch.tensor(weights)) == want


@pytest.mark.parametrize("rank", range(1, 65))
def test_uniform_logits_keep_every_rank(rank):
    assert selected(torch.ones(rank).softmax(0)) == rank


def test_without_steps_on_the_logits_it_is_lora_of_the_full_rank():
    base, data, adapted = built(logit_lr=1e-12)
    assert [low.rank for low in pairs(adapted)] == [4] * 4 and all(float(low.scale) == 4 for low in pairs(adapted))
    assert not any(low.B.any() or low.gate is not None for low in pairs(adapted))


def test_the_search_picks_ranks_and_all_starts_afresh():
    base, data, adapted = built()
    ranks = [low.rank for low in pairs(adapted)]
    assert all(1 <= r <= 4 for r in ranks) and sum(ranks) < 16
    found = adapted.adapter.counters()
    assert found["rank_total"] == sum(ranks) and found["search_steps"] == 4
    assert 1 < found["largest_weight"] < 4, "times the rank: 1 where all are equal"
    assert all(float(low.scale) == pytest.approx(16 / low.rank) for low in pairs(adapted))
    assert all(float(low.scale) == 4 for low in pairs(built(scale_by_rank=False)[2]))
    x = torch.randn(5, 24)
    assert torch.equal(adapted(x), base(x)) and not any(low.gate is not None for low in pairs(adapted))
    assert [low.rank for low in pairs(built()[2])] == ranks, "seeded"


def test_it_then_trains_as_lora_of_that_rank_pattern(tmp_path):
    base, data, adapted = built()
    pattern = {s.name: low.rank for s, low in adapted.adapter.low_ranks()}
    lora = attach(copy.deepcopy(base), "lora", rank=4, rank_pattern=pattern, alpha=16.0, seed=0)
    for low, other in zip(pairs(adapted), pairs(lora), strict=True):
        assert float(low.scale) == pytest.approx(float(other.scale))
        low.A.data.copy_(other.A.detach())
    losses = [train(m, data, m.optimizer(adamw, 6), steps=6) for m in (adapted, lora)]
    assert losses[0] == losses[1]
    adapted.save(tmp_path / "a")
    x, loaded = torch.randn(5, 24), load(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(loaded(x), adapted(x))
    assert torch.equal(loaded.begin(data, loss)(x), adapted(x)), "no second search"


def test_rows_are_in_one_part_alone():
    _, data, adapted = built()
    adapted.begin(data(8), loss)
    training, held_out = search(adapted, steps=100)[0].split()
    rows = [{b["x"].data_ptr() for b in part} for part in (training, held_out)]
    assert [len(r) for r in rows] == [6, 2] and not rows[0] & rows[1]
    with pytest.raises(UserError, match="give at least two"):
        attach(Net(), "autolora", batches=Regression(Net())(1), loss=loss)


def test_the_search_leaves_all_but_the_logits_as_it_was():
    _, _, adapted = built("dora+autolora")
    adapted.eval()
    before = copy.deepcopy(adapted.adapter.state_dict())
    s, logits = search(adapted)
    s.run()
    assert same(adapted.adapter.state_dict(), before) and not adapted.training
    assert all((a != 1).any() for a in logits if len(a) > 1) and any(len(a) > 1 for a in logits)
    assert all(p.grad is None for p in adapted.adapter.parameters())


def test_each_step_moves_its_own_side():
    """The factors on the training batches, the logits on the held-out ones."""
    _, _, adapted = built()
    seen = []
    s, logits = search(adapted, steps=3)
    s.stage.loss, real = (lambda b: (seen.append((b["x"].data_ptr(), [a.detach().clone() for a in logits],
                                     [low.B.detach().clone() for low in s.pairs])), real(b))[1]), s.stage.loss  # fmt: skip
    training, held_out = ([b["x"].data_ptr() for b in part] for part in s.split())
    s.run()
    assert [t[0] for t in seen] == [training[0], held_out[0], training[1], held_out[0], training[0], held_out[0]]
    for i in range(0, 6, 2):
        (_, a0, b0), (_, a1, b1) = seen[i : i + 2]
        assert all(torch.equal(p, q) for p, q in zip(a0, a1, strict=True)), "a step of the factors moves no logit"
        assert any(not torch.equal(p, q) for p, q in zip(b0, b1, strict=True))
        if i < 4:
            assert any(not torch.equal(p, q) for p, q in zip(a1, seen[i + 2][1], strict=True))
            assert all(torch.equal(p, q) for p, q in zip(b1, seen[i + 2][2], strict=True)), "nor the other way round"


def setting():
    """A pair of rank 3 in float64, away from zero, its two batches, and the loss as a function of (a, A, B)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    batches = [{"x": torch.randn(4, 6).double(), "y": torch.randn(4, 5).double()} for _ in range(2)]
    mse = lambda m, b: (m(b["x"]) - b["y"]).square().mean()  # noqa: E731
    adapted = attach(copy.deepcopy(model), "lora", rank=3, alpha=3.0, batches=batches, loss=mse, target_modules=["0"], seed=0)
    (low,) = pairs(adapted)
    with torch.no_grad():
        low.B.normal_()

    def of(a, left, right, b):
        w = model[0].weight + right @ torch.diag(a.softmax(0)) @ left
        return (nn.functional.linear(b["x"], w, model[0].bias) - b["y"]).square().mean()

    return adapted, low, batches, of


@pytest.mark.parametrize("second_order", [False, True])
def test_the_hypergradient_is_autograds(second_order):
    """d/da L_val(theta - lr dL_train/dtheta, a), its second term by a finite difference, against autograd through the step."""
    adapted, low, (training, held_out), of = setting()
    a = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    lr = 0.5
    s, _ = search(adapted, second_order=second_order, logits=[a], lr=lr)
    low.set_mask(a.detach().softmax(0).requires_grad_(), always=True)
    theta = [low.A, low.B]
    outer = torch.optim.SGD([a], lr=0.0)
    with torch.enable_grad():
        s.step_logits(outer, theta, held_out, training)
    left, right = (p.detach().clone().requires_grad_(True) for p in theta)
    want = torch.autograd.grad(of(a, left, right, held_out), a)[0]
    if second_order:
        v = torch.autograd.grad(of(a, left, right, held_out), (left, right))
        slopes = torch.autograd.grad(of(a, left, right, training), (left, right), create_graph=True)
        mixed = torch.autograd.grad(sum((g * d).sum() for g, d in zip(slopes, v, strict=True)), a)[0]
        assert (lr * mixed).norm() > 0.05 * want.norm()
        want = want - lr * mixed
    assert (a.grad - want).norm() < 1e-4 * want.norm()
    assert torch.equal(low.A, left) and torch.equal(low.B, right), "the difference is taken back"


def test_a_rank_that_carries_the_signal_is_kept():
    """A teacher of rank one: its weight grows, and others fall below 1/r."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12))
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher[0].weight += 2 * torch.randn(12, 1) @ torch.randn(1, 12)
    x = torch.randn(4, 32, 12)
    batches = [{"x": b, "y": teacher(b).detach()} for b in x]
    adapted = attach(model, "autolora", rank=4, batches=batches, loss=loss, seed=1, target_modules=["0"],
                     budget={"steps": 60, "lr": 0.02, "logit_lr": 0.02})  # fmt: skip
    assert 1 <= pairs(adapted)[0].rank < 4


@pytest.mark.parametrize(("options", "said"), [
    ({"steps": 0}, "steps is 0"), ({"held_out": 0.0}, "held_out is 0.0"), ({"held_out": 1.0}, "held_out is 1.0"),
    ({"lr": 0.0}, "lr is 0.0"), ({"logit_lr": -1.0}, "logit_lr is -1.0"),
])  # fmt: skip
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("autolora", budget=options)
