"""IncreLoRA: importance by hand, growth to a budget, the reserve, and what the optimiser knows of new ranks."""

import copy

import pytest
import torch
from support import Net, Regression, adamw, attached, close, loss, perturb, same, train

from lorafactory import Adapted, UserError, attach, checkpoint, load
from lorafactory.variants.increlora import RESERVE

SMALL = {"until": 0.6}
CHANGES = {"count": ([1], {}), "top": ([4], {})}


def built(spelling="increlora", options=None, **budget):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached(spelling, base, data, budget=budget, **(options or {}))


def pairs(adapted):
    return [low for _, low in adapted.adapter.low_ranks()]


def part(adapted):
    return adapted.adapter.parts["budget"]


def test_it_starts_at_rank_one_with_a_reserve():
    """rank 4: two ranks wait beside each first one, A and B of all N(0, 0.02^2), gates 0 and 1e-5."""
    base, data, adapted = built()
    assert part(adapted).active.tolist() == [1] * 4 and part(adapted).target == 16
    for low in pairs(adapted):
        assert low.rank == 3 and low.gate.tolist() == pytest.approx([0.0, RESERVE, RESERVE])
        assert 0.01 < low.A.std() < 0.03 and low.B.any()
        assert float(low.scale) == 16.0, "alpha over one rank"
    x = torch.randn(5, 24)
    assert close(adapted(x), base(x)) and not torch.equal(adapted(x), base(x))
    _, _, plain = built(advance=False)
    assert torch.equal(plain(x), base(x)) and [low.rank for low in pairs(plain)] == [1] * 4


def test_importance_by_hand():
    """y = W x, loss |y|^2: G = 2 y x^T; I = sum |dW G| / sqrt(d_out d_in), smoothed from 0, U = 0.15 |I - smoothed I|."""
    model, batch = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False)), torch.tensor([[3.0, 1.0]])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    square = lambda m, b: m(b).square().sum()  # noqa: E731
    budget = {"advance": False, "scale": "fixed", "penalty": 0.0, "warmup": 0.5, "until": 1.0, "top": 1}
    adapted = attach(model, "increlora", rank=2, alpha=2.0, batches=[batch], loss=square, budget=budget, target_modules=["0"])
    (low,) = pairs(adapted)
    with torch.no_grad():
        low.A.copy_(torch.tensor([[1.0, 2.0]]))
        low.B.copy_(torch.tensor([[0.5], [0.0]]))
        low.gate.fill_(2.0)  # dW = [[1, 2], [0, 0]]: y = 2 + 5 = 7, G = [[42, 14], [0, 0]]
    optimizer = adapted.optimizer(lambda g: torch.optim.SGD(g, lr=0.0), 9)
    square(adapted, batch).backward()
    optimizer.step()
    now = (1 * 42 + 2 * 14) / 2
    i = 0.15 * now
    assert part(adapted).smoothed.flatten().tolist() == pytest.approx([i, 0.15 * (now - i)], rel=1e-5)


def test_importance_is_that_of_the_dense_gradient():
    """Against autograd with the update as a leaf, over two micro-batches."""
    base, data, adapted = built(scale="fixed", penalty=0.0)
    perturb(adapted.adapter, 1.0)
    want = []
    for name, low in ((s.name, low) for s, low in adapted.adapter.low_ranks()):
        dense = copy.deepcopy(base).requires_grad_(False)
        with torch.no_grad():
            for s, other in adapted.adapter.low_ranks():
                dense.get_submodule(s.name).weight.add_(other.product())
        dense.get_submodule(name).weight.requires_grad_(True)
        sum(loss(dense, b) for b in data(2)).backward()
        w = low.product().detach()
        want.append(0.15 * (w * dense.get_submodule(name).weight.grad).abs().sum() / w.numel() ** 0.5)
    optimizer = adapted.optimizer(adamw, 40)
    for b in data(2):
        loss(adapted, b).backward()
    optimizer.step()
    assert close(part(adapted).smoothed[0], torch.stack(want), 10)
    with torch.no_grad():
        loss(adapted, data(1)[0])
    loss(adapted.eval(), data(1)[0]).backward()
    assert not part(adapted).gathered, "neither evaluation nor a probe counts"


