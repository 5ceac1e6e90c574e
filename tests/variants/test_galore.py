import importlib.util

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close, loss, same, train

from lorafactory import UserError, attach, checkpoint, eight_bits

SMALL = {"rank": 4, "every": 4}
CHANGES = {"bits": ([8], {})}
TARGETS = ["fc1", "fc2", "fc3"]  # [40, 24], [24, 40], [24, 24]
TYPES = {  # the sides of tall, wide and square weights
    "std": ("right", "left", "right"),
    "reverse_std": ("left", "right", "left"),
    "left": ("left",) * 3,
    "right": ("right",) * 3,
    "full": ("left right",) * 3,
}


def setting(variant="galore", dtype=torch.float64, **dynamics):
    torch.manual_seed(0)
    base = Net().to(dtype)
    data = Regression(base)
    options = {"dynamics": {**SMALL, "scale": 1.0, **dynamics}} if "galore" in variant else {}
    return attached(variant, base, data, trained_modules=[], **options), data


def only_linear(**dynamics):
    torch.manual_seed(0)
    base = Net().double()
    data = Regression(base)
    options = {**SMALL, "scale": 1.0, **dynamics}
    return attached("galore", base, data, target_modules=TARGETS, trained_modules=[], dynamics=options), data


def sgd(lr=0.1, **options):
    return lambda groups: torch.optim.SGD(groups, lr=lr, **options)


def weights(adapted):
    return {s.name: p for s, p in adapted.adapter.dense()}


def sides(p, state):
    """P and Q; the identity where a side is not projected."""
    whole = {"left": torch.eye(p.shape[0], dtype=p.dtype), "right": torch.eye(p.shape[1], dtype=p.dtype)}
    return [state.get(side, eye) for side, eye in whole.items()]


def one_layer(weight, **dynamics):
    """An adapted layer of this weight, whose next gradient the test writes."""
    layer = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    layer[0].weight.data = weight.clone()
    adapted = attach(layer, "galore", target_modules=["0"], dynamics={**SMALL, "scale": 1.0, **dynamics})
    return adapted, weights(adapted)["0"]


def test_by_hand():
    """G = diag(3, 2) on top of a zero row, rank 1: only its first column is seen, and Adam's first step is its sign."""
    g = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    for make, moves in ((sgd(0.1), 0.3), (lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0), 0.1)):
        adapted, p = one_layer(torch.ones(3, 2), rank=1, scale=0.5)
        optimizer = adapted.optimizer(make, 1)
        p.grad = g.clone()
        optimizer.step()
        want = torch.ones(3, 2)
        want[0, 0] -= 0.5 * moves
        assert close(p, want) and torch.equal(p.grad, g)
        assert close(optimizer.state[p]["right"].abs(), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("proj_type", TYPES)
def test_sides_are_explicit_and_orthonormal(proj_type):
    adapted, data = only_linear(proj_type=proj_type)
    optimizer = adapted.optimizer(adamw, 1)
    train(adapted, data, optimizer, steps=1)
    for p, wanted in zip(weights(adapted).values(), TYPES[proj_type], strict=True):
        state = optimizer.state[p]
        assert {k for k in state if k in ("left", "right")} == set(wanted.split())
        projected = list(p.shape)
        if "left" in state:
            assert close(state["left"].T @ state["left"], torch.eye(4, dtype=torch.float64), 10)
            projected[0] = 4
        if "right" in state:
            assert close(state["right"] @ state["right"].T, torch.eye(4, dtype=torch.float64), 10)
            projected[1] = 4
        assert list(state["exp_avg"].shape) == list(state["exp_avg_sq"].shape) == projected


@pytest.mark.parametrize("proj_type", TYPES)
def test_the_projector_holds_the_leading_singular_vectors(proj_type):
    """Of all projections of rank r theirs keeps most of the gradient: what is lost is the tail of its spectrum."""
    adapted, p = one_layer(torch.zeros(9, 6), proj_type=proj_type)
    optimizer = adapted.optimizer(sgd(1.0), 1)
    p.grad = torch.randn(9, 6)
    optimizer.step()
    tail = torch.linalg.svdvals(p.grad)[4:]
    assert float((p.grad + p.detach()).norm()) == pytest.approx(float(tail.norm()), rel=1e-4)


@pytest.mark.parametrize("proj_type, steps", [*((t, 1) for t in TYPES), ("std", 4)])
def test_full_rank_gradient_descent_is_plain(proj_type, steps):
    """The first step for every type, since the basis is the gradient's own; std, whose basis is complete, for ever."""
    adapted, data = only_linear(rank=24, every=100, proj_type=proj_type)
    torch.manual_seed(0)
    plain = attached("full", Net().double(), data, target_modules=TARGETS, trained_modules=[])
    for m in (adapted, plain):
        train(m, data, m.optimizer(sgd(0.1), steps), steps=steps)
    for n in TARGETS:
        assert close(weights(adapted)[n], weights(plain)[n], 100)
        assert not close(weights(adapted)[n], adapted.adapter.sites[TARGETS.index(n)].base.weight, 100)


def test_full_rank_adam_is_adam_in_a_rotated_basis():
    """scale 1, one projector for ever: the weights of plain AdamW run on W Q^T (tall) or P^T W (wide)."""
    lr, steps = 1e-2, 5
    adapted, data = only_linear(rank=24, every=100)
    optimizer = adapted.optimizer(lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0), steps)
    start = {n: p.detach().clone() for n, p in weights(adapted).items()}
    grads = []

    def watch(i):
        grads.append({n: p.grad.clone() for n, p in weights(adapted).items()})

    train(adapted, data, optimizer, steps=steps, watch=watch)
    for n, p in weights(adapted).items():
        state = optimizer.state[p]
        left, right = sides(p, state)
        turned = nn.Parameter(left.T @ start[n] @ right.T)
        plain = torch.optim.AdamW([turned], lr=lr, weight_decay=0.0)
        for g in grads:
            turned.grad = left.T @ g[n] @ right.T
            plain.step()
        assert close(left @ turned @ right, p, 1000)


