import copy
import math

import pytest
import torch
from support import Net, Regression, adamw, attached, begun, close, overall, perturb, train

from lorafactory import Adapted, UserError, checkpoint, registry
from lorafactory.adapter import Step
from lorafactory.variants.lola import cycle

SMALL = {"first": 8.0}
CHANGES = {"grow": ([3.0], {"first": 3.0})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": ["head"]}


def part(total=100, **options):
    made = Adapted(Net(), registry.config("lola", dynamics=options, **TARGETS), seed=0)
    lola = made.adapter.parts["dynamics"]
    return lola, [lola.rate(Step(i, total, None)) for i in range(total)]


def test_cycles_by_hand():
    """T_0 = 10, T_mult = 2: restarts at 10, 30 and 70."""
    assert [i for i in range(1, 100) if cycle(i, 10, 2) == 0] == [10, 30, 70]
    assert cycle(9, 10, 2) == 0.9 and cycle(20, 10, 2) == 0.5 and cycle(49, 10, 2) == 19 / 40
    assert [i for i in range(1, 40) if cycle(i, 12, 1) == 0] == [12, 24, 36]


def test_rate_is_torchs_with_warm_restarts():
    """eta_min + (eta_0 - eta_min) (1 + cos(pi t / T)) / 2, a share of the rate."""
    for first, grow, floor in ((10, 2, 0.0), (7, 1, 0.25), (5, 3, 0.1)):
        p = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([p], lr=1.0)
        theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, first, grow, eta_min=floor)
        _, ours = part(first=float(first), grow=float(grow), floor=floor)
        for rate in ours:
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            theirs.step()


def test_a_share_of_the_run_is_so_many_steps():
    assert part(total=50, first=0.2)[1] == part(total=50, first=10.0)[1] and part(total=50, first=0.2)[1] != part(total=50)[1]


def test_factors_learn_at_a_rate_of_their_own():
    adapted = Adapted(Net(), registry.config("lola", dynamics={"lora_lr": 3.0}, **TARGETS), seed=0)
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=0.01), 10)
    rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    factors = {p for _, low in adapted.adapter.low_ranks() for p in (low.A, low.B)}
    assert len(factors) == 6 and {rates[p] for p in factors} == {0.03}
    assert {r for p, r in rates.items() if p not in factors} == {0.01}


def strengths(steps, **options):
    """Of every step, as the forward pass of that step sees it."""
    base = Net()
    data = Regression(base)
    adapted = attached("lola", base, data, dynamics=options, rank=4, alpha=8.0, **TARGETS)
    seen = []
    train(adapted, data, adapted.optimizer(adamw, steps), steps, watch=lambda i: seen.append(scales(adapted)))
    return adapted, seen


def scales(adapted):
    found = {float(low.scale) for _, low in adapted.adapter.low_ranks()}
    assert max(found) - min(found) < 1e-6
    return found.pop()


def test_strength_by_hand():
    """alpha / rank = 2 and a least share of 0.25: 2 (0.25 + 0.75 (1 + cos(pi t / T)) / 2), T = 4 and then 8."""
    adapted, seen = strengths(12, first=4.0, strength=0.25)
    for i, got in enumerate(seen):
        t = i / 4 if i < 4 else (i - 4) / 8
        assert got == pytest.approx(2 * (0.25 + 0.75 * (1 + math.cos(math.pi * t)) / 2), rel=1e-6)
    assert scales(adapted) == seen[-1], "the last step's strength is what is left"
    assert adapted.adapter.counters()["strength"] == pytest.approx(seen[-1] / 2)
    low = adapted.adapter.deltas["fc1"].low_rank
    assert close(low.product(), seen[-1] * low.B @ low.A)


def test_strength_is_off_by_default():
    adapted, seen = strengths(9, first=4.0)
    assert set(seen) == {2.0} and adapted.adapter.counters() == {"strength": 1.0}


def test_a_resumed_run_has_the_strength_of_one_that_was_not_killed(tmp_path):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    config = registry.config("lola", dynamics={"first": 4.0, "strength": 0.25}, rank=4, **TARGETS)
    whole = begun(Adapted(copy.deepcopy(base), config, 5), data)
    optimizer = whole.optimizer(adamw, 11)
    train(whole, data, optimizer, steps=11, watch=lambda i: i == 6 and checkpoint.save(whole, tmp_path, {"step": 6}, optimizer))
    again = Adapted(copy.deepcopy(base), config, 6)
    checkpoint.restore(again, tmp_path)
    begun(again, data)
    optimizer = again.optimizer(adamw, 11)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path)["step"]
    train(again, data, optimizer, steps=11, start=6)
    assert scales(again) == scales(whole) < 1.9 and overall(again, data) == overall(whole, data)
    perturb(whole.adapter)
    bare = Adapted(copy.deepcopy(base), registry.config("lora", rank=4, **TARGETS), 7)
    bare.adapter.load(whole.adapter.export())
    assert overall(bare, data) == overall(whole, data), "the strength is part of what is exported"


def test_nonsense():
    for options in ({"first": 0.0}, {"first": 1.5}, {"grow": 0.5}, {"floor": 1.0}, {"lora_lr": 0.0}, {"strength": 0.0}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            registry.config("lola", dynamics=options)
