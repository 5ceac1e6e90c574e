import itertools
import types

import pytest
import torch
from support import Net, Regression, attached, close, loss, perturb, same, train

from lorafactory import LowRank, UserError, checkpoint, linalg, registry
from lorafactory.variants import lora_pro
from lorafactory.variants.lora_pro import Closest

CHANGES = {"condition": ([10.0], {})}
EXACT = {"damping": 0.0, "condition": 1e15}
SHAPES = [(7, 5, 2), (5, 7, 3), (6, 6, 4)]  # d_out, d_in, rank


def some_pair(d_out=7, d_in=5, rank=2, scale=1.5, gate=False):
    low = LowRank(d_in, d_out, rank, scale, torch.empty(0, dtype=torch.float64))
    if gate:
        low.add_gate(1.0)
    with torch.no_grad():
        for p in low.parameters():
            p.normal_()
    return low


def closest(*lows, x="sylvester", **options):
    return Closest(list(lows), types.SimpleNamespace(x=x, **{**EXACT, **options}))


def gradients(low, g):
    """What LoRA's factors get for a gradient g of W, gate included: through autograd."""
    low.zero_grad()
    (low.product() * g).sum().backward()
    return low.A.grad[None], low.B.grad[None]


def effective(low):
    gate = torch.ones(low.rank, dtype=torch.float64) if low.gate is None else low.gate
    return gate[:, None] * low.A, low.B * gate


def moved(low, da, db):
    """s (B dA + dB A)."""
    a, b = effective(low)
    return low.scale * (b @ da + db @ a)


def projection(m):
    """Onto the span of m's columns."""
    q = torch.linalg.svd(m, full_matrices=False)[0][:, : torch.linalg.matrix_rank(m)]
    return q @ q.T


@pytest.mark.parametrize("d_out, d_in, rank", SHAPES)
@pytest.mark.parametrize("gate", [False, True])
def test_the_equivalent_gradient_is_a_projection(d_out, d_in, rank, gate):
    """P_B G + (I - P_B) G P_A, from the factors' gradients alone."""
    low, g = some_pair(d_out, d_in, rank, gate=gate), torch.randn(d_out, d_in, dtype=torch.float64)
    a, b = effective(low)
    p_b, p_a = projection(b), projection(a.T)
    want = p_b @ g + (torch.eye(d_out) - p_b) @ g @ p_a
    factors = gradients(low, g)
    low.requires_grad_(False)
    c = closest(low)
    got = c.equivalent(*c.pair(*factors))[0]
    assert close(got, want, 100) and close(moved(low, *(t[0] for t in c.of(g[None]))), want, 100)
    lora = moved(low, *(t[0] for t in factors))
    best = min(float((t * lora - g).norm()) for t in torch.linspace(-1, 3, 401))
    assert (got - g).norm() < best, "LoRA's own gradient, however scaled, is nearer"
    assert (got * g).sum() >= 0, "the step would not descend"


def test_it_does_not_depend_on_x():
    low, g = some_pair(), torch.randn(7, 5, dtype=torch.float64)
    pairs = {x: [t[0] for t in closest(low, x=x).of(g[None])] for x in lora_pro.CHOICES}
    extra = torch.randn(2, 2, dtype=torch.float64)
    pairs["random"] = [pairs["zero"][0] + extra @ low.A, pairs["zero"][1] - low.B @ extra]
    for one, other in itertools.combinations(pairs.values(), 2):
        assert close(moved(low, *one), moved(low, *other), 100) and not close(one[0], other[0])


def test_sylvester_stays_nearest_to_lora():
    low, g = some_pair(), torch.randn(7, 5, dtype=torch.float64)
    ga, gb = (t[0] for t in gradients(low, g))
    low.requires_grad_(False)

    def distance(da, db):
        return float((da - ga).norm() ** 2 + (db - gb).norm() ** 2)

    of = {x: [t[0] for t in closest(low, x=x).of(g[None])] for x in lora_pro.CHOICES}
    chosen = distance(*of["sylvester"])
    assert chosen < distance(*of["zero"]) and chosen < distance(*of["symmetric"])
    for _ in range(50):
        extra = 0.1 * torch.randn(2, 2, dtype=torch.float64)
        assert chosen < distance(of["sylvester"][0] + extra @ low.A, of["sylvester"][1] - low.B @ extra)