def test_rank_between_refreshes_and_beyond():
    adapted, data = only_linear(rank=3, every=4)
    start = {n: p.detach().clone() for n, p in weights(adapted).items()}
    optimizer = adapted.optimizer(adamw, 12)
    ranks = []
    for i in range(12):
        train(adapted, data, optimizer, start=i, steps=i + 1)
        moved = [p.detach() - start[n] for n, p in weights(adapted).items()]
        ranks.append([int(torch.linalg.matrix_rank(m, rtol=1e-9)) for m in moved])
    assert ranks[0] == ranks[3] == [3] * 3 and ranks[4] == ranks[7] == [6] * 3 and ranks[11] == [9] * 3


def test_refreshed_at_multiples_only():
    """Unchanged in between; the moments live on through a refresh: neither reset nor turned."""
    adapted, data = only_linear(every=4)
    optimizer = adapted.optimizer(adamw, 10)
    p = weights(adapted)["fc1"]
    seen, moment = [], None
    for i in range(10):
        train(adapted, data, optimizer, start=i, steps=i + 1)
        state = optimizer.state[p]
        seen.append(state["right"].clone())
        if moment is not None:
            assert close(state["exp_avg"], 0.9 * moment + 0.1 * p.grad @ state["right"].T)
        moment = state["exp_avg"].clone()
        assert float(state["step"]) == i + 1
    changed = [i for i in range(1, 10) if not torch.equal(seen[i], seen[i - 1])]
    assert changed == [4, 8]
    assert adapted.adapter.counters() == {"projected_weights": 3, "projectors": 9}


def test_only_the_accumulated_gradient_is_projected():
    adapted, data = only_linear()
    optimizer = adapted.optimizer(adamw, 1)
    batch = data(1)[0]
    for _ in range(2):
        (loss(adapted, batch) / 2).backward()
    whole = {n: p.grad.clone() for n, p in weights(adapted).items()}
    optimizer.step()
    for n, p in weights(adapted).items():
        state = optimizer.state[p]
        left, right = sides(p, state)
        assert close(state["exp_avg"], 0.1 * left.T @ whole[n] @ right.T)
    assert adapted.adapter.counters()["projectors"] == 3


def test_all_else_takes_the_plain_step():
    """Biases and norms move as under plain AdamW; hooks of a step run once; the weights do not move as under it."""
    made = {}
    for variant in ("galore", "full"):
        adapted, data = setting(variant, scale=0.3) if variant == "galore" else setting(variant)
        optimizer = adapted.optimizer(adamw, 2)
        calls = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        train(adapted, data, optimizer, steps=1)
        assert calls == [1] and optimizer.lifecycle.index == 1
        dense = set(weights(adapted).values())
        made[variant] = {n: p for n, p in adapted.adapter.named_parameters() if p not in dense}
        made[variant, "dense"] = weights(adapted)
    assert same(made["galore"], made["full"]) and len(made["full"]) == 5
    assert all(not close(p, made["full", "dense"][n]) for n, p in made["galore", "dense"].items())


def test_nothing_moves_before_the_first_step():
    torch.manual_seed(0)
    base = Net()
    x = torch.randn(3, 24)
    adapted, _ = setting(dtype=torch.float32)
    assert torch.equal(adapted(x), base(x))


