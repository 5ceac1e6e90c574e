import copy

import pytest
import torch
from support import Blocks, Net, Regression, attached, close, loss, perturb, same, train

from lorafactory import UserError, attach, checkpoint, registry
from lorafactory.variants.lora_rite import escaped

TARGETS = ["fc1", "fc2", "fc3"]
CHANGES = {"skip": ([1e-6], {}), "clip": ([1e-3], {}), "cap": ([0.1], {})}


def setting(variant="lora_rite", dtype=torch.float64, rank=3, **dynamics):
    torch.manual_seed(0)
    base = Net().to(dtype)
    data = Regression(base)
    options = {"dynamics": dynamics} if variant.endswith("lora_rite") else {}
    return attached(variant, base, data, target_modules=TARGETS, rank=rank, **options), data


def pairs(adapted):
    return {s.name: low for s, low in adapted.adapter.low_ranks()}


def adamw(lr=1e-2, betas=(0.8, 0.95), decay=0.0):
    return lambda groups: torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=decay)


def root(v):
    values, vectors = torch.linalg.eigh(v)
    return vectors @ torch.diag(1 / (values.clamp_min(0).sqrt() + 1e-6)) @ vectors.T


def reference(x, y, g, state, t, betas, clip=1.0, cap=None):
    """The card's steps for one factor X [d, r] whose partner is Y [k, r], in their plainest form: M T^-T."""
    u, tri = torch.linalg.qr(y)
    inverse = torch.linalg.pinv(tri)
    g = clip * g @ inverse
    turn = u.T @ state.get("u", torch.zeros_like(u))
    b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
    v = b2 * turn @ state.get("v", torch.zeros_like(tri)) @ turn.T + (1 - b2) * g.T @ g / len(g)
    m = b1 * state.get("m", torch.zeros_like(x)) @ turn.T + (1 - b1) * g @ root(v)
    state.update(u=u, v=v, m=m)
    over = 1.0 if cap is None else max(1.0, float(m.square().mean().sqrt()) / cap)
    return m @ inverse.T / over


@pytest.mark.parametrize("decay, cap", [(0.0, None), (0.3, None), (0.0, 0.3), (0.3, 0.3)])
def test_step_by_step(decay, cap):
    """Eight steps of the trained adapter against the card's own; the cap, of both factors' M, some of which exceed it."""
    adapted, data = setting(clip=0.0, cap=cap)
    optimizer = adapted.optimizer(adamw(decay=decay), 8)
    states = {n: ({}, {}) for n in pairs(adapted)}
    for t in range(1, 9):
        optimizer.zero_grad()
        loss(adapted, data(t)[t - 1]).backward()
        want = {}
        for n, low in pairs(adapted).items():
            a, b = low.A.detach(), low.B.detach()
            db = reference(b, a.T, low.B.grad, states[n][0], t, (0.8, 0.95), cap=cap)
            da = reference(a.T, b, low.A.grad.T, states[n][1], t, (0.8, 0.95), cap=cap).T
            want[n] = a - 1e-2 * (da + decay * a), b - 1e-2 * (db + decay * b)
        optimizer.step()
        for n, low in pairs(adapted).items():
            assert close(low.A, want[n][0], 1e3) and close(low.B, want[n][1], 1e3), (n, t)
    sizes = [float(s["m"].square().mean().sqrt()) for both in states.values() for s in both]
    assert cap is None or min(sizes) < cap < max(sizes)


def test_rank_one_is_a_normalised_gradient():
    """Without momentum the first step of B is lr g / rms(g) / |A|, that of A nothing at B = 0."""
    adapted, data = setting(rank=1, clip=0.0)
    before = {n: low.A.detach().clone() for n, low in pairs(adapted).items()}
    optimizer = adapted.optimizer(adamw(betas=(0.0, 0.9)), 1)
    loss(adapted, data(1)[0]).backward()
    optimizer.step()
    for n, low in pairs(adapted).items():
        g, norm = low.B.grad, before[n].norm()
        rms = (g / norm).square().mean().sqrt()
        assert torch.allclose(low.B, -1e-2 * g / norm / (rms + 1e-6) / norm, rtol=1e-6) and torch.equal(low.A, before[n])