def test_symmetric_splits_the_overlap():
    """s B dA and s dB A both hold one half of P_B G P_A."""
    low, g = some_pair(), torch.randn(7, 5, dtype=torch.float64)
    da, db = (t[0] for t in closest(low, x="symmetric").of(g[None]))
    overlap = projection(low.B) @ g @ projection(low.A.T) / 2
    assert close(low.scale * low.B @ da @ projection(low.A.T), overlap, 100)
    assert close(projection(low.B) @ (low.scale * db @ low.A), overlap, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sylvester_residual(dtype):
    b, a, c = torch.randn(5, 40, 8), torch.randn(5, 8, 24), torch.randn(5, 8, 8)
    p, q, c = (t.to(dtype) for t in (b.mT @ b, a @ a.mT, c))
    x = linalg.sylvester(linalg.spectrum(p), linalg.spectrum(q), c)
    assert (p @ x + x @ q - c).norm() / c.norm() < (1e-5 if dtype == torch.float32 else 1e-13)


def test_inverse():
    m = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    m = (q := torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]) @ m @ q.T
    spectrum = linalg.spectrum(m)
    assert close(linalg.inverse(spectrum, 0.5, 1e9), torch.linalg.inv(m + 0.5 * torch.eye(3)))
    assert close(linalg.inverse(spectrum), torch.linalg.pinv(m, rtol=1e-6))
    assert close(linalg.inverse(spectrum, condition=3.0), torch.linalg.pinv(m, rtol=1 / 3))
    assert not linalg.inverse(linalg.spectrum(0 * m)).any()


@pytest.mark.parametrize("d_out, d_in, rank", SHAPES)
def test_what_the_pair_stands_for_decides(d_out, d_in, rank):
    """(B R, R^-1 A) is the same update, so it moves alike."""
    low, g = some_pair(d_out, d_in, rank), torch.randn(d_out, d_in, dtype=torch.float64)
    before = moved(low, *(t[0] for t in closest(low).of(g[None])))
    r = torch.randn(rank, rank, dtype=torch.float64) + 3 * torch.eye(rank)
    with torch.no_grad():
        low.B.copy_(low.B @ r)
        low.A.copy_(torch.linalg.solve(r, low.A))
    assert close(moved(low, *(t[0] for t in closest(low).of(g[None]))), before, 1000)


def test_full_rank_is_the_full_gradient():
    for d_out, d_in in ((4, 6), (6, 4), (5, 5)):
        low, g = some_pair(d_out, d_in, min(d_out, d_in)), torch.randn(d_out, d_in, dtype=torch.float64)
        assert close(moved(low, *(t[0] for t in closest(low).of(g[None]))), g, 1000)


# the optimiser


def setting(variant="lora_pro", **options):
    torch.manual_seed(0)
    base = Net().double()
    data = Regression(base)
    return attached(variant, base, data, target_modules=["fc1", "fc2", "fc3"], **options), data


def adamw(lr=1e-3, decay=0.0):
    return lambda groups: torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.95), weight_decay=decay)


