"""CoDyRA: a threshold that rises in the later half of a stage, ranks that go, stages that merge into the past."""

import copy

import pytest
import torch
from support import Net, Regression, adamw, attached, begun, close, perturb, same, train

from lorafactory import Adapted, UserError, checkpoint, load, registry
from lorafactory.peft_folder import export_lora

SMALL = {"most": 0.05, "values": 4}


def built(spelling="codyra", options=None, **budget):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached(spelling, base, data, budget={"most": 0.2, "values": 4, **budget}, **(options or {}))


def pairs(adapted):
    return [low for _, low in adapted.adapter.low_ranks()]


def part(adapted):
    return adapted.adapter.parts["budget"]


def test_the_threshold_is_zero_then_rises_by_hand():
    """20 steps, n = 4: 10 sparse steps, a rise every 2 from step 10 on: 0, 1/3, 2/3, 1 of 0.3, and 1 it stays."""
    p = part(built(most=0.3)[2])
    found = [p.threshold(i, 20) for i in range(20)]
    assert found == pytest.approx([0] * 11 + [0.1] + [0.2] * 2 + [0.3] * 6)
    assert found == sorted(found)


def test_a_dense_share_that_is_no_multiple():
    """7 of 21 steps dense, 14 sparse, n = 3, so a rise every 4 steps of the run: at 8 and 12."""
    p = part(built(most=0.2, dense=1 / 3, values=3)[2])
    assert [p.threshold(i, 21) for i in (7, 8, 11, 12, 20)] == pytest.approx([0, 0.1, 0.1, 0.2, 0.2])


def test_a_short_stage_rises_every_step():
    p = part(built(most=0.3)[2])
    assert [p.threshold(i, 6) for i in range(6)] == pytest.approx([0, 0, 0, 0, 0.2, 0.3])


def test_gates_shrink_after_the_step_in_the_sparse_half_alone():
    _, data, adapted = built(most=1.5, values=2)
    optimizer = adapted.optimizer(lambda g: torch.optim.SGD(g, lr=0.0), 8)
    start = [low.gate.detach().clone() for low in pairs(adapted)]
    train(adapted, data, optimizer, steps=5)
    assert all(torch.equal(low.gate, g) for low, g in zip(pairs(adapted), start, strict=True))
    train(adapted, data, optimizer, start=5, steps=6)
    for low, g in zip(pairs(adapted), start, strict=True):
        assert torch.allclose(low.gate, g.sign() * (g.abs() - 1.5).clamp_min(0))


