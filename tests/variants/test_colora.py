"""CoLoRA: contributions by integrated gradients, and ranks that follow them within a budget."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, Regression, close, loss, same

from lorafactory import Adapted, UserError, attach, probe, registry
from lorafactory.variants.colora import allotted, attributions, tuned

SMALL = {"share": 0.3, "steps": 2, "points": 2, "batches": 2}
CHANGES = {
    "share": ([0.5], {}),
    "alpha": ([1.0], {"share": 0.07}),
    "beta": ([0.0], {}),
    "steps": ([0, 5], {}),
    "lr": ([0.1], {}),
    "scale": ([1.0], {}),
    "least": ([0.35], {}),
    "most": ([0.2], {}),
}


def staged(base=None, batches=None):
    torch.manual_seed(0)
    base = base or Net()
    data = Regression(base)
    adapted = Adapted(copy.deepcopy(base), registry.config("lora", rank=2), seed=0)
    stage = adapted._stage_of(data if batches is None else batches, loss)
    return base, data, adapted, stage


def test_gradients_at_moved_weights_are_those_of_a_moved_base():
    base, data, adapted, stage = staged()
    moved = {s.name: 0.1 * torch.randn(s.d_out, s.d_in) for s in adapted.adapter.sites}
    before = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    found = probe.gradients(stage, 2, moved)
    assert same(adapted.model.state_dict(), before)
    with torch.no_grad():
        for n, d in moved.items():
            base.get_submodule(n).weight.add_(d)
    (sum(loss(base, b) for b in data(2)) / 2).backward()
    assert all(close(found[n], base.get_submodule(n).weight.grad, 5) for n in moved)


def test_a_short_fine_tuning_is_adams():
    base, data, adapted, stage = staged()
    found = tuned(stage, 10, 1e-2)
    weights = [base.get_submodule(n).weight for n in found]
    old, optimizer = [w.detach().clone() for w in weights], torch.optim.Adam(weights, 1e-2)
    for b in data(10):
        optimizer.zero_grad()
        loss(base, b).backward()
        optimizer.step()
    assert all(torch.allclose(d, w - o, atol=1e-5) for d, w, o in zip(found.values(), weights, old, strict=True))
    step = tuned(stage, 0, 0.5)
    assert all(close(d, -0.5 * g) for d, g in zip(step.values(), probe.gradients(stage, 1).values(), strict=True))


def test_contributions_by_hand():
    """y = w x, x = 1, loss (y - 1)^2 from w = 0 with D = 2: gradients -2 and 0 at 0 and 1, D times their mean is -2."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 1, bias=False)
            nn.init.zeros_(self.fc.weight)

        def forward(self, x):
            return self.fc(x)

    adapted = Adapted(One(), registry.config("lora", rank=1), seed=0)
    stage = adapted._stage_of([{"x": torch.ones(1, 1), "y": torch.ones(1, 1)}], loss)
    (found,) = attributions(stage, {"fc": torch.tensor([[2.0]])}, 4, 2)
    assert float(found["fc"]) == pytest.approx(-2.0)


def test_contributions_add_up_to_the_change_of_the_loss():
    base, data, adapted, stage = staged()
    moved = tuned(stage, 5, 1e-2)
    errors = []
    changed = copy.deepcopy(base)
    with torch.no_grad():
        for n, d in moved.items():
            changed.get_submodule(n).weight.add_(d)
        want = float(loss(changed, data(1)[0]) - loss(base, data(1)[0]))
    for points in (2, 100):
        (found,) = attributions(stage, moved, 1, points)
        errors.append(abs(sum(float(f.sum()) for f in found.values()) - want))
    assert errors[1] < errors[0] and errors[1] < 0.05 * abs(want)
    (none,) = attributions(stage, {n: 0 * d for n, d in moved.items()}, 1, 2)
    assert not any(f.any() for f in none.values())


SIZES = {"a": (256, 256), "b": (256, 256), "c": (512, 256), "d": (256, 256)}


