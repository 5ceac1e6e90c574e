"""An optimiser that lets some parameters step in another space: here, half their numbers."""

import copy

import pytest
import torch
import torch.nn as nn

from lorafactory.detour import Detour


class Half(Detour):
    """Parameters of `chosen` move in their first two rows alone."""

    def __init__(self, inner, chosen):
        super().__init__(inner)
        self.chosen = chosen

    def own(self):
        return {p for p in self.chosen if p.grad is not None}

    def step_own(self, groups):
        for p, change in self.change({p: p.grad[:2] for p in groups}).items():
            p[:2].add_(change)


def setting(make, **options):
    torch.manual_seed(0)
    half, whole = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))
    return half, whole, Half(make([half, whole], lr=0.1, **options), [half])


def descend(half, whole, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        (half.pow(4).sum() + whole.pow(2).sum()).backward()
        optimizer.step()


PLAIN = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.AdamW, {"weight_decay": 0.0}),
    (torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}),
    (torch.optim.RMSprop, {}),
]


@pytest.mark.parametrize("make, options", PLAIN)
def test_any_optimiser_steps_there(make, options):
    """As it would on those rows alone; everything else moves as it always does."""
    half, whole, optimizer = setting(make, **options)
    start = half.detach().clone()
    rows, other = nn.Parameter(half.detach()[:2].clone()), nn.Parameter(whole.detach().clone())
    descend(half, whole, optimizer, 4)
    descend(rows, other, make([rows, other], lr=0.1, **options), 4)
    assert torch.allclose(half[:2], rows, atol=1e-6) and torch.equal(half[2:], start[2:]) and torch.equal(whole, other)
    assert half.grad.shape == half.shape
    assert all(t.shape == (2, 3) for t in optimizer.state[half].values() if torch.is_tensor(t) and t.dim())


def test_hooks_run_once_a_step_whatever_was_made_before():
    """torch hooks a class at its first instance, so a nested step() would run them twice or once."""
    for make in (torch.optim.AdamW, torch.optim.SGD):
        half, whole, optimizer = setting(make)
        seen = []
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("after"))
        descend(half, whole, optimizer, 2)
        assert seen == ["before", "after"] * 2


def test_state_and_groups_are_its_own():
    """Loading replaces both; a learning rate and a parameter added later count too."""
    half, whole, optimizer = setting(torch.optim.AdamW)
    descend(half, whole, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    again_half, again_whole, again = setting(torch.optim.AdamW)
    with torch.no_grad():
        again_half.copy_(half)
        again_whole.copy_(whole)
    again.load_state_dict(saved)
    for g in (*optimizer.param_groups, *again.param_groups):
        g["lr"] = 0.01
    extra = nn.Parameter(torch.ones(2))
    extra.grad = torch.ones(2)
    again.add_param_group({"params": [extra], "lr": 0.5, "weight_decay": 0.0})
    descend(half, whole, optimizer, 1)
    (again_half.pow(4).sum() + again_whole.pow(2).sum()).backward()
    again.step()
    assert torch.equal(half, again_half) and torch.equal(whole, again_whole)
    assert torch.allclose(extra, torch.full((2,), 0.5), atol=1e-6)


def test_closure_and_scheduler():
    half, whole, optimizer = setting(torch.optim.SGD)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = half.pow(4).sum() + whole.pow(2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    scheduler.step()
    assert losses[2] < losses[1] < losses[0] and optimizer.param_groups[0]["lr"] == 0.05


def test_a_failing_step_leaves_the_parameter(monkeypatch):
    half, whole, optimizer = setting(torch.optim.SGD)
    before = half.detach().clone()
    (half.pow(4).sum() + whole.pow(2).sum()).backward()
    grad = half.grad.clone()
    run = optimizer._run
    calls = iter((run, None))
    monkeypatch.setattr(optimizer, "_run", lambda params: next(calls)(params))
    with pytest.raises(TypeError):
        optimizer.step()
    assert torch.equal(half, before) and torch.equal(half.grad, grad)
