import pytest
import torch
from support import Net, Regression, adamw, attached, close, loss, same, train

from lorafactory import UserError, checkpoint
from lorafactory.variants.flora_opt import down, normalised, projection, up

SMALL = {"rank": 4, "every": 5}
CHANGES = {"clip": ([1e-3], {})}
TARGETS = ["fc1", "fc2", "fc3"]
SHAPES = [(6, 9), (9, 6), (7, 7)]


def setting(variant="flora_opt", **dynamics):
    torch.manual_seed(0)
    base = Net().double()
    data = Regression(base)
    options = {"dynamics": {**SMALL, **dynamics}} if variant == "flora_opt" else {}
    return attached(variant, base, data, target_modules=TARGETS, trained_modules=["head"], **options), data


def weights(adapted):
    return {s.name: p for s, p in adapted.adapter.dense()}


@pytest.mark.parametrize("shape", SHAPES)
def test_down_and_up_are_the_identity_on_average(shape):
    g = torch.randn(shape, dtype=torch.float64)
    mean = sum(up(down(g, p), p, shape) for p in (projection(shape, 4, s, g) for s in range(2000))) / 2000
    assert (mean - g).norm() < 0.05 * g.norm()
    assert torch.equal(projection(shape, 4, 7, g), projection(shape, 4, 7, g))
    assert not torch.equal(projection(shape, 4, 7, g), projection(shape, 4, 8, g))
    assert down(g, projection(shape, 4, 7, g)).shape == ((4, shape[1]) if shape[0] < shape[1] else (shape[0], 4))


def test_adafactor_by_hand():
    """Rank-one squares are factored exactly: what is left of the gradient are signs; the second step halves them by
    1 - 2^-0.8 of the old."""
    g, state = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0, 5.0])).double(), {"steps": 1}
    assert close(normalised(g, state, 0.8), g.sign())
    state["steps"] = 2
    share = 1 - 2**-0.8
    assert close(normalised(2 * g, state, 0.8), 2 * g.sign() / (share + 4 * (1 - share)) ** 0.5)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_step_by_step(relative, decay):
    """Twelve steps over two changes of P against the paper's own, with the P's that the state's seeds give."""
    adapted, data = setting(relative=relative)
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-2, weight_decay=decay), 12)
    rows, columns, moments, seeds, changed = {}, {}, {}, {}, 0
    for t in range(1, 13):
        before = {n: p.detach().clone() for n, p in weights(adapted).items()}
        train(adapted, data, optimizer, start=t - 1, steps=t)
        for n, p in weights(adapted).items():
            g, w, seed = p.grad, before[n], optimizer.state[p]["seed"]
            b2 = 1 - t**-0.8
            rows[n] = b2 * rows.get(n, 0) + (1 - b2) * (g * g + 1e-30).mean(1)
            columns[n] = b2 * columns.get(n, 0) + (1 - b2) * (g * g + 1e-30).mean(0)
            u = g / (torch.outer(rows[n], columns[n]) / rows[n].mean()).sqrt()
            whole = torch.zeros_like(g)
            if n in moments:
                whole = up(moments[n], projection(g.shape, 4, seeds[n], g), g.shape)
                if seed != seeds[n]:
                    changed += 1
                    assert t % 5 == 0
                    moments[n] = down(whole, projection(g.shape, 4, seed, g))
            seeds[n] = seed
            moments[n] = 0.9 * moments.get(n, 0) + 0.1 * down(u, projection(g.shape, 4, seed, g))
            u = 0.1 * u + 0.9 * whole
            u = u / max(1.0, float(u.square().mean().sqrt()))
            lr = 1e-2 * (max(1e-3, float(w.square().mean().sqrt())) if relative else 1.0)
            assert close(p, w * (1 - lr * decay) - lr * u, 1e3), (n, t)
    assert changed == 6 and adapted.adapter.counters() == {"projected_weights": 3, "projections": 9}


def test_all_else_takes_the_plain_step():
    made = {}
    for variant in ("flora_opt", "full"):
        adapted, data = setting(variant)
        train(adapted, data, adapted.optimizer(adamw, 1), steps=1)
        dense = set(weights(adapted).values())
        made[variant] = {n: p for n, p in adapted.adapter.named_parameters() if p not in dense}
    assert same(*made.values()) and len(made["full"]) == 4


def test_state_is_small():
    """rank max + d_out + d_in numbers a weight and a seed, against 2 d_out d_in."""
    adapted, data = setting()
    optimizer = adapted.optimizer(adamw, 1)
    train(adapted, data, optimizer, steps=1)
    for p in weights(adapted).values():
        state = optimizer.state[p]
        assert sum(t.numel() for t in state.values() if torch.is_tensor(t)) == 4 * max(p.shape) + sum(p.shape)
        assert isinstance(state["seed"], int) and state["steps"] == 1


@pytest.mark.parametrize("at", [3, 4, 5])
def test_resume_before_at_and_after_a_new_projection(at, tmp_path):
    straight, data = setting()
    want = train(straight, data, straight.optimizer(adamw, 8), steps=8)
    first, _ = setting()
    optimizer = first.optimizer(adamw, 8)
    assert train(first, data, optimizer, steps=at) == want[:at]
    checkpoint.save(first, tmp_path / "a", {"step": at}, optimizer)
    again, _ = setting()
    checkpoint.restore(again, tmp_path / "a")
    optimizer = again.optimizer(adamw, 8)
    optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / "a")["step"]
    assert train(again, data, optimizer, start=at, steps=8) == want[at:]
    assert same(again.adapter.state_dict(), straight.adapter.state_dict())


def test_a_full_rank_is_nearly_adafactor_with_momentum():
    """The larger the rank, the nearer P^T M comes to the momentum itself."""
    far = []
    for rank in (2, 24):
        adapted, data = setting(rank=rank, every=1000)
        optimizer = adapted.optimizer(adamw, 6)
        whole: dict = {}
        for t in range(6):
            optimizer.zero_grad()
            loss(adapted, data(t + 1)[t]).backward()
            us = {}
            for n, p in weights(adapted).items():
                own = {k: v for k, v in optimizer.state.get(p, {}).items() if k in ("rows", "columns")}
                us[n] = normalised(p.grad, {**own, "steps": t + 1}, 0.8).detach()
            optimizer.step()
            for n, u in us.items():
                whole[n] = 0.9 * whole.get(n, 0) + 0.1 * u
        p = weights(adapted)["fc1"]
        kept = up(optimizer.state[p]["moment"], projection(p.shape, rank, optimizer.state[p]["seed"], p), p.shape)
        far.append(float((kept - whole["fc1"]).norm() / whole["fc1"].norm()))
    assert far[1] < 0.5 * far[0]


WRONG = [{"rank": 0}, {"every": 0}, {"momentum": 0.0}, {"momentum": 1.0}, {"decay": 0.0}, {"clip": 0.0}]


@pytest.mark.parametrize("wrong", WRONG)
def test_values_without_meaning(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        setting(**wrong)


def test_a_rank_above_a_weight_is_refused():
    with pytest.raises(UserError, match=r"rank 30 .*fc1 \[40, 24\].*at most 24"):
        setting(rank=30)