@pytest.mark.parametrize("cap", [None, 0.1])
def test_how_the_pair_is_written_does_not_matter(cap):
    """(B R, R^-1 A) moves B A alike: over four steps, moments and all."""
    products = []
    for turned in (False, True):
        adapted, data = setting(cap=cap)
        perturb(adapted.adapter, 0.3)
        r = torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3)
        with torch.no_grad():
            for low in pairs(adapted).values() if turned else ():
                low.B.copy_(low.B @ r)
                low.A.copy_(torch.linalg.solve(r, low.A))
        start = {n: low.product().detach() for n, low in pairs(adapted).items()}
        train(adapted, data, adapted.optimizer(adamw(lr=1e-5), 4), steps=4)
        products.append({n: low.product().detach() - start[n] for n, low in pairs(adapted).items()})
    for n, p in products[0].items():
        assert (p - products[1][n]).norm() < 1e-4 * p.norm() and p.any()


def test_second_moments_are_symmetric_and_positive():
    adapted, data = setting()
    optimizer = adapted.optimizer(adamw(), 9)
    train(adapted, data, optimizer, steps=9)
    for low in pairs(adapted).values():
        for p in (low.A, low.B):
            v = optimizer.state[p]["v"]
            assert torch.equal(v, v.T) or close(v, v.T)
            assert v.shape == (3, 3) and torch.linalg.eigvalsh(v).min() >= -1e-12 * v.norm() and v.any()


def test_no_gradient_no_change():
    adapted, _ = setting()
    perturb(adapted.adapter, 0.3)
    before = {n: p.detach().clone() for n, p in adapted.adapter.named_parameters()}
    optimizer = adapted.optimizer(adamw(), 1)
    for p in adapted.adapter.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(dict(adapted.adapter.named_parameters()), before)


def unmagnified(low):
    return [g @ torch.linalg.pinv(torch.linalg.qr(y)[1]) for g, y in ((low.B.grad, low.A.T), (low.A.grad.T, low.B))]


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_the_norm_over_all_pairs_is_clipped(size):
    """The first V of a pair is its clipped gradient's Gram matrix."""
    adapted, data = setting(skip=0.0)
    perturb(adapted.adapter, 0.3)
    optimizer = adapted.optimizer(adamw(), 1)
    (size * loss(adapted, data(1)[0])).backward()
    raw = {n: unmagnified(low) for n, low in pairs(adapted).items()}
    norm = torch.stack([g.norm() for both in raw.values() for g in both]).norm()
    optimizer.step()
    assert (norm > 1) == (size > 1)
    for n, low in pairs(adapted).items():
        for p, g in zip((low.B, low.A), raw[n], strict=True):
            g = (g / norm.clamp_min(1)).detach()
            assert close(optimizer.state[p]["v"], g.T @ g / len(g), 1e3)


def test_a_great_gradient_is_skipped():
    adapted, data = setting()
    perturb(adapted.adapter, 0.3)
    low = pairs(adapted)["fc1"]
    optimizer = adapted.optimizer(adamw(), 1)
    loss(adapted, data(1)[0]).backward()
    low.B.grad.mul_(1e6)
    before = low.B.detach().clone(), low.A.detach().clone()
    optimizer.step()
    assert torch.equal(low.B, before[0]) and not torch.equal(low.A, before[1])
    assert adapted.adapter.counters() == {"equilibrated_steps": 1, "skipped_gradients": 1}