def test_importance_is_summed_over_processes():
    found = []
    for processes in (1, 3):
        _, data, adapted = built()
        optimizer = adapted.optimizer(adamw, 40)
        perturb(adapted.adapter, 1.0)
        optimizer.lifecycle.sum = lambda t, n=processes: n * t  # as if the others had the same rows
        train(adapted, data, optimizer, steps=1)
        found.append(part(adapted).smoothed[0].clone())
    assert found[0].min() > 1e-4 and torch.allclose(found[1], 3 * found[0])


def test_ranks_grow_in_rounds_up_to_the_budget():
    """16 steps, rounds at equal distances from step 2 to 8; the two most important pairs grow by two, the last by the rest."""
    _, data, adapted = built(top=2, count=2)
    totals, ranks = [], []

    def watch(i):
        totals.append(int(part(adapted).active.sum()))
        ranks.append([low.rank for low in pairs(adapted)])

    train(adapted, data, adapted.optimizer(adamw, 16), watch=watch)
    assert part(adapted).rounds(16) == 3 and totals == [4] * 4 + [8] * 2 + [12] * 2 + [16] * 8
    assert ranks[3] == [3] * 4 and sorted(ranks[4]) == [3, 3, 5, 5]
    assert sum(ranks[-1]) == 16, "the reserve is gone"
    assert part(adapted).counters()["rank_total"] == 16 and adapted.end() is False
    _, data, odd = built(top=1, count=5, until=0.9)
    train(odd, data, odd.optimizer(adamw, 16))
    assert sum(low.rank for low in pairs(odd)) == 16


def test_a_short_run_grows_more_pairs_at_once():
    """12 ranks to give by twos: a pair a round in 6 rounds, where 40 steps leave 16; three pairs in 2 rounds of 4 steps."""
    p = part(built()[2])
    assert (p.rounds(40), p.top(40), p.rounds(4), p.top(4)) == (6, 1, 2, 3)


def test_the_most_important_pair_grows():
    _, _, adapted = built(top=1)
    part(adapted).smoothed.copy_(torch.tensor([[1.0, 9.0, 3.0, 5.0], [1.0, 1.0, 4.0, 1.0]]))
    part(adapted).grow(1)
    assert part(adapted).active.tolist() == [1, 1, 3, 1]


@pytest.mark.parametrize("advance", [True, False])
def test_growing_keeps_the_function(advance):
    """With a fixed scale, up to the gates of 1e-5; by alpha over the ranks now, the old ranks shrink."""
    for scale in ("fixed", "rank"):
        _, _, adapted = built(scale=scale, advance=advance, top=1)
        perturb(adapted.adapter, 3.0)
        part(adapted).settle()
        x, before = torch.randn(5, 24), [low.product().detach() for low in pairs(adapted)]
        y, old = adapted(x), [low.A.detach().clone() for low in pairs(adapted)]
        part(adapted).grow(1)
        assert part(adapted).active.tolist().count(3) == 1
        assert all(torch.equal(low.A[: len(a)], a) for low, a in zip(pairs(adapted), old, strict=True))
        for low, w, k in zip(pairs(adapted), before, part(adapted).active.tolist(), strict=True):
            shrunk = w / k if scale == "rank" else w
            assert (low.product() - shrunk).norm() < (1e-4 if advance else 1e-6) * w.norm()
            assert float(low.scale) == pytest.approx(16 / k if scale == "rank" else 4)
        assert scale == "rank" or close(adapted(x), y, 10)


def test_reserve_trains_its_factors_behind_a_still_gate():
    _, data, adapted = built(warmup=0.4, until=0.9, top=4)
    before = [(low.A.detach().clone(), low.B.detach().clone()) for low in pairs(adapted)]
    optimizer = adapted.optimizer(adamw, 16)
    train(adapted, data, optimizer, steps=4)
    for low, (a, b) in zip(pairs(adapted), before, strict=True):
        assert low.gate[0] != 0 and low.gate[1:].tolist() == pytest.approx([RESERVE] * 2)
        assert (low.A[1:] != a[1:]).all() and (low.B[:, 1:] != b[:, 1:]).all()
        assert (optimizer.state[low.gate]["exp_avg"] != 0).all(), "its moments are those of its gradients"


def test_every_live_parameter_is_owned_once_and_new_ones_start_afresh():
    _, data, adapted = built(top=1, count=2, until=0.9)
    optimizer = adapted.optimizer(adamw, 40)
    train(adapted, data, optimizer, steps=9)
    assert sorted(part(adapted).active.tolist()) == [1, 1, 1, 3]
    owned = [p for g in optimizer.param_groups for p in g["params"]]
    live = [p for p in adapted.adapter.parameters() if p.requires_grad]
    assert len(owned) == len(set(owned)) == len(live) and set(owned) == set(live)
    for low, k in zip(pairs(adapted), part(adapted).active.tolist(), strict=True):
        steps = {float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0 for p in (low.A, low.B, low.gate)}
        assert steps == {9.0} if k == 1 else max(steps) < 9


