"""ALoRA: scores by ablation, ranks that move from pair to pair, and what the optimiser keeps."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close, loss, perturb, same, train

from lorafactory import Adapted, UserError, attach, checkpoint, load, registry

SMALL = {"rounds": 2, "pruned": 0.2}
CHANGES = {"batches": ([5], {"pruned": 0.3})}

SCORES = [torch.tensor(s) for s in ([5.0, 6, 7, 8], [-3.0, -2, 9, 9], [4.0, 4, 4, 9], [1.0, 2, 3, 4])]


def built(spelling="alora", **budget):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached(spelling, base, data, budget={**SMALL, **budget})


def pairs(adapted):
    return [low for _, low in adapted.adapter.low_ranks()]


def part(adapted):
    return adapted.adapter.parts["budget"]


def test_scores_by_hand():
    """y = (W0 + B A) x with W0 = 0, x = 1, target 5: ranks add 3, 2 and -1. The loss is (5 - sum)^2."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    nn.init.zeros_(model[0].weight)
    square = lambda m, b: (m(b)[..., 0] - 5).square().mean()  # noqa: E731
    x = torch.tensor([[1.0, 0.0, 0.0]])
    adapted = attach(model, "alora", rank=3, alpha=3.0, batches=[x], loss=square, target_modules=["0"])
    (low,) = pairs(adapted)
    with torch.no_grad():
        low.A.copy_(torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]]))
        low.B.copy_(torch.tensor([[3.0, 2, -1], [0, 0, 0], [0, 0, 0]]))
        (found,) = part(adapted).scores(adapted._stage)
    assert found.tolist() == pytest.approx([(5 - 1) ** 2 - (5 - 3) ** 2, (5 - 2) ** 2 - (5 - 2) ** 2, 0 - (5 + 1) ** 2])
    assert low.gate is None and low.mask is None


