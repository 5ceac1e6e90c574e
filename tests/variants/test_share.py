import pytest
import torch
from support import Net, Regression, adamw, attached, begun, close, perturb, same, train

from lorafactory import UserError, checkpoint
from lorafactory.variants.share import ShareDelta, basis

SMALL = {"components": 8}
CHANGES = {"center": ([False], {"components": 4}), "variance": ([0.6], {"components": 32})}
TARGETS = ["fc1", "fc2", "fc3"]


def setting(**options):
    torch.manual_seed(0)
    base = Net()
    options = {"rank": 2, "components": 8, "target_modules": TARGETS, **options}
    return attached("share", base, Regression(base), **options), base


def deltas(adapted):
    return [d for _, d in adapted.adapter.inside(ShareDelta)]


def stage(adapted, base, index, steps=4):
    data = Regression(base, index + 1)
    if index:
        begun(adapted, data, index)
    train(adapted, data, adapted.optimizer(adamw, steps), steps=steps)
    perturb(adapted.adapter, 0.1)
    before = outputs(adapted, index + 1)
    adapted.end()
    return before


def outputs(adapted, stages):
    x, found = torch.linspace(-1, 1, 48).view(2, 24), []
    for t in range(stages):
        for d in deltas(adapted):
            d.turn(t)
        found.append(adapted(x).detach())
    for d in deltas(adapted):
        d.turn(None)
    assert torch.equal(adapted(x), found[-1])
    return found


def test_the_first_stage_is_lora_and_its_basis_holds_it_exactly():
    adapted, base = setting()
    (before,) = stage(adapted, base, 0)
    assert close(outputs(adapted, 1)[0], before, 3)
    for d in deltas(adapted):
        assert d.A is None and d.alpha.shape == (d.d_in, 8) and d.beta.shape == (d.d_out, 8)
        for side in (d.alpha, d.beta):
            assert close(side.T @ side, torch.eye(8))
        assert d.a.shape == d.b.shape == (8, 2) and float(d.scale) == 1.0


def test_only_coefficients_and_extra_directions_train():
    adapted, base = setting()
    stage(adapted, base, 0)
    begun(adapted, Regression(base, 2), 1)
    frozen = [(d.alpha.clone(), d.beta.clone(), d.past_a.clone()) for d in deltas(adapted)]
    names = {n.rpartition(".")[2] for n, p in adapted.adapter.named_parameters() if p.requires_grad}
    assert names == {"a", "b", "a1", "a2", "b1", "b2"}
    k, p, phi = 8, 2, 2
    want = sum(2 * k * p + phi * (d.d_in + d.d_out + 2 * p) for d in deltas(adapted))
    assert adapted.cost()["adapter_parameters"] == want
    train(adapted, Regression(base, 2), adapted.optimizer(adamw, 3), steps=3)
    for d, (alpha, beta, past) in zip(deltas(adapted), frozen, strict=True):
        assert torch.equal(d.alpha, alpha) and torch.equal(d.beta, beta) and torch.equal(d.past_a, past)


def test_a_wide_basis_keeps_every_stage():
    """Three stages of rank 2, with two directions each beyond the basis: 8 columns at most in a basis of 8, nothing lost."""
    adapted, base = setting(extra=1)
    for index in range(3):
        before = stage(adapted, base, index)
        after = outputs(adapted, index + 1)
        assert all(close(a, b, 5) for a, b in zip(after, before, strict=True)), index
        assert index == 0 or not close(after[0], after[-1]), "each stage has a function of its own"
    assert adapted.adapter.counters() == {"stages_held": 3.0}


def test_a_narrow_basis_loses_what_lies_outside():
    """By the norm of the component outside, of A and of B each."""
    adapted, base = setting(components=3, center=False)
    stage(adapted, base, 0)
    data = Regression(base, 2)
    begun(adapted, data, 1)
    train(adapted, data, adapted.optimizer(adamw, 8), steps=8)
    perturb(adapted.adapter, 0.3)
    before = [[tuple(x.detach() for x in d.pair(t)) for t in range(2)] for d in deltas(adapted)]
    adapted.end()
    for d, pairs in zip(deltas(adapted), before, strict=True):
        for t, (b, a) in enumerate(pairs):
            now_b, now_a = d.pair(t)
            assert close(now_a, a @ d.alpha @ d.alpha.T) and close(now_b, d.beta @ d.beta.T @ b)
        columns = torch.cat([a.T for _, a in pairs], 1)
        lost = (columns - d.alpha @ d.alpha.T @ columns).norm()
        assert close(lost, torch.linalg.svdvals(columns)[3:].norm(), 50) and lost > 1e-3


