"""What is computed once a step: how often, and that nothing outlives a change of what it depends on. (That it is never
stale, conftest checks at every use in every test.)"""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from lorafactory import attach, kernels
from lorafactory.kernels import Once
from lorafactory.variants.dora import DoRADelta


class Writer(torch.optim.Optimizer):
    """Writes to .data, which leaves no trace."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


OPTIMIZERS = {
    "adamw": lambda g: torch.optim.AdamW(g, lr=0.1, foreach=False),
    "foreach": lambda g: torch.optim.AdamW(g, lr=0.1, foreach=True),
    "fused": lambda g: torch.optim.AdamW(g, lr=0.1, fused=True),
    "sgd": lambda g: torch.optim.SGD(g, lr=0.1, fused=True),
    "adagrad": lambda g: torch.optim.Adagrad(g, lr=0.1, fused=True),
    ".data": lambda g: Writer(g, {"lr": 0.1}),
}


@pytest.fixture
def computed(monkeypatch):
    """One entry a computation of a norm that was asked for, not of the fixture's own checks."""
    found, norm = [], DoRADelta.norm
    monkeypatch.setattr(DoRADelta, "norm", lambda self, base: (found.append(self), norm(self, base))[1])
    return found


@pytest.fixture
def never_stale():
    """Not here: counting would count its checks."""


def adapted(variant="dora", rank=2):
    torch.manual_seed(0)
    made = attach(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)), variant, rank=rank)
    for p in made.adapter.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def deltas(model):
    return list(model.adapter.inside(DoRADelta))


