import copy

import pytest
import torch
from support import Net, Regression, attached, close, loss, perturb, same, train

from lorafactory import UserError, checkpoint, load

SMALL = {"start": 0.25}
TARGETS = ["fc1", "fc2", "fc3"]


def setting(variant="delta_lora", dtype=torch.float64, rank=2, **dynamics):
    torch.manual_seed(0)
    base = Net().to(dtype)
    data = Regression(base)
    options = {"dynamics": {"start": 3, **dynamics}} if "delta_lora" in variant else {}
    return attached(variant, base, data, rank=rank, target_modules=TARGETS, **options), data


def pairs(adapted):
    return {s.name: low for s, low in adapted.adapter.low_ranks()}


def adam(groups):
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-6, weight_decay=0.1)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.05)


class Paper:
    """The paper's own procedure: a plain LoRA whose base weights are really changed after each step."""

    def __init__(self, variant, ratio, first, make, steps):
        self.adapted, self.data = setting(variant)
        self.ratio, self.first = ratio, first
        self.optimizer = self.adapted.optimizer(make, steps)

    def sites(self):
        return [(s.base.module, low) for s, low in self.adapted.adapter.low_ranks()]

    def train(self, steps):
        losses = []
        for t in range(steps):
            before = [low.scale * low.B.detach() @ low.A.detach() for _, low in self.sites()]
            losses += train(self.adapted, self.data, self.optimizer, start=t, steps=t + 1)
            if t >= self.first:
                with torch.no_grad():
                    for (module, low), old in zip(self.sites(), before, strict=True):
                        module.weight += self.ratio * (low.scale * low.B @ low.A - old)
        return losses


@pytest.mark.parametrize("make", [adam, sgd])
@pytest.mark.parametrize("start, ratio", [(3, 2.0), (0, 0.5)])
@pytest.mark.parametrize("variant", ["lora", "pissa"])
def test_it_is_the_papers_procedure(make, start, ratio, variant):
    """Losses, factors and merged weights of nine steps, against a base that is really written to."""
    paper = Paper(variant, ratio, start, make, 9)
    w0 = {s.name: s.base.weight.clone() for s in paper.adapted.adapter.sites}
    want = paper.train(9)
    ours, data = setting(f"{variant}+delta_lora" if variant != "lora" else "delta_lora", start=start, ratio=ratio)
    got = train(ours, data, ours.optimizer(make, 9), steps=9)
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=1e-5)  # the loss is taken in float32
    theirs = pairs(paper.adapted)
    for s, low in ours.adapter.low_ranks():
        assert close(low.A, theirs[s.name].A, 1e6) and close(low.B, theirs[s.name].B, 1e6)
        merged = ours.adapter.deltas[s.key].weight(s.base)
        written = next(m for m in paper.adapted.adapter.sites if m.name == s.name)
        assert close(merged, paper.adapted.adapter.deltas[s.key].weight(written.base), 1e6)
        assert torch.equal(s.base.weight, w0[s.name]), "the base is read-only"
        assert not close(written.base.weight, w0[s.name], 1e6)
    assert ours.adapter.counters() == {"steps_of_w": 9 - start}


def test_w_telescopes():
    """W_T - W0 = ratio s (B_T A_T - B_K A_K) beside s B_T A_T; before step K nothing but LoRA's."""
    adapted, data = setting(start=4, ratio=2.0)
    lora, _ = setting("lora")
    optimizer, other = adapted.optimizer(sgd, 9), lora.optimizer(sgd, 9)
    assert train(adapted, data, optimizer, steps=4) == train(lora, data, other, steps=4)
    scale = {n: float(low.scale) for n, low in pairs(adapted).items()}
    at_k = {n: (low.B @ low.A).detach() for n, low in pairs(adapted).items()}
    assert all(low.A_past is None for low in pairs(adapted).values())
    train(adapted, data, optimizer, start=4, steps=9)
    for n, low in pairs(adapted).items():
        now = low.B @ low.A
        assert close(low.product(), scale[n] * now + 2.0 * scale[n] * (now - at_k[n]), 10)
        assert int(torch.linalg.matrix_rank(low.product(), rtol=1e-10)) <= 4 and low.A_past.shape[0] == 2


def test_nothing_changes_when_it_starts():
    adapted, data = setting(ratio=3.0)
    perturb(adapted.adapter, 0.3)
    x = torch.randn(5, 24, dtype=torch.float64)
    before = adapted(x).detach()
    for low in pairs(adapted).values():
        low.unload(-3.0, scale=True)
        assert float(low.scale) == 4 * 8.0
    assert close(adapted(x), before)


def test_zero_update_at_the_start():
    adapted, _ = setting(start=0)
    x = torch.randn(5, 24, dtype=torch.float64)
    with adapted.disabled() as model:
        want = model(x)
    assert torch.equal(adapted(x), want)


def test_gradients_are_divided_before_they_are_clipped():
    adapted, data = setting(start=0, ratio=2.0)
    train(adapted, data, optimizer := adapted.optimizer(sgd, 9), steps=1)
    optimizer.lifecycle.clip = 1e9
    optimizer.zero_grad()
    loss(adapted, data(1)[0]).backward()
    raw = torch.stack([p.grad.norm() for p in adapted.adapter.parameters()]).norm()
    optimizer.step()
    assert optimizer.lifecycle.norm == pytest.approx(float(raw) / 3)


def test_resume_before_at_and_after_it_starts(tmp_path):
    straight, data = setting()
    want = train(straight, data, straight.optimizer(adam, 8), steps=8)
    for at in (2, 3, 5):
        first, _ = setting()
        optimizer = first.optimizer(adam, 8)
        train(first, data, optimizer, steps=at)
        checkpoint.save(first, tmp_path / str(at), {"step": at}, optimizer)
        again, _ = setting()
        checkpoint.restore(again, tmp_path / str(at))
        optimizer = again.optimizer(adam, 8)
        optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / str(at))["step"]
        assert train(again, data, optimizer, start=at, steps=8) == want[at:]
        assert same(again.adapter.state_dict(), straight.adapter.state_dict())


def test_a_second_stage_goes_on():
    """The scale has grown once."""
    adapted, data = setting(start=1)
    for stage in (0, 1):
        adapted.begin(data, loss, index=stage)
        train(adapted, data, adapted.optimizer(sgd, 4), steps=4)
        adapted.end()
    assert {float(low.scale) for low in pairs(adapted).values()} == {24.0}
    assert adapted.adapter.counters() == {"steps_of_w": 7}


def test_the_checkpoint_holds_w(tmp_path):
    adapted, data = setting()
    train(adapted, data, adapted.optimizer(adam, 8), steps=8)
    perturb(adapted.adapter)
    x = torch.randn(5, 24, dtype=torch.float64)
    y = adapted.eval()(x)
    loaded = load(copy.deepcopy(adapted).detach(), adapted.save(tmp_path / "a"))
    assert torch.equal(loaded.eval()(x), y)
    adapted.merge()
    assert close(adapted(x), y)


@pytest.mark.parametrize("wrong", [{"ratio": 0.0}, {"ratio": -1.0}, {"start": -1}])
def test_values_without_meaning(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        setting(**wrong)
