import pytest
import torch
from support import Net, Regression, adamw, attached, close, perturb, same, train

from lorafactory import UserError, checkpoint
from lorafactory.adapter import Step

SMALL = {"every": 5}
TARGETS = ["fc1", "fc2", "fc3"]


def setting(variant="periodic_lora", dtype=torch.float64, rank=2, **dynamics):
    torch.manual_seed(0)
    base = Net().to(dtype)
    data = Regression(base)
    options = {"dynamics": {"every": 4, **dynamics}} if "periodic_lora" in variant else {}
    return attached(variant, base, data, rank=rank, target_modules=TARGETS, **options), data


def pairs(adapted):
    return {s.name: low for s, low in adapted.adapter.low_ranks()}


@pytest.mark.parametrize("variant", ["periodic_lora", "dora+periodic_lora", "pissa+periodic_lora"])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_unloading_leaves_the_function(variant, momentum):
    """After the step that unloads, the model is what it would be without."""
    adapted, data = setting(variant, momentum=momentum)
    other, _ = setting(variant, every=99)
    x = torch.randn(7, 24, dtype=torch.float64)
    for m in (adapted, other):
        perturb(m.adapter, 0.3)
        train(m, data, m.optimizer(adamw, 9), steps=4)
    assert close(adapted(x), other(x)) and not close(adapted(x), adapted.model.fc1.weight.new_zeros(7, 8))
    for n, low in pairs(adapted).items():
        plain = pairs(other)[n]
        assert close(low.B, momentum * plain.B) and close(low.product(), plain.product())
        if momentum:
            assert torch.equal(low.A, plain.A)
            assert close(low.B_past @ low.A_past, (1 - momentum) * plain.product())
        else:
            assert not torch.equal(low.A, plain.A) and close(low.B_past @ low.A_past, plain.product())


def test_by_hand():
    """B A = 2, s = 16, m = 1/4: 24 of 32 goes into the past, B is 1/4 of what it was."""
    adapted, data = setting(rank=1, momentum=0.25)
    low = pairs(adapted)["fc1"]
    with torch.no_grad():
        low.A.fill_(0.5)
        low.B.fill_(4.0)
    train(adapted, data, adapted.optimizer(lambda g: torch.optim.SGD(g, lr=0.0), 5), steps=4)
    assert torch.equal(low.B_past @ low.A_past, torch.full((40, 24), 24.0, dtype=torch.float64))
    assert torch.equal(low.B, torch.ones(40, 1, dtype=torch.float64)) and bool((low.A == 0.5).all())


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_rank_grows_with_the_stages_and_is_compacted(momentum):
    adapted, data = setting(every=3, momentum=momentum)
    optimizer = adapted.optimizer(adamw, 45)
    for stage in range(1, 16):
        train(adapted, data, optimizer, start=3 * stage - 3, steps=3 * stage)
        for low in pairs(adapted).values():
            found = int(torch.linalg.matrix_rank(low.product(), rtol=1e-10))
            assert found <= min(24, 2 * stage) and (stage > 3 or found == 2 * stage)
            assert low.A_past is None or low.A_past.shape[0] <= 24
    assert adapted.adapter.counters() == {"restarts": 14}


def test_the_optimiser_forgets_the_factors_and_nothing_else():
    adapted, data = setting("dora+periodic_lora")
    optimizer = adapted.optimizer(adamw, 9)
    train(adapted, data, optimizer, steps=4)
    factors = {p for low in pairs(adapted).values() for p in (low.A, low.B)}
    assert len(optimizer.state) == 3 and not factors & set(optimizer.state)
    train(adapted, data, optimizer, start=4, steps=5)
    assert {float(optimizer.state[p]["step"]) for p in factors} == {1.0}


def test_the_rate_rises_again_from_zero():
    p = setting(every=10, warmup=4)[0].adapter.parts["dynamics"]
    assert [p.rate(Step(i, 40, None)) for i in range(40)] == [1.0] * 10 + 3 * [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]


def test_no_unloading_is_lora():
    adapted, data = setting(every=8)
    lora, _ = setting("lora")
    losses = [train(m, data, m.optimizer(adamw, 8), steps=8) for m in (adapted, lora)]
    assert losses[0] == losses[1] and adapted.adapter.counters() == {"restarts": 0}


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_resume_through_and_at_an_unloading(momentum, tmp_path):
    straight, data = setting(momentum=momentum)
    want = train(straight, data, straight.optimizer(adamw, 9), steps=9)
    for at in (3, 4, 6):
        first, _ = setting(momentum=momentum)
        optimizer = first.optimizer(adamw, 9)
        train(first, data, optimizer, steps=at)
        checkpoint.save(first, tmp_path / str(at), {"step": at}, optimizer)
        again, _ = setting(momentum=momentum)
        checkpoint.restore(again, tmp_path / str(at))
        optimizer = again.optimizer(adamw, 9)
        optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / str(at))["step"]
        assert train(again, data, optimizer, start=at, steps=9) == want[at:]
        assert same(again.adapter.state_dict(), straight.adapter.state_dict())


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": 1}, {"warmup": -1}, {"momentum": 1.0}, {"momentum": -0.1}])
def test_values_without_meaning(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        setting(**wrong)