def test_a_score_is_that_of_a_model_without_and_with_only_that_rank():
    """Against copies whose factors lack the other columns; modes, numbers and the generator stay."""
    base, data, adapted = built(batches=2)
    perturb(adapted.adapter, 1.0)
    before, state = copy.deepcopy(adapted.adapter.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        scores = part(adapted).scores(adapted._stage)
        assert same(adapted.adapter.state_dict(), before) and torch.equal(torch.get_rng_state(), state)
        assert adapted.training
        for i, k in ((0, 1), (2, 3)):
            values = []
            for alone in (False, True):
                twin = copy.deepcopy(adapted)
                for j, low in enumerate(pairs(twin)):
                    for c in range(low.rank):
                        if ((j, c) != (i, k)) == alone:
                            low.B[:, c] = 0
                values.append(sum(float(loss(twin, b)) for b in data(2)) / 2)
            assert float(scores[i][k]) == pytest.approx(values[0] - values[1], rel=1e-4, abs=1e-6)


def test_ranks_move_to_the_pairs_that_lost_none():
    """16 ranks, a fifth is 3: the second pair loses two, the last one; the others share three, the better one more."""
    _, _, adapted = built()
    perturb(adapted.adapter, 1.0)
    kept = [(low.A.detach().clone(), low.B.detach().clone()) for low in pairs(adapted)]
    with torch.no_grad():
        part(adapted).reallocate(SCORES)
    assert [low.rank for low in pairs(adapted)] == [5, 2, 6, 3]
    want = [[0, 1, 2, 3], [2, 3], [0, 1, 2, 3], [1, 2, 3]]
    for low, (a, b), index in zip(pairs(adapted), kept, want, strict=True):
        n = len(index)
        assert torch.equal(low.A[:n], a[index]) and torch.equal(low.B[:, :n], b[:, index])
        assert not low.B[:, n:].any() and (n == low.rank or low.A[n:].abs().max() <= low.A.shape[1] ** -0.5)
    assert part(adapted).counters() == {"reallocations": 1, "ranks_moved": 3, "rank_total": 16}


def test_a_layer_never_gets_more_than_it_can_hold_and_a_shortage_goes_on():
    _, _, adapted = built()
    assert part(adapted).shares(9, [4, 4, 0, 1], [torch.zeros(4)] * 4) == [0, 0, 9, 0]
    head = pairs(adapted)[3]
    with torch.no_grad():
        head.grow(3)
    assert part(adapted).shares(5, [0, 2, 2, 0], [torch.zeros(4), torch.ones(4), torch.zeros(4), torch.ones(7)]) == [4, 0, 0, 1]
    assert part(adapted).shares(3, [1, 1, 1, 0], [torch.zeros(4)] * 3 + [torch.ones(7)]) == [1, 1, 0, 1]


def test_growing_keeps_the_function_and_pruning_is_deleting():
    _, _, adapted = built()
    perturb(adapted.adapter, 1.0)
    x = torch.randn(5, 24)
    y, low = adapted(x), pairs(adapted)[0]
    low.grow(3)
    assert low.rank == 7 and close(adapted(x), y)
    with torch.no_grad():
        product = low.product()
        rest = product - float(low.scale) * low.B[:, 1:2] @ low.A[1:2]
        low.keep(torch.tensor([0, 2, 3, 4, 5, 6]))
        assert close(low.product(), rest) and not close(low.product(), product)


def test_an_anchored_pair_grows_too():
    _, _, adapted = built("alora+pissa")
    perturb(adapted.adapter, 0.3)
    x = torch.randn(5, 24)
    y = adapted(x)
    pairs(adapted)[0].grow(2)
    assert close(adapted(x), y)
    with torch.no_grad():
        before = [low.product().clone() for low in pairs(adapted)]
        part(adapted).scores(adapted._stage)
        assert all(torch.equal(low.product(), w) for low, w in zip(pairs(adapted), before, strict=True))


def test_the_sum_of_ranks_stays_and_rounds_are_spread():
    _, data, adapted = built(rounds=3, warmup=0.25, until=0.75)
    assert part(adapted).due(16) == {7, 9, 12}
    ranks = []
    train(adapted, data, adapted.optimizer(adamw, 16), watch=lambda i: ranks.append([low.rank for low in pairs(adapted)]))
    assert all(sum(r) == 16 for r in ranks) and [i for i in range(1, 16) if ranks[i] != ranks[i - 1]] == [7, 9, 12]
    assert part(adapted).counters() == {"reallocations": 3, "ranks_moved": 9, "rank_total": 16}


def test_a_rank_that_carries_the_signal_stays_to_the_end():
    """A teacher that differs in one layer by one rank: the layers without use lose theirs, that one never its best."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher[1].weight += torch.randn(12, 1) @ torch.randn(1, 12)
    x = torch.randn(64, 12)
    batches = [{"x": x, "y": teacher(x).detach()}]
    adapted = attach(model, "alora", rank=2, batches=batches, loss=loss, budget={"rounds": 1, "pruned": 0.3}, seed=0)
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-2), 100)
    for _ in range(100):
        optimizer.zero_grad()
        loss(adapted, batches[0]).backward()
        optimizer.step()
    with torch.no_grad():
        scores = part(adapted).scores(adapted._stage)
    assert max(range(3), key=lambda i: float(scores[i].max())) == 1


def test_a_pair_that_only_lost_keeps_its_moments():
    _, data, adapted = built()
    optimizer = adapted.optimizer(adamw, 40)
    train(adapted, data, optimizer, steps=3)
    old = pairs(adapted)
    states = [{n: dict(optimizer.state[getattr(low, n)]) for n in "AB"} for low in old]
    optimizer.lifecycle.rebuild(part(adapted).reallocate(SCORES))
    second, first = pairs(adapted)[1], pairs(adapted)[0]
    for name, dim in (("A", 0), ("B", 1)):
        now, then = optimizer.state[getattr(second, name)], states[1][name]
        assert float(now["step"]) == 3
        for k in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(now[k], then[k].index_select(dim, torch.tensor([2, 3]))) and now[k].any()
        assert getattr(first, name) not in optimizer.state
    owned = [p for g in optimizer.param_groups for p in g["params"]]
    assert set(owned) == {p for p in adapted.adapter.parameters() if p.requires_grad} and set(optimizer.state) <= set(owned)


@pytest.mark.parametrize("kill", [4, 7, 12])
def test_resume_before_between_and_after_the_rounds(kill, tmp_path):
    base, data, straight = built()
    want = train(straight, data, straight.optimizer(adamw, 14), steps=14)
    _, _, first = built()
    optimizer = first.optimizer(adamw, 14)
    train(first, data, optimizer, steps=kill)
    checkpoint.save(first, tmp_path / "a", {"step": kill}, optimizer)
    again = Adapted(copy.deepcopy(base), first.adapter.config, seed=9)
    checkpoint.restore(again, tmp_path / "a")
    again.begin(data, loss)
    optimizer = again.optimizer(adamw, 14)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=kill, steps=14) == want[kill:]
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())
    assert {low.rank for low in pairs(straight)} != {4}
    straight.save(tmp_path / "b")
    x = torch.randn(5, 24)
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "b")(x), straight(x))


def test_without_data_it_says_so():
    with pytest.raises(UserError, match="'alora' starts from data"):
        attach(Net(), "alora")
    base, data, adapted = built()
    bare = Adapted(copy.deepcopy(base), adapted.adapter.config, 0)
    with pytest.raises(UserError, match="measures the loss while it trains"):
        train(bare, data, bare.optimizer(adamw, 4))


@pytest.mark.parametrize(("options", "said"), [
    ({"warmup": 0.9}, "the first the smaller"), ({"pruned": 0.0}, "pruned is 0.0"), ({"rounds": 0}, "rounds is 0"),
    ({"batches": 0}, "batches is 0"),
])  # fmt: skip
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("alora", budget=options)


def test_a_short_run_has_fewer_rounds_and_one_without_any_is_refused():
    assert part(built(rounds=9)[2]).due(4) == {1, 2, 3}
    _, data, adapted = built(until=0.4)
    with pytest.raises(UserError, match="1 steps leave none between warmup=0.1 and until=0.4"):
        train(adapted, data, adapted.optimizer(adamw, 1), steps=1)