def test_ranks_follow_contributions_within_the_budget():
    scores = {"a": 1.0, "b": 0.5, "c": 0.5, "d": 0.9}
    for share in (0.07, 0.2):
        ranks = allotted(scores, SIZES, share, 1.0, None)
        spent = sum(r * sum(SIZES[n]) for n, r in ranks.items()) / sum(p * q for p, q in SIZES.values())
        assert 0.95 * share < spent <= share
        assert ranks["a"] >= ranks["d"] >= ranks["b"]
    assert len({allotted(scores, SIZES, 0.2, 0.0, None)[n] for n in "abd"}) == 1, "beta 0: all alike"
    even = allotted(dict.fromkeys(SIZES, 0.3), SIZES, 0.2, 1.0, None)
    assert {n: r * sum(SIZES[n]) / (SIZES[n][0] * SIZES[n][1]) for n, r in even.items()} == pytest.approx(
        dict.fromkeys(SIZES, 0.2), rel=0.05
    ), "equal contributions, equal shares"
    assert allotted(scores, SIZES, 0.07, 1.0, 0.5) == {"a": 64, "b": 32, "c": 43, "d": 58}
    assert set(allotted(scores, SIZES, 1e-9, 1.0, None).values()) == {1}
    assert allotted(dict.fromkeys(SIZES, 0.0), SIZES, 0.2, 1.0, None) == even, "none contributes: all alike"


def test_bounds_of_a_layers_share():
    """alpha 0.5 asks for 0.5, 0.25, 0.25 and 0.45 of the weights; 128 ranks of (256, 256) have all of them, 64 half."""
    scores = {"a": 1.0, "b": 0.5, "c": 0.5, "d": 0.9}
    assert allotted(scores, SIZES, 0.07, 1.0, 0.5, 0.375, None) == {"a": 64, "b": 48, "c": 64, "d": 58}
    assert allotted(scores, SIZES, 0.07, 1.0, 0.5, None, 0.375) == {"a": 48, "b": 32, "c": 43, "d": 48}
    assert allotted(scores, SIZES, 0.07, 1.0, 0.5, 0.375, 0.375) == {"a": 48, "b": 48, "c": 64, "d": 48}
    ranks = allotted(scores, SIZES, 0.2, 1.0, None, None, 0.22)
    spent = sum(r * sum(SIZES[n]) for n, r in ranks.items()) / sum(p * q for p, q in SIZES.values())
    assert 0.95 * 0.2 < spent <= 0.2 and ranks["a"] == ranks["d"] == 28, "what bounds leave goes to the others"
    assert allotted(scores, SIZES, 0.9, 1.0, None, None, 0.25) == {"a": 32, "b": 32, "c": 43, "d": 32}


def test_a_layer_that_the_loss_hardly_reads_gets_few_ranks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.busy, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.busy(x) + 1e-3 * self.idle(x)

    torch.manual_seed(0)
    batches = [{"x": torch.randn(16, 32), "y": torch.randn(16, 32)} for _ in range(3)]
    adapted = attach(Two(), "colora", batches=batches, loss=lambda m, b: F.mse_loss(m(b["x"]), b["y"]), seed=0, budget=SMALL)
    ranks = {s.name: low.rank for s, low in adapted.adapter.low_ranks()}
    assert ranks["idle"] == 1 < 5 < ranks["busy"]
    assert all(float(low.scale) == 2.0 and not low.B.any() for _, low in adapted.adapter.low_ranks())
    part = adapted.adapter.parts["budget"]
    assert part.contributions[0] > 100 * part.contributions[1] > 0
    assert part.counters() == {"rank_total": ranks["busy"] + 1, "rank_least": 1, "rank_most": ranks["busy"]}


def test_the_start_leaves_base_and_generator_alone():
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    state = torch.get_rng_state()
    adapted = attach(copy.deepcopy(base), "colora", batches=data, loss=loss, seed=5, rank=4, budget=SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    with adapted.disabled() as model:
        assert same(model.state_dict(), base.state_dict())


def test_no_batches_are_refused():
    with pytest.raises(UserError, match="no batches"):
        attach(Net(), "colora", batches=[], loss=loss)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"share": 0.0}, "positive"), ({"share": 1.0}, "below 1"), ({"alpha": 1.0, "share": 0.2}, "leave one out"),
     ({"points": 0}, "at least 1"), ({"beta": -1.0}, "at least 0"), ({"lr": 0.0}, "positive"), ({"scale": 0.0}, "positive"),
     ({"least": 0.0}, "positive"), ({"least": 0.5, "most": 0.2}, "above most=0.2")],
)  # fmt: skip
def test_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        registry.config("colora", budget=options)
