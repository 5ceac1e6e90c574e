import copy

import pytest
import torch
from support import Net, Regression, adamw, attached, close, loss, perturb, same, train

from lorafactory import UserError, checkpoint, load
from lorafactory.adapter import Step

SMALL = {"every": 5}
CHANGES = {"pruned": ([0.5], {})}
TARGETS = ["fc1", "fc2", "fc3"]


def setting(variant="relora", dtype=torch.float32, rank=2, **dynamics):
    torch.manual_seed(0)
    base = Net().to(dtype)
    data = Regression(base)
    options = {"dynamics": {"every": 4, **dynamics}} if "relora" in variant else {}
    return attached(variant, base, data, rank=rank, target_modules=TARGETS, **options), data


def pairs(adapted):
    return {s.name: low for s, low in adapted.adapter.low_ranks()}


def part(adapted):
    return adapted.adapter.parts["dynamics"]


@pytest.mark.parametrize("variant", ["relora", "dora+relora", "pissa+relora"])
def test_a_restart_leaves_the_function(variant):
    """After the step that restarts, the model is what it would be without: only the factors are new."""
    adapted, data = setting(variant)
    other, _ = setting(variant, every=99)
    x = torch.randn(7, 24)
    for m in (adapted, other):
        perturb(m.adapter, 0.3)
        train(m, data, m.optimizer(adamw, 9), steps=4)
    assert close(adapted(x), other(x)) and not close(adapted(x), adapted.model.fc1.weight.new_zeros(7, 8))
    assert adapted.adapter.counters() == {"restarts": 1} and other.adapter.counters() == {"restarts": 0}
    for n, low in pairs(adapted).items():
        assert low.A_past is not None and not low.B.any() and low.A0 is None
        assert not torch.equal(low.A, pairs(other)[n].A) and low.A.abs().max() <= low.A.shape[1] ** -0.5
        assert close(low.product(), pairs(other)[n].product())


def test_the_past_is_the_update_so_far():
    """W0 <- W0 + s B A, in numbers."""
    adapted, data = setting(rank=1)
    low = pairs(adapted)["fc1"]
    with torch.no_grad():
        low.A.fill_(0.5)
        low.B.fill_(2.0)
    optimizer = adapted.optimizer(lambda groups: torch.optim.SGD(groups, lr=0.0), 5)
    train(adapted, data, optimizer, steps=4)
    assert torch.equal(low.B_past @ low.A_past, torch.full((40, 24), 16.0))  # s = alpha / rank = 16


def test_rank_grows_with_the_cycles_and_is_compacted():
    adapted, data = setting(dtype=torch.float64, every=3)
    optimizer = adapted.optimizer(adamw, 45)
    for cycle in range(1, 16):
        train(adapted, data, optimizer, start=3 * cycle - 3, steps=3 * cycle)
        for low in pairs(adapted).values():
            found = int(torch.linalg.matrix_rank(low.product(), rtol=1e-10))
            assert found <= min(24, 2 * cycle)
            assert cycle > 3 or found == 2 * cycle
            assert low.A_past is None or low.A_past.shape[0] <= 24
    assert adapted.adapter.counters() == {"restarts": 14}  # none after the last step
    assert all(int(torch.linalg.matrix_rank(low.product())) > 20 for low in pairs(adapted).values())


LEFT = [("random", None, 0.001), ("magnitude", None, 0.1), ("zero", None, 0.0), ("none", None, 1.0)]


@pytest.mark.parametrize("prune, pruned, left", [*LEFT, ("random", 0.5, 0.5), ("magnitude", 0.75, 0.25)])
def test_moments_are_pruned(prune, pruned, left):
    adapted, data = setting(rank=8, prune=prune, pruned=pruned)
    optimizer = adapted.optimizer(adamw, 9)
    train(adapted, data, optimizer, steps=3)
    before = {p: {k: t.clone() for k, t in s.items()} for p, s in optimizer.state.items()}
    train(adapted, data, optimizer, start=3, steps=4)
    for low in pairs(adapted).values():
        for p in (low.A, low.B):
            state = optimizer.state[p]
            assert float(state["step"]) == 4
            gone = state["exp_avg_sq"] == 0  # every gradient here is away from zero
            assert int((~gone).sum()) == p.numel() - round((1 - left) * p.numel())
            assert torch.equal(gone, state["exp_avg"] == 0), "one moment survives without the other"
            grown = 0.9 * before[p]["exp_avg"] + 0.1 * p.grad  # what the moment was when it was pruned
            assert torch.allclose(state["exp_avg"][~gone], grown[~gone])
            if prune == "magnitude":
                assert grown[~gone].abs().min() >= grown[gone].abs().max()


def test_random_pruning_is_seeded_by_the_step():
    kept = []
    for _ in range(2):
        adapted, data = setting(pruned=0.5)
        optimizer = adapted.optimizer(adamw, 9)
        train(adapted, data, optimizer, steps=4)
        kept.append([s["exp_avg"] for s in optimizer.state.values()])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_all_else_keeps_its_moments():
    adapted, data = setting("dora+relora", prune="zero")
    optimizer = adapted.optimizer(adamw, 9)
    train(adapted, data, optimizer, steps=4)
    in_pairs = {p for low in pairs(adapted).values() for p in (low.A, low.B)}
    others = [s for p, s in optimizer.state.items() if p not in in_pairs]
    assert len(others) == 3 and all(s["exp_avg_sq"].all() for s in others)
    assert not any(optimizer.state[p]["exp_avg_sq"].any() for p in in_pairs)