def test_the_basis_by_hand():
    """Columns (3, 4, 0) and (0, 0, 1): the leading direction is (3, 4, 0) / 5; centred, (3, 4, -1) / sqrt 26 is all."""
    columns = torch.tensor([[3.0, 0], [4, 0], [0, 1]])
    assert close(basis(columns, 1, False).abs()[:, 0], torch.tensor([0.6, 0.8, 0]))
    assert close(basis(columns, 1, True).abs()[:, 0], torch.tensor([3.0, 4, 1]) / 26**0.5)
    full = basis(columns, 3, True)
    assert close(full.T @ full, torch.eye(3))


def test_how_many_directions_hold_a_share_of_the_variance_by_hand():
    """Squares 9, 4, 1 of 14: 0.64, 0.93, 1. Centred, (3, 4, 0) and (0, 0, 1) have one direction; and nothing has none."""
    columns = torch.diag(torch.tensor([3.0, 2, 1]))
    for variance, k in ((0.6, 1), (0.65, 2), (0.92, 2), (0.95, 3), (1.0, 3)):
        assert basis(columns, 99, False, variance).shape == (3, k), variance
    assert basis(torch.tensor([[3.0, 0], [4, 0], [0, 1]]), 99, True, 0.99).shape == (3, 1)
    assert close(basis(torch.zeros(3, 2), 99, False, 0.6).norm(), torch.tensor(1.0))


def test_the_basis_holds_the_share_that_is_asked_for(tmp_path):
    """Of the factors of all stages, less their mean, and one direction less would not; in a new adapter, too."""
    adapted, base = setting(components=32, variance=0.6)
    for index in (0, 1):
        if index:
            begun(adapted, Regression(base, 2), 1)
        train(adapted, Regression(base, index + 1), adapted.optimizer(adamw, 4), steps=4)
        perturb(adapted.adapter, 0.1)
        pairs = [[tuple(x.detach() for x in d.pair(t)) for t in range(index + 1)] for d in deltas(adapted)]
        adapted.end()
        for d, found in zip(deltas(adapted), pairs, strict=True):
            for side, columns in ((d.alpha, [a.T for _, a in found]), (d.beta, [b for b, _ in found])):
                x = torch.cat(columns, 1)
                x = x - x.mean(1, keepdim=True)
                held = [(side[:, :k].T @ x).square().sum() / x.square().sum() for k in range(side.shape[1] + 1)]
                assert held[-2] < 0.6 <= held[-1]
    checkpoint.save(adapted, tmp_path / "a")
    again = setting(components=32, variance=0.6)[0]
    checkpoint.restore(again, tmp_path / "a")
    assert all(torch.equal(x, y) for x, y in zip(outputs(again, 2), outputs(adapted, 2), strict=True))


def test_a_stage_starts_where_the_last_one_stood_or_from_zero():
    adapted, base = setting()
    stage(adapted, base, 0)
    x = torch.randn(3, 24)
    y = adapted(x)
    begun(adapted, Regression(base, 2), 1)
    assert close(adapted(x), y)
    other, base = setting(start="zero")
    stage(other, base, 0)
    begun(other, Regression(base, 2), 1)
    with other.disabled() as model:
        want = model(x)
    assert close(other(x), want) and not close(other(x), y)


@pytest.mark.parametrize("cut", ["between", "within"])
def test_resume(cut, tmp_path):
    def life(cut):
        adapted, base = setting()
        stage(adapted, base, 0)
        if cut == "between":
            checkpoint.save(adapted, tmp_path / cut)
            adapted = setting()[0]
            checkpoint.restore(adapted, tmp_path / cut)
        data = begun(adapted, Regression(base, 2), 1) and Regression(base, 2)
        optimizer = adapted.optimizer(adamw, 4)
        losses = train(adapted, data, optimizer, steps=2)
        if cut == "within":
            checkpoint.save(adapted, tmp_path / cut, {"step": 2}, optimizer)
            adapted = setting()[0]
            checkpoint.restore(adapted, tmp_path / cut)
            begun(adapted, data, 1)
            optimizer = adapted.optimizer(adamw, 4)
            optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / cut)["step"]
        losses += train(adapted, data, optimizer, start=2, steps=4)
        adapted.end()
        return losses, {n: t.clone() for n, t in adapted.adapter.state_dict().items()}

    (losses, state), (again, other) = life(""), life(cut)
    assert losses == again and same(state, other)


def test_a_file_without_either_pair_is_refused():
    adapted, _ = setting()
    state = {n: t for n, t in adapted.adapter.state_dict().items() if not n.startswith("deltas.fc1") or n.endswith("scale")}
    with pytest.raises(UserError, match="A is missing"):
        setting()[0].adapter.load(state)


def test_values_without_meaning():
    for wrong in ({"components": 1}, {"extra": -1}, {"start": "random"}, {"variance": 0.0}, {"variance": 1.5}, {"variance": 0.6}):
        with pytest.raises(UserError, match=next(iter(wrong))):  # 0.6: beside components
            setting(**wrong)
    with pytest.raises(UserError, match="continual"):
        attached("share+o_lora", Net(), Regression(Net()))