def fresh(model):
    """Whether each kept norm is what it would be now."""
    with torch.no_grad():
        return all(torch.equal(d.gain(s.base), d.magnitude / d.norm(s.base)) for s, d in deltas(model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_once_a_step_whatever_the_optimiser(name, computed):
    model = adapted()
    optimizer = model.optimizer(OPTIMIZERS[name], total=4)
    for _ in range(3):
        kernels.changed()
        computed.clear()
        for micro in range(4):  # accumulation, and each block run again in the backward pass
            x = torch.randn(5, 12) + micro
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().mean().backward()
        assert len(computed) == 2, "one norm a layer"
        before = [d.norm(s.base) for s, d in deltas(model)]
        optimizer.step()
        assert not any(torch.equal(b, d.norm(s.base)) for b, (s, d) in zip(before, deltas(model), strict=True))
        assert fresh(model)
        optimizer.zero_grad()


def test_every_event_that_changes_numbers_is_seen(tmp_path, computed):
    model = adapted()
    optimizer = model.optimizer(OPTIMIZERS["fused"], total=9)
    low, other = deltas(model)[0][1].inner.low_rank, adapted()

    def grow():
        low.A, low.B = nn.Parameter(torch.randn(3, 12)), nn.Parameter(torch.randn(20, 3))

    def trained():
        model(torch.randn(3, 12)).sum().backward()
        optimizer.step()

    events = {
        "in place": lambda: torch.no_grad()(lambda: low.B.mul_(2))(),
        "scale": lambda: torch.no_grad()(lambda: low.scale.mul_(3))(),
        "another rank": grow,
        "load_state_dict": lambda: model.adapter.load_state_dict({**model.adapter.state_dict(), "deltas.0.inner.low_rank.A":
                                                                  torch.randn(3, 12)}),
        "load": lambda: model.adapter.load({n: torch.randn_like(t) for n, t in other.adapter.state_dict().items()}),
        "dtype": lambda: model.double(),
        "and back": lambda: model.float(),
        "a step": trained,
        "a step of another's optimiser": lambda: torch.optim.SGD([low.A], lr=0.5).step(),
        "merge and unmerge": lambda: (model.merge(), model.unmerge()),
        "begin": lambda: model.begin(),
        ".data and changed()": lambda: (low.A.data.mul_(2), kernels.changed()),
    }
    for what, happen in events.items():
        x = torch.randn(3, 12, dtype=low.A.dtype)
        model(x)
        happen()
        assert fresh(model), what


def test_a_copy_starts_empty_and_is_not_vouched_for(computed):
    model = adapted()
    model.optimizer(OPTIMIZERS["fused"], total=3)
    model(torch.randn(2, 12))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        computed.clear()
        for _ in range(2):
            twin(torch.randn(2, 12))
            for _, d in deltas(twin):
                d.inner.low_rank.B.data.mul_(1.5)
            assert fresh(twin)
        assert len(computed) >= 4


def test_nothing_is_kept_where_nobody_vouches(computed):
    model = adapted()
    for _ in range(2):  # a plain loop that writes to .data
        model(torch.randn(2, 12))
        for p in model.adapter.parameters():
            p.data.add_(0.1)
        assert fresh(model)
    computed.clear()
    with torch.no_grad(), kernels.still():
        for _ in range(5):
            model(torch.randn(2, 12))
    assert len(computed) == 2
    model(torch.randn(2, 12))
    assert len(computed) == 4, "the window is closed"


def test_after_the_last_step_nobody_vouches(computed):
    model = adapted()
    optimizer = model.optimizer(OPTIMIZERS["fused"], total=1)
    model(torch.randn(2, 12)).sum().backward()
    optimizer.step()
    model(torch.randn(2, 12))
    for p in model.adapter.parameters():
        p.data.mul_(1.1)
    assert fresh(model)


def test_shared_numbers_count(computed):
    """A layer's norm depends on a bank that another module owns."""
    model = attach(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), "vera+dora", rank=3)
    with torch.no_grad():
        for _, d in deltas(model):
            d.inner.b.normal_()
    model.optimizer(OPTIMIZERS["fused"], total=3)
    model(torch.randn(2, 12))
    with torch.no_grad():
        model.adapter.structure.bank.A.mul_(2)
    assert fresh(model)


def test_a_value_needs_no_tensor_to_be_alive():
    once, p = Once(), nn.Parameter(torch.ones(3))
    kernels.watch([p])
    made = []
    compute = lambda: (made.append(1), p.detach().sum())[1]  # noqa: E731
    assert once(compute, lambda: [p]) == once(compute, lambda: [p]) == 3 and len(made) == 1
    p.data = F.pad(p.data, (0, 1), value=1.0)
    assert once(compute, lambda: [p]) == 4
    kernels.leave([p])
    once(compute, lambda: [p])
    once(compute, lambda: [p])
    assert len(made) == 4


HELD = ["hira", "loha"]  # whole weights, at this rank
WIDE = 3


def wholes(model):
    return [m for m in model.adapter.modules() if isinstance(vars(m).get("once"), Once)]


def outputs(model, x, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(x)


@pytest.mark.parametrize("variant", HELD)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_whole_weight_is_formed_once_a_step_and_let_go(variant, autocast, monkeypatch):
    """Accumulation, under gradient checkpointing; with gradients as of a model that keeps nothing."""
    made, call = [], Once.__call__
    monkeypatch.setattr(Once, "__call__", lambda self, c, *a: call(self, lambda: (made.append(self), c())[1], *a))
    model = adapted(variant, WIDE)
    plain = copy.deepcopy(model)
    optimizer = model.optimizer(OPTIMIZERS["fused"], total=4)
    for step in range(3):
        made.clear()
        for micro in range(4):
            x = torch.randn(5, 12) + micro
            for m in (model, plain):
                run = lambda x, m=m: outputs(m, x, autocast)  # noqa: E731
                torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).square().mean().backward()
        mine = [d for d in made if d in [w.once for w in wholes(model)]]
        assert len(mine) == (0 if variant == "hira" and autocast else 2) and len(made) - len(mine) in (0, 16)
        for p, q in zip(model.adapter.parameters(), plain.adapter.parameters(), strict=True):
            assert p.grad.any() and torch.equal(p.grad, q.grad), step
        optimizer.step()
        assert all(w.once._value is None for w in wholes(model)), "nothing stays in memory"
        plain.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("variant", HELD)
def test_gradients_of_a_held_weight_twice(variant):
    model = adapted(variant, WIDE).double()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    d, site = next(iter(model.adapter.deltas.values())), model.adapter.sites[0]
    names = [n for n, _ in d.named_parameters()]
    some = [p.detach().clone().requires_grad_() for p in d.parameters()]

    def whole(x, *values):
        return torch.func.functional_call(d, dict(zip(names, values, strict=True)), (x, site.base))

    assert torch.autograd.gradcheck(whole, (x, *some)) and torch.autograd.gradgradcheck(whole, (x, *some))


@pytest.mark.parametrize("variant", HELD)
def test_beyond_the_room_nothing_is_kept(variant, monkeypatch):
    monkeypatch.setattr(kernels.once, "SMALL", 0)
    model, x = adapted(variant, WIDE), torch.randn(3, 12)
    size = 4 * 12 * 20
    with torch.no_grad(), kernels.still():
        want = model(x)
        assert [w.once._value is not None for w in wholes(model)] == [True, True]
    for room, kept in ((size, [True, False]), (size - 1, [False, True]), (0, [False, False])):
        monkeypatch.setattr(kernels.once, "ROOM", room)
        with torch.no_grad(), kernels.still():
            assert torch.equal(model(x), want) and torch.equal(model(x), want)
            assert [w.once._value is not None for w in wholes(model)] == kept
        assert all(w.once._value is None for w in wholes(model))


@pytest.mark.parametrize("variant", HELD)
def test_training_in_one_dtype_and_evaluation_in_another(variant):
    """What autocast computes is not what is kept."""
    model, x = adapted(variant, WIDE), torch.randn(3, 12)
    want = model(x)
    model.optimizer(OPTIMIZERS["fused"], total=3)
    outputs(model, x, autocast=True)
    assert torch.equal(model(x), want)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "dora", "bora", "vera+dora", "hira", "loha"])
def test_compiled_whole_and_never_stale(variant):
    model = attach(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)), variant, rank=2)
    optimizer = model.optimizer(OPTIMIZERS["fused"], total=9)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(3, 12)
    for _ in range(3):
        out = compiled(x)
        assert torch.allclose(out, model(x), atol=1e-5)
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