def test_the_rate_rises_again_from_zero():
    """every 10, ramp of 4 steps: 1 through the first cycle, then 0, 1/4, 2/4, 3/4, 1, …; shares give the same."""
    for options in ({"every": 10, "warmup": 4}, {"every": 0.25, "warmup": 0.4}):
        p = part(setting(**options)[0])
        found = [p.rate(Step(i, 40, None)) for i in range(40)]
        assert found == [1.0] * 10 + 3 * [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    still = part(setting(every=10, warmup=0)[0])
    assert {still.rate(Step(i, 40, None)) for i in range(40)} == {1.0}
    short = part(setting(every=0.25, warmup=0.1)[0])  # the first step stands still, and no cycle is a single one
    assert [short.rate(Step(i, 4, None)) for i in range(4)] == [1, 1, 0, 1]


def test_the_ramp_multiplies_the_schedule_and_the_first_step_is_still():
    adapted, data = setting(warmup=2)
    optimizer = adapted.optimizer(lambda groups: torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0), 9)
    used = []
    optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))  # after the lifecycle's own
    frozen = None
    for i in range(8):
        for g in optimizer.param_groups:
            g["lr"] = 1e-3 * (10 - i)
        train(adapted, data, optimizer, start=i, steps=i + 1)
        if i == 3:
            frozen = {n: p.detach().clone() for n, p in adapted.adapter.named_parameters()}
        if i == 4:
            assert same(dict(adapted.adapter.named_parameters()), frozen)
    ramp = [1, 1, 1, 1, 0, 0.5, 1, 1]
    assert used == pytest.approx([1e-3 * (10 - i) * ramp[i] for i in range(8)])


def test_no_restart_is_lora():
    adapted, data = setting(every=8)
    lora, _ = setting("lora")
    losses = [train(m, data, m.optimizer(adamw, 8), steps=8) for m in (adapted, lora)]
    assert losses[0] == losses[1] and adapted.adapter.counters() == {"restarts": 0}
    trained = {n: t for n, t in adapted.adapter.state_dict().items() if n.startswith("deltas.")}
    assert same(trained, lora.adapter.state_dict())


@pytest.mark.parametrize("every", [3, 4])
def test_resume_through_and_at_a_restart(every, tmp_path):
    straight, data = setting(every=every, pruned=0.5)
    want = train(straight, data, straight.optimizer(adamw, 8), steps=8)
    first, _ = setting(every=every, pruned=0.5)
    optimizer = first.optimizer(adamw, 8)
    train(first, data, optimizer, steps=3)
    checkpoint.save(first, tmp_path / "a", {"step": 3}, optimizer)
    again, _ = setting(every=every, pruned=0.5)
    checkpoint.restore(again, tmp_path / "a")
    optimizer = again.optimizer(adamw, 8)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=3, steps=8) == want[3:]
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())
    assert again.adapter.counters() == {"restarts": 7 // every}


def test_a_checkpoint_holds_the_past_and_merges_it(tmp_path):
    adapted, data = setting()
    train(adapted, data, adapted.optimizer(adamw, 11), steps=11)
    perturb(adapted.adapter)
    x = torch.randn(7, 24)
    y = adapted.eval()(x)
    loaded = load(copy.deepcopy(adapted).detach(), adapted.save(tmp_path / "a"))
    assert torch.equal(loaded.eval()(x), y)
    w0 = adapted.model.fc1.weight.clone()
    low = pairs(adapted)["fc1"]
    adapted.merge()
    past = low.B_past @ low.A_past
    assert past.abs().max() > 1e-3 and close(adapted.model.fc1.weight, w0 + past + low.scale * low.B @ low.A)
    assert close(adapted(x), y)


def test_dropout_spares_the_past():
    """What was folded counts as the base, which dropout does not touch."""
    low = pairs(setting()[0])["fc1"]
    perturb(low, 0.3)
    low.fold()
    low.dropout = 0.5
    x = torch.randn(64, 24)
    assert close(low.train()(x), x @ low.product().T)  # B = 0 again: the past is all there is
    perturb(low, 0.3)
    assert not close(low.train()(x), x @ low.product().T) and close(low.eval()(x), x @ low.product().T)
    low.train()
    mean = torch.stack([low(x) for _ in range(400)]).mean(0)
    assert (mean - x @ low.product().T).norm() < 0.2 * low(x).norm()


WRONG = [{"every": 0}, {"every": 1}, {"every": -3}, {"warmup": -1}, {"prune": "all"}, {"pruned": 1.5}]


@pytest.mark.parametrize("wrong", [*WRONG, {"prune": "zero", "pruned": 0.5}])
def test_values_without_meaning(wrong):
    with pytest.raises(UserError, match=list(wrong)[-1]):
        setting(**wrong)


def test_the_base_stays():
    adapted, data = setting()
    before = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    train(adapted, data, adapted.optimizer(adamw, 9), steps=9)
    assert same(adapted.model.state_dict(), before)
    first = loss(adapted, data(1)[0])
    with adapted.disabled():
        assert loss(adapted, data(1)[0]) > first
