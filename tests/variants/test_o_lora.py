import pytest
import torch
from support import Net, Regression, adamw, attached, begun, close, perturb, same, train

from lorafactory import UserError, attach, checkpoint

SMALL = {"norm": 0.01}  # in its first stage it is LoRA but for that
TARGETS = ["fc1", "fc2", "fc3"]


def setting(variant="o_lora", **continual):
    torch.manual_seed(0)
    base = Net()
    options = {"continual": continual} if continual else {}
    return attached(variant, base, Regression(base), rank=2, target_modules=TARGETS, **options), base


def stage(adapted, base, index, steps=4):
    data = Regression(base, index + 1)
    if index:
        begun(adapted, data, index)
    train(adapted, data, adapted.optimizer(adamw, steps), steps=steps)
    adapted.end()
    return data


def part(adapted):
    return adapted.adapter.parts["continual"]


def test_the_penalty_by_hand():
    """A_old = [1 0 -1], A = [2 0 0; 1 1 3]: A_old A^T = [2 -2]."""
    for entries, want in (("absolute", 0.5 * 4), ("squared", 0.5 * 8)):
        layer = torch.nn.Sequential(torch.nn.Linear(3, 4))
        adapted = attach(layer, "o_lora", rank=2, target_modules=["0"], continual={"entries": entries})
        ((_, low, memory),) = part(adapted).pairs()
        assert float(adapted.penalty()) == 0.0, "the first stage is plain LoRA"
        memory.add(torch.tensor([[1.0, 0, -1]]))
        with torch.no_grad():
            low.A.copy_(torch.tensor([[2.0, 0, 0], [1, 1, 3]]))
        assert float(adapted.penalty()) == pytest.approx(want)
        part(adapted).config.norm = 0.1
        assert float(adapted.penalty()) == pytest.approx(want + 0.1 * 15**0.5, rel=1e-5)  # |A| = sqrt(4 + 11), |B| = 0
        with torch.no_grad():
            low.B[2, 1] = -2.0
        assert float(adapted.penalty()) == pytest.approx(want + 0.1 * (15**0.5 + 2), rel=1e-5)


def test_the_norm_has_a_slope_where_b_is_zero():
    adapted, _ = setting(norm=0.1)
    adapted.penalty().backward()
    assert all(low.A.grad.any() and low.B.grad.isfinite().all() for _, low, _ in part(adapted).pairs())


def test_one_stage_without_a_norm_is_lora():
    adapted, base = setting(norm=0.0)
    lora, _ = setting("lora")
    losses = [train(m, Regression(base), m.optimizer(adamw, 6), steps=6) for m in (adapted, lora)]
    assert losses[0] == losses[1]
    trained = {n: t for n, t in adapted.adapter.state_dict().items() if n.startswith("deltas.")}
    assert same(trained, lora.adapter.state_dict())


def test_a_stage_starts_from_zero_beside_the_frozen_ones():
    adapted, base = setting()
    x = torch.randn(5, 24)
    updates = []
    for index in range(3):
        y = adapted(x)
        if index:
            begun(adapted, Regression(base, index + 1), index)
            assert close(adapted(x), y, 3)
        for _, low, memory in part(adapted).pairs():
            assert not low.B.any() and memory.rows.shape == (2 * index, low.A.shape[1])
            past = [p for p in adapted.adapter.parameters() if p.requires_grad]
            assert len(past) == 6, "only the new factors train"
        data = Regression(base, index + 1)
        train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
        perturb(adapted.adapter, 0.1)
        updates.append({s.name: (low.scale * low.B @ low.A).detach().clone() for s, low, _ in part(adapted).pairs()})
        adapted.end()
    for s, low, memory in part(adapted).pairs():
        assert close(low.product(), sum(u[s.name] for u in updates)), "the sum of a pair a stage"
        assert low.A_past.shape[0] == len(memory.rows) == 4 and torch.equal(low.A_past[2:], memory.rows[:2])
    assert adapted.adapter.counters() == {"directions_kept": 12.0}


def test_a_stage_draws_other_factors_than_the_one_before():
    adapted, base = setting()
    first = {s.name: low.A.detach().clone() for s, low, _ in part(adapted).pairs()}
    begun(adapted, Regression(base, 2), 1)
    assert all(not torch.equal(low.A, first[s.name]) for s, low, _ in part(adapted).pairs())


def test_a_heavy_penalty_turns_the_rows_away():
    overlap = {}
    for weight in (0.0, 50.0):
        adapted, base = setting(orthogonality=weight)
        for index in range(2):
            stage(adapted, base, index, 40)
        overlap[weight] = sum(float((m.rows @ low.A.T).abs().sum()) for _, low, m in part(adapted).pairs())
    assert overlap[50.0] < 0.3 * overlap[0.0]


@pytest.mark.parametrize("when", [0, 2])
def test_resume_in_the_second_stage(when, tmp_path):
    def life(interrupted):
        adapted, base = setting()
        stage(adapted, base, 0)
        data = Regression(base, 2)
        begun(adapted, data, 1)
        optimizer = adapted.optimizer(adamw, 4)
        train(adapted, data, optimizer, steps=when)
        if interrupted:
            checkpoint.save(adapted, tmp_path / "a", {"step": when}, optimizer)
            adapted, _ = setting()
            checkpoint.restore(adapted, tmp_path / "a")
            begun(adapted, data, 1)
            optimizer = adapted.optimizer(adamw, 4)
            optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
        return train(adapted, data, optimizer, start=when, steps=4), adapted.adapter.state_dict()

    (straight, state), (again, other) = life(False), life(True)
    assert straight == again and same(state, other)


def test_values_without_meaning():
    for wrong in ({"orthogonality": -1.0}, {"norm": -0.1}, {"entries": "cubed"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            setting(**wrong)
    with pytest.raises(UserError, match="restarts"):
        setting("o_lora+relora")
    with pytest.raises(UserError, match="trains truncations"):
        setting("o_lora+dylora")