def test_what_a_turn_loses():
    """diag(4, 1) seen in a basis that keeps the first direction alone: trace and largest eigenvalue difference are 1."""
    old, new = torch.diag(torch.tensor([4.0, 1.0]))[None], torch.diag(torch.tensor([4.0, 0.0]))[None]
    assert float(escaped(old, new)) == 1.0 and float(escaped(old, old)) == 0.0 and float(escaped(new, old)) == 0.0
    adapted, data = setting(escape=True)
    optimizer = adapted.optimizer(adamw(lr=0.1), 5)
    train(adapted, data, optimizer, steps=5)
    assert any(optimizer.state[low.A]["escaped"] > 0 for low in pairs(adapted).values())


def test_balance_gives_one_norm_and_keeps_the_update():
    products = []
    for balanced in (False, True):
        adapted, data = setting(balance=balanced)
        train(adapted, data, adapted.optimizer(adamw(), 1), steps=1)
        products.append({n: low.product() for n, low in pairs(adapted).items()})
        for low in pairs(adapted).values():
            assert close(low.A.norm(), low.B.norm()) == balanced
    assert all(close(p, products[1][n]) for n, p in products[0].items())


def test_layers_of_one_shape_go_together_and_move_as_alone():
    """Two layers of one shape, and each of them by itself."""
    torch.manual_seed(0)
    base = Blocks().double()
    x = torch.randn(6, 12, dtype=torch.float64)
    found = {}
    for targets in (["blocks.0.q", "blocks.0.v"], ["blocks.0.q"]):
        options = {"rank": 2, "target_modules": targets, "dynamics": {"clip": 0.0}}
        adapted = attach(copy.deepcopy(base), "lora_rite", seed=3, **options)
        with torch.no_grad():
            for _, low in adapted.adapter.low_ranks():
                low.A.copy_(torch.arange(24).reshape(2, 12).sin())
        optimizer = adapted.optimizer(adamw(), 1)
        adapted(x).square().sum().mul(1e-3).backward()
        optimizer.step()
        found[len(targets)] = pairs(adapted)["blocks.0.q"].B.detach().clone()
    assert close(found[1], found[2]) and found[1].any()


def test_all_else_takes_the_plain_step():
    made = {}
    for variant in ("dora+lora_rite", "dora"):
        adapted, data = setting(variant)
        train(adapted, data, adapted.optimizer(adamw(), 1), steps=1)
        factors = {p for low in pairs(adapted).values() for p in (low.A, low.B)}
        made[variant] = {n: p for n, p in adapted.adapter.named_parameters() if p not in factors}
    assert same(*made.values()) and len(made["dora"]) == 3


def test_state_and_resume(tmp_path):
    straight, data = setting()
    want = train(straight, data, straight.optimizer(adamw(), 6), steps=6)
    first, _ = setting()
    optimizer = first.optimizer(adamw(), 6)
    assert train(first, data, optimizer, steps=3) == want[:3]
    for low in pairs(first).values():
        state = optimizer.state[low.B]
        shapes = {k: tuple(t.shape) for k, t in state.items() if torch.is_tensor(t)}
        assert shapes == {"m": low.B.shape, "v": (3, 3), "basis": low.A.T.shape, "escaped": ()} and state["steps"] == 3
    checkpoint.save(first, tmp_path / "a", {"step": 3}, optimizer)
    again, _ = setting()
    checkpoint.restore(again, tmp_path / "a")
    optimizer = again.optimizer(adamw(), 6)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=3, steps=6) == want[3:]
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())


def test_an_optimiser_without_betas_is_refused():
    adapted, _ = setting()
    with pytest.raises(UserError, match="betas.*SGD.*adamw"):
        adapted.optimizer(lambda groups: torch.optim.SGD(groups, lr=0.1), 1)


@pytest.mark.parametrize("wrong", [{"eps": 0.0}, {"skip": -1.0}, {"clip": -1.0}, {"cap": 0.0}])
def test_values_without_meaning(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        setting(**wrong)


def test_a_penalty_on_the_factors_is_refused():
    for name in [n for n in registry.names() if "penalty on the factors" in registry.get(n).does]:
        with pytest.raises(UserError, match="penalty on the factors"):
            registry.config(f"{name}+lora_rite")