def test_open_gates_without_a_threshold_are_lora():
    base, data, adapted = built(most=1e-30)
    lora = attached("lora", base, data)
    for low, plain in zip(pairs(adapted), pairs(lora), strict=True):
        low.gate.requires_grad_(False).fill_(1.0)
        low.A.data.copy_(plain.A.detach())
    losses = [train(m, data, m.optimizer(adamw, 8), steps=8) for m in (adapted, lora)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_one_stage_ends_as_a_plain_lora(tmp_path):
    base, data, adapted = built()
    train(adapted, data, adapted.optimizer(adamw, 16))
    gates = [int(low.gate.count_nonzero()) for low in pairs(adapted)]
    x = torch.randn(5, 24)
    y = adapted(x)
    assert adapted.end() is False and [low.rank for low in pairs(adapted)] == gates and 0 < sum(gates) < 16
    assert close(adapted(x), y) and adapted.adapter.counters()["ranks_kept"] == sum(gates)
    assert max(export_lora(adapted, tmp_path / "lora").values()) == 0
    assert close(load(copy.deepcopy(base), tmp_path / "lora")(x), y, 3)


def staged(count=3):
    """That many stages of 12 steps, each on data of its own."""
    base, _, adapted = built()
    for i in range(count):
        data = Regression(base, i + 1)
        begun(adapted, data, i)
        train(adapted, data, adapted.optimizer(adamw, 12), steps=12)
        adapted.end()
    return base, adapted


def test_stages_merge_into_the_past_and_begin_afresh():
    base, adapted = staged(1)
    x = torch.randn(5, 24)
    for index in (1, 2):
        y, updates = adapted(x), [low.product().detach() for low in pairs(adapted)]
        ranks = [low.rank + (0 if low.A_past is None else len(low.A_past)) for low in pairs(adapted)]
        data = Regression(base, index + 1)
        begun(adapted, data, index)
        assert close(adapted(x), y), "a stage begins where the last one ended"
        for low, w, r in zip(pairs(adapted), updates, ranks, strict=True):
            assert low.rank == 4 and not low.B.any() and low.gate.count_nonzero() == 4
            past = 0 if low.A_past is None else len(low.A_past)
            assert past == r and (not r or close(low.B_past @ low.A_past, w))
        optimizer = adapted.optimizer(adamw, 12)
        owned = {p for g in optimizer.param_groups for p in g["params"]}
        assert owned == set(adapted.adapter.parameters())
        before = [None if low.A_past is None else (low.A_past.clone(), low.B_past.clone()) for low in pairs(adapted)]
        train(adapted, data, optimizer, steps=12)
        adapted.end()
        for low, b in zip(pairs(adapted), before, strict=True):
            assert b is None or (torch.equal(low.A_past, b[0]) and torch.equal(low.B_past, b[1])), "the past is frozen"
    assert adapted.adapter.counters()["stages_before"] == 2


def test_the_rank_of_a_stage_is_that_of_its_gates():
    base, adapted = staged(2)
    for low in pairs(adapted):
        past = 0 if low.A_past is None else low.B_past @ low.A_past
        own = (low.product() - past).double()
        assert int(torch.linalg.matrix_rank(own, atol=1e-5)) <= int(low.gate.count_nonzero())


def test_a_stage_that_closed_every_rank_leaves_the_layer():
    base, data, adapted = built(most=50.0, values=2, dense=0.0)
    train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
    adapted.end()
    x = torch.randn(5, 24)
    assert torch.equal(adapted(x), base(x)) and not any(low.rank for low in pairs(adapted))
    begun(adapted, data, 1)
    assert torch.equal(adapted(x), base(x)) and all(low.rank == 4 and low.A_past is None for low in pairs(adapted))


def test_resume_within_a_later_stage_does_not_begin_it_again(tmp_path):
    base, straight = staged(2)
    data = Regression(base, 9)
    begun(straight, data, 2)
    optimizer = straight.optimizer(adamw, 12)
    train(straight, data, optimizer, steps=8)
    checkpoint.save(straight, tmp_path / "a", {"step": 8}, optimizer)
    want = train(straight, data, optimizer, start=8, steps=12)
    again = Adapted(copy.deepcopy(base), straight.adapter.config, seed=9)
    checkpoint.restore(again, tmp_path / "a")
    begun(again, data, 2)
    optimizer = again.optimizer(adamw, 12)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=8, steps=12) == want
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())


def test_all_stages_are_saved_loaded_and_merged(tmp_path):
    base, adapted = staged(3)
    perturb(adapted.adapter)
    x = torch.randn(5, 24)
    y = adapted.eval()(x)
    adapted.save(tmp_path / "a")
    loaded = load(copy.deepcopy(base), tmp_path / "a").eval()
    assert torch.equal(loaded(x), y)
    begun(loaded, Regression(base), 3)
    assert close(loaded(x), y) and all(low.rank == 4 for low in pairs(loaded)), "and goes on with the next stage"
    adapted.merge()
    assert close(adapted(x), y, 3)


def test_a_later_stage_has_the_rank_of_the_first_not_of_the_config(tmp_path):
    _, data, wide = built(options={"rank": 3, "rank_pattern": {"fc1": 6}})
    wide.save(tmp_path / "a")
    _, _, other = built()
    checkpoint.restore(other, tmp_path / "a")
    begun(other, data, 1)
    assert [low.rank for low in pairs(other)] == [6, 3, 3, 3]


@pytest.mark.parametrize(("options", "said"), [
    ({"most": 0.0}, "most is 0.0"), ({"dense": 1.0}, "dense is 1.0"), ({"values": 1}, "values is 1"),
])  # fmt: skip
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("codyra", budget=options)