def reference(low, g, state, t, lr, decay=0.0, damping=1e-8):
    """The card's six steps, each in its plainest form, for one pair; g: gradient of W."""
    a, b, s, eye = low.A.detach(), low.B.detach(), low.scale, torch.eye(low.rank, dtype=torch.float64)
    inv_a, inv_b = torch.linalg.pinv(a @ a.T + damping * eye), torch.linalg.pinv(b.T @ b + damping * eye)
    left = torch.eye(len(b), dtype=torch.float64) - b @ inv_b @ b.T

    def pair(g):
        return inv_b @ (s * b.T @ g) / s**2, left @ (s * g @ a.T) @ inv_a / s**2

    da, db = pair(g)
    w = s * (b @ da + db @ a)
    state["m"] = 0.8 * state.get("m", 0) + 0.2 * w
    state["v"] = 0.95 * state.get("v", 0) + 0.05 * w * w
    u = state["m"] / (1 - 0.8**t) / ((state["v"] / (1 - 0.95**t)).sqrt() + 1e-8)
    da, db = pair(u)
    c = -inv_b @ (s * b.T @ u) @ a.T / s**2
    both = torch.kron((b.T @ b).contiguous(), eye) + torch.kron(eye, a @ a.T)  # of X by rows
    x = torch.linalg.solve(both, c.flatten()).reshape(c.shape)
    keep = 1 - lr * decay
    return keep * a - lr * (da + x @ a), keep * b - lr * (db - b @ x)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam_form_step_by_step(decay):
    """Six steps of the trained adapter against the card's own steps in float64, started by the true gradient of W."""
    adapted, data = setting(rank=3)
    optimizer = adapted.optimizer(adamw(1e-2, decay), 6)
    states = {}
    for i in range(6):
        optimizer.zero_grad()
        loss(adapted, data(i + 1)[i]).backward()
        want = {}
        for s, low in adapted.adapter.low_ranks():
            g = full_gradient(adapted, s, data(i + 1)[i])
            assert close(low.B.grad, low.scale * g @ low.A.T, 1e5)  # the loss is taken in float32
            want[s.name] = reference(low, g, states.setdefault(s.name, {}), i + 1, 1e-2, decay)
        optimizer.step()
        for s, low in adapted.adapter.low_ranks():
            a, b = want[s.name]
            assert (low.A - a).norm() < 1e-4 * a.norm() and (low.B - b).norm() < 1e-4 * b.norm(), (s.name, i)


def full_gradient(adapted, site, batch):
    """dL/dW [d_out, d_in]: that of an extra weight, zero, beside the layer's own."""
    extra = torch.zeros(site.d_out, site.d_in, dtype=torch.float64, requires_grad=True)
    module = site.base.module
    handle = module.register_forward_hook(lambda m, args, y: y + args[0] @ extra.T)
    try:
        return torch.autograd.grad(loss(adapted, batch), extra)[0]
    finally:
        handle.remove()


def test_the_first_step():
    """B = 0: A stays, and W moves by -lr u P_A, u = Adam's direction of G P_A."""
    adapted, data = setting(rank=3)
    lows = dict((s.name, low) for s, low in adapted.adapter.low_ranks())
    before = {n: low.A.detach().clone() for n, low in lows.items()}
    optimizer = adapted.optimizer(adamw(1e-2), 1)
    loss(adapted, data(1)[0]).backward()
    g = {s.name: full_gradient(adapted, s, data(1)[0]) for s, _ in adapted.adapter.low_ranks()}
    optimizer.step()
    for n, low in lows.items():
        assert torch.equal(low.A, before[n])
        p_a = projection(low.A.T)
        u = g[n] @ p_a / ((g[n] @ p_a).abs() + 1e-8)
        assert (low.product() + 1e-2 * u @ p_a).norm() < 1e-4 * low.product().norm() and low.product().any()


def test_sgd_form():
    """One step of gradient descent moves the pair by -lr (gA, gB) of the closed form, and state is nothing."""
    adapted, data = setting(rank=3)
    perturb(adapted.adapter, 0.3)
    pairs = [low for _, low in adapted.adapter.low_ranks()]
    optimizer = adapted.optimizer(lambda g: torch.optim.SGD(g, lr=0.01), 1)
    loss(adapted, data(1)[0]).backward()
    config = adapted.adapter.config.dynamics
    want = []
    for low in pairs:
        c = Closest([low], config)
        step = c.of(c.equivalent(*c.pair(low.A.grad[None], low.B.grad[None])))
        want.append([p.detach() - 0.01 * d[0] for p, d in zip((low.A, low.B), step, strict=True)])
    optimizer.step()
    for low, (a, b) in zip(pairs, want, strict=True):
        assert close(low.A, a) and close(low.B, b)
    assert not optimizer.state_dict()["state"]


def test_layers_of_one_shape_are_batched_and_alone_the_same(monkeypatch):
    results = []
    for at_once in (2**24, 1):
        monkeypatch.setattr(lora_pro, "AT_ONCE", at_once)
        adapted, data = setting(rank=3, rank_pattern={"fc2": 5})
        train(adapted, data, adapted.optimizer(adamw(), 4), steps=4)
        results.append(list(adapted.adapter.parameters()))
    assert all(close(p, q) for p, q in zip(*results, strict=True))