@pytest.mark.parametrize("make", [adamw, sgd(0.05, momentum=0.9)], ids=["adamw", "momentum"])
@pytest.mark.parametrize("every", [3, 4])
def test_resume_B30(make, every, tmp_path):
    """Six steps straight or three and three, at a refresh and off it: the same bits, from safe tensors and JSON."""
    straight, data = setting(every=every)
    optimizer = straight.optimizer(make, 6)
    want = train(straight, data, optimizer, steps=6)
    first, _ = setting(every=every)
    half = first.optimizer(make, 6)
    assert train(first, data, half, steps=3) == want[:3]
    checkpoint.save(first, tmp_path / "a", {"step": 3}, half)
    again, _ = setting(every=every)
    checkpoint.restore(again, tmp_path / "a")
    second = again.optimizer(make, 6)
    second.lifecycle.index = checkpoint.restore_optimizer(second, tmp_path / "a")["step"]
    assert train(again, data, second, start=3, steps=6) == want[3:]
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())
    (tensors, plain), (theirs, counts) = (checkpoint._flatten(o.state_dict()) for o in (second, optimizer))
    assert same(tensors, theirs) and plain["plain"] == counts["plain"] and set(plain["plain"].values()) == {6}
    assert again.adapter.counters() == straight.adapter.counters() == {"projected_weights": 4, "projectors": 8}


def test_decay_is_decoupled_and_comes_last():
    adapted, p = one_layer(torch.full((4, 4), 2.0))
    optimizer = adapted.optimizer(lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5), 1)
    p.grad = torch.eye(4)
    optimizer.step()
    r = optimizer.state[p]["right"]
    want = (2.0 - 0.1 * torch.sign(torch.round(r.T, decimals=3)) @ r) * (1 - 0.05)
    assert close(p, want, 10)


def test_state_is_smaller_than_adams():
    """Numbers a weight: 2 r max(m, n) + r min(m, n) against 2 m n."""
    adapted, data = only_linear(rank=2)
    optimizer = adapted.optimizer(adamw, 1)
    train(adapted, data, optimizer, steps=1)
    for p in weights(adapted).values():
        numbers = sum(t.numel() for t in optimizer.state[p].values() if torch.is_tensor(t) and t.dim())
        assert numbers == 4 * max(p.shape) + 2 * min(p.shape) < 2 * p.numel()


def test_a_rank_above_a_weight_is_refused():
    with pytest.raises(UserError, match=r"rank 30 .*fc1 \[40, 24\].*at most 24"):
        attach(Net(), "galore", dynamics={"rank": 30}, trained_modules=[])
    for wrong in ({"rank": 0}, {"every": 0}, {"scale": 0.0}, {"proj_type": "both"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            attach(Net(), "galore", dynamics=wrong)


def test_moments_in_eight_bits():
    """Codes of a byte and a scale for 256 of them; the projector is whole. Losses stay near those of whole moments."""
    pytest.importorskip("bitsandbytes", reason="8-bit moments are bitsandbytes'")
    losses = []
    for bits in (None, 8):
        adapted, data = setting(bits=bits, every=4)
        optimizer = adapted.optimizer(adamw, 12)
        losses.append(train(adapted, data, optimizer, steps=12))
    for p in weights(adapted).values():
        state = optimizer.state[p]
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == torch.uint8 and state[name + "_scale"].numel() == -(-state[name].numel() // 256)
        assert not {"left_scale", "right_scale"} & state.keys()
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[1][-1] < losses[1][0]


def test_eight_bits_are_within_a_level_of_the_numbers():
    pytest.importorskip("bitsandbytes", reason="8-bit moments are bitsandbytes'")
    whole = {"exp_avg": torch.randn(40, 4), "exp_avg_sq": torch.rand(40, 4) ** 4, "step": torch.tensor(3.0)}
    state = dict(whole)
    eight_bits.pack(state, ["exp_avg", "exp_avg_sq"])
    state = {n: t.float() for n, t in state.items()}  # as load_state_dict gives them back
    eight_bits.unpack(state, torch.float32)
    assert state.keys() == whole.keys() and state["step"] == 3
    for name, t in whole.items():
        assert (state[name] - t).abs().max() < 0.02 * t.abs().max() and (name == "step" or not torch.equal(state[name], t))


@pytest.mark.parametrize("at", [3, 4])
def test_eight_bits_resume(at, tmp_path):
    pytest.importorskip("bitsandbytes", reason="8-bit moments are bitsandbytes'")
    straight, data = setting(bits=8, every=4)
    want = train(straight, data, straight.optimizer(adamw, 7), steps=7)
    first, _ = setting(bits=8, every=4)
    optimizer = first.optimizer(adamw, 7)
    train(first, data, optimizer, steps=at)
    checkpoint.save(first, tmp_path / "a", {"step": at}, optimizer)
    again, _ = setting(bits=8, every=4)
    checkpoint.restore(again, tmp_path / "a")
    optimizer = again.optimizer(adamw, 7)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=at, steps=7) == want[at:]
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())


def test_eight_bits_without_bitsandbytes_are_refused(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    with pytest.raises(UserError, match="bits=8 needs the package bitsandbytes"):
        setting(bits=8)
    with pytest.raises(UserError, match="bits is 4"):
        setting(bits=4)