def test_when_the_reserve_goes_the_others_keep_their_moments():
    """The last round is step 8; one pair grows in it."""
    _, data, adapted = built(top=1, count=2)
    optimizer = adapted.optimizer(adamw, 16)
    train(adapted, data, optimizer, steps=7)
    assert part(adapted).growing()
    before = part(adapted).active.clone()
    train(adapted, data, optimizer, steps=8, start=7)
    assert not part(adapted).growing()
    for low, grew in zip(pairs(adapted), (part(adapted).active != before).tolist(), strict=True):
        for p in (low.A, low.B, low.gate):
            assert (p not in optimizer.state) if grew else optimizer.state[p]["exp_avg"].shape == p.shape


def test_a_layer_of_several_pairs_is_gathered_once():
    _, data, adapted = built("increlora+molora")
    loss(adapted, data(1)[0]).backward()
    found = {k: g.clone() for k, g in part(adapted).gathered.items()}
    _, _, plain = built()
    loss(plain, data(1)[0]).backward()
    assert found.keys() == part(plain).gathered.keys()
    assert all((found[k] - g).norm() < 1e-3 * g.norm() for k, g in part(plain).gathered.items()), "both stand at the base"


def test_penalty_is_the_mean_over_the_pairs():
    """A A^T - I = diag(3, -1, -1), B^T B - I = diag(0, -1, -1)."""
    _, _, adapted = built()
    with torch.no_grad():
        for low in pairs(adapted):
            low.A.zero_()
            low.A[0, 0] = 2.0
            low.B.zero_()
            low.B[0, 0] = 1.0
    assert float(adapted.penalty().detach()) == pytest.approx(0.1 * (11**0.5 + 2**0.5) / 2)


@pytest.mark.parametrize("kill", [3, 5, 9, 12])
def test_resume_before_between_and_after_growth(kill, tmp_path):
    options = {"top": 2, "count": 2, "until": 0.7}
    base, data, straight = built(**options)
    want = train(straight, data, straight.optimizer(adamw, 14), steps=14)
    _, _, first = built(**options)
    optimizer = first.optimizer(adamw, 14)
    train(first, data, optimizer, steps=kill)
    checkpoint.save(first, tmp_path / "a", {"step": kill}, optimizer)
    again = Adapted(copy.deepcopy(base), first.adapter.config, seed=9)
    checkpoint.restore(again, tmp_path / "a")
    optimizer = again.optimizer(adamw, 14)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=kill, steps=14) == want[kill:]
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())
    straight.end()
    straight.save(tmp_path / "b")
    x = torch.randn(5, 24)
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "b")(x), straight(x))
    assert len({low.rank for low in pairs(straight)}) > 1


def test_a_step_that_overflowed_tells_nothing():
    _, data, adapted = built()
    optimizer = adapted.optimizer(adamw, 40)
    train(adapted, data, optimizer, steps=2)
    before = part(adapted).smoothed.clone()
    part(adapted).gathered["fc1"] = torch.full((40, 24), float("inf"))
    train(adapted, data, optimizer, steps=3, start=2)
    assert torch.equal(part(adapted).smoothed, before) and before.any()
    train(adapted, data, optimizer, steps=4, start=3)
    assert not torch.equal(part(adapted).smoothed, before)


@pytest.mark.parametrize(("options", "said"), [
    ({"warmup": 0.6}, "the first the smaller"), ({"scale": "alpha"}, "rank, fixed"), ({"start": 0}, "start is 0"),
    ({"start": 4}, "nothing to grow to"), ({"beta1": 1.0}, "beta1 is 1.0"), ({"count": 0}, "count is 0"),
])  # fmt: skip
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "increlora", rank=4, budget=options)


def test_a_run_too_short_for_its_rounds_is_refused_at_its_first_step():
    _, data, adapted = built(top=1, count=1)
    with pytest.raises(UserError, match="16 steps leave 6 between warmup=0.1 and until=0.5 for 12 rounds"):
        train(adapted, data, adapted.optimizer(adamw, 16), steps=1)