def test_all_else_takes_the_plain_step():
    """Head and magnitudes move as they would without it; the hooks of a step run once; gradients stay."""
    made = {}
    for variant in ("dora+lora_pro", "dora"):
        adapted, data = setting(variant, trained_modules=["head"])
        optimizer = adapted.optimizer(adamw(), 3)
        calls = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        train(adapted, data, optimizer, steps=1)
        assert calls == [1] and optimizer.lifecycle.index == 1
        assert all(p.grad is not None and p.grad.shape == p.shape for p in adapted.adapter.parameters())
        pairs = {p for _, low in adapted.adapter.low_ranks() for p in (low.A, low.B)}
        made[variant] = {n: p for n, p in adapted.adapter.named_parameters() if p not in pairs}
    assert same(*made.values()) and len(made["dora"]) == 5
    assert adapted.adapter.counters() == {}


def test_an_anchored_pair_moves_by_its_trained_factors():
    adapted, data = setting("pissa+lora_pro", rank=3)
    before = {s.name: (low.A0.clone(), low.product().detach().clone()) for s, low in adapted.adapter.low_ranks()}
    optimizer = adapted.optimizer(lambda g: torch.optim.SGD(g, lr=1e-6), 1)
    loss(adapted, data(1)[0]).backward()
    g = {s.name: full_gradient(adapted, s, data(1)[0]) for s, _ in adapted.adapter.low_ranks()}
    p = {s.name: (projection(low.B), projection(low.A.T)) for s, low in adapted.adapter.low_ranks()}
    optimizer.step()
    for s, low in adapted.adapter.low_ranks():
        anchor, product = before[s.name]
        left, right = p[s.name]
        want = left @ g[s.name] + (torch.eye(s.d_out) - left) @ g[s.name] @ right
        got = (low.product() - product) / -1e-6
        assert torch.equal(low.A0, anchor) and (got - want).norm() < 1e-3 * want.norm()


def test_nothing_explodes_where_b_is_almost_zero():
    low = some_pair()
    with torch.no_grad():
        low.B.mul_(1e-12)
        low.A[1] = low.A[0]  # dependent rows as well
    g = torch.randn(1, 7, 5, dtype=torch.float64)
    for x in lora_pro.CHOICES:
        da, db = closest(low, x=x, damping=1e-8, condition=1e6).of(g)
        assert da.isfinite().all() and db.isfinite().all() and da.abs().max() < 1e3 and db.abs().max() < 1e3
        for p in (low.A, low.B):
            assert p.isfinite().all()
    dead = some_pair(gate=True)
    with torch.no_grad():
        dead.gate.zero_()
    assert not any(t.any() for t in closest(dead, damping=0.0).of(g))


def test_state_is_moments_of_full_size_and_resumes_exactly(tmp_path):
    straight, data = setting(rank=3)
    want = train(straight, data, straight.optimizer(adamw(), 6), steps=6)
    first, _ = setting(rank=3)
    optimizer = first.optimizer(adamw(), 6)
    assert train(first, data, optimizer, steps=3) == want[:3]
    for s, low in first.adapter.low_ranks():
        state = optimizer.state[low.B]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and low.A not in optimizer.state
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (s.d_out, s.d_in)
    checkpoint.save(first, tmp_path / "a", {"step": 3}, optimizer)
    again, _ = setting(rank=3)
    checkpoint.restore(again, tmp_path / "a")
    optimizer = again.optimizer(adamw(), 6)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=3, steps=6) == want[3:]
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())
    assert again.adapter.counters() == {"projected_pairs": 3, "projected_steps": 6}


def test_the_rate_is_the_runs_own():
    adapted, data = setting(rank=3)
    optimizer = adapted.optimizer(adamw(7e-3), 2)
    assert {g["lr"] for g in optimizer.param_groups} == {7e-3} == {g["initial_lr"] for g in optimizer.param_groups}
    before = {n: p.detach().clone() for n, p in adapted.adapter.named_parameters()}
    for g in optimizer.param_groups:
        g["lr"] = 0.0
    train(adapted, data, optimizer, steps=1)
    assert same(dict(adapted.adapter.named_parameters()), before)


def test_a_penalty_on_the_factors_is_refused():
    penalised = [n for n in registry.names() if "penalty on the factors" in registry.get(n).does]
    for name in penalised:
        with pytest.raises(UserError, match="penalty on the factors"):
            registry.config(f"{name}+lora_pro")
