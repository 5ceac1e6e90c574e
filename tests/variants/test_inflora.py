import math

import pytest
import torch
from support import Net, Regression, adamw, attached, begun, close, perturb, train

from lorafactory import UserError, attach, checkpoint
from lorafactory.variants.inflora import new_directions

SMALL = {"batches": 4}
TARGETS = ["fc1", "fc2", "fc3"]


def setting(variant="inflora", rank=3, **continual):
    torch.manual_seed(0)
    base = Net()
    options = {"continual": {"batches": 4, **continual}} if "inflora" in variant else {}
    return attached(variant, base, Regression(base), rank=rank, target_modules=TARGETS, **options), base


def part(adapted):
    return adapted.adapter.parts["continual"]


def moments(adapted, data):
    """H of every layer, by hand."""
    found = {}
    hooks = [
        s.base.module.register_forward_hook(lambda m, args, y, n=s.name: found.setdefault(n, []).append(args[0]))
        for s in adapted.adapter.sites
    ]
    with torch.no_grad():
        for batch in data(4):
            adapted(batch["x"])
    for h in hooks:
        h.remove()
    rows = {n: torch.cat([x.flatten(0, -2) for x in xs]) for n, xs in found.items()}
    return {n: x.T @ x / len(x) for n, x in rows.items()}


def test_the_first_stage_reads_the_leading_directions_of_its_inputs():
    adapted, base = setting()
    for s, low, _ in part(adapted).pairs():
        u = torch.linalg.svd(moments(adapted, Regression(base))[s.name])[0][:, :3]
        assert close(low.A.T @ low.A, u @ u.T / 3, 50) and not low.B.any() and not low.A.requires_grad
    names = {n.rpartition(".")[2] for n, p in adapted.adapter.named_parameters() if p.requires_grad}
    assert names == {"B"}, "only B trains"
    before = {s.name: low.A.clone() for s, low, _ in part(adapted).pairs()}
    train(adapted, Regression(base), adapted.optimizer(adamw, 4), steps=4)
    assert all(torch.equal(low.A, before[s.name]) and low.B.any() for s, low, _ in part(adapted).pairs())


def test_later_stages_read_what_is_left():
    adapted, base = setting(threshold=0.8)
    for index in (0, 1):
        data = Regression(base, index + 1)
        if index:
            begun(adapted, data, index)
            for s, low, m in part(adapted).pairs():
                h = moments(adapted, data)[s.name]
                u = torch.linalg.svd(h - m.rows.T @ m.rows @ h)[0][:, :3]
                assert (low.A @ m.rows.T).abs().max() < 1e-5 and close(low.A.T @ low.A, u @ u.T / 3, 500)
        train(adapted, data, adapted.optimizer(adamw, 6), steps=6)
        kept = {s.name: len(m.rows) for s, _, m in part(adapted).pairs()}
        adapted.end()
        for s, _, m in part(adapted).pairs():
            assert close(m.rows @ m.rows.T, torch.eye(len(m.rows)), 5) and len(m.rows) >= kept[s.name] and len(m.rows)
    assert adapted.adapter.counters()["directions_kept"] == sum(len(m.rows) for _, _, m in part(adapted).pairs())


def test_a_stage_does_not_change_what_the_memory_holds():
    adapted, base = setting()
    train(adapted, Regression(base), adapted.optimizer(adamw, 6), steps=6)
    adapted.end()
    begun(adapted, Regression(base, 2), 1)
    train(adapted, Regression(base, 2), adapted.optimizer(adamw, 6), steps=6)
    for _, low, m in part(adapted).pairs():
        assert ((low.scale * low.B @ low.A) @ m.rows.T).abs().max() < 1e-5


def test_how_many_directions_by_hand():
    """Energies 64, 16, 4 of 84: 0.76, 0.95, 1."""
    h, none = torch.diag(torch.tensor([8.0, 4.0, 2.0])), torch.zeros(0, 3)
    eye = torch.eye(3, dtype=torch.float64)
    for share, first, later in ((0.5, 1, 1), (0.8, 1, 1), (0.96, 2, 2), (1.0, 2, 2)):
        assert len(new_directions(h, none, share)) == first, share
        assert len(new_directions(h, eye[:1], share)) == (0 if share < 0.76 else later)
    assert close(new_directions(h, eye[:1], 0.8).abs(), eye[1:2]) and len(new_directions(h, eye, 1.0)) == 0


def test_later_stages_hold_more_of_the_energy():
    adapted, base = setting(threshold=0.5, growth=0.4)
    train(adapted, Regression(base), adapted.optimizer(adamw, 2), steps=2)
    adapted.end()
    data = Regression(base, 2)
    begun(adapted, data, 1)
    train(adapted, data, adapted.optimizer(adamw, 2), steps=2)
    kept = {s.name: m.rows.clone() for s, _, m in part(adapted).pairs()}
    adapted.end()
    counts = {share: [len(new_directions(h, kept[n], share)) for n, h in moments(adapted, data).items()] for share in (0.5, 0.9)}
    assert [len(m.rows) - len(kept[s.name]) for s, _, m in part(adapted).pairs()] == counts[0.9] > counts[0.5]


def one_layer(x, memory=None):
    """A of rank 3 on one layer that reads the rows x, beside a memory."""
    adapted = attach(
        torch.nn.Sequential(torch.nn.Linear(x.shape[1], 4)), "inflora", rank=3, target_modules=["0"],
        batches=[{"x": x}], loss=lambda model, batch: model(batch["x"]).mean(),
    )  # fmt: skip
    ((_, low, m),) = part(adapted).pairs()
    if memory is not None:
        m.add(memory)
        adapted.begin([{"x": x}], lambda model, batch: model(batch["x"]).mean(), index=1)
    return low.A


def test_what_the_memory_holds_stays_out_however_much_of_it_there_is():
    torch.manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(1, 8), dim=1)
    a = one_layer(torch.randn(64, 8) + 1000 * torch.randn(64, 1) * v, v)
    assert (a @ v.T).abs().max() < 1e-6 < 0.5 < float(a.norm(dim=1).min()) * 3**0.5


def test_rows_are_zero_where_the_inputs_have_fewer_directions():
    a = one_layer(torch.tensor([[3.0, 4, 0, 0], [6, 8, 0, 0]]))
    assert close(a.abs(), torch.tensor([[0.6, 0.8, 0, 0], [0] * 4, [0] * 4]) / 3**0.5)


def test_rows_are_zero_where_no_direction_is_left():
    adapted, base = setting()
    for s, _, m in part(adapted).pairs():
        m.add(torch.eye(s.d_in)[: s.d_in - 1])
    x = torch.randn(3, 24)
    begun(adapted, Regression(base, 2), 1)
    for _, low, m in part(adapted).pairs():
        assert (low.A @ m.rows.T).abs().max() < 1e-6
        assert int((low.A.norm(dim=1) > 1e-3).sum()) == 1 and low.A.norm() == pytest.approx(1 / math.sqrt(3), rel=1e-4)
    assert adapted(x).isfinite().all()


def test_resume_between_stages_and_in_one(tmp_path):
    def life(cut):
        adapted, base = setting(threshold=0.8)
        data = [Regression(base, i + 1) for i in range(2)]
        train(adapted, data[0], adapted.optimizer(adamw, 4), steps=4)
        adapted.end()
        if cut == "between":
            checkpoint.save(adapted, tmp_path / cut)
            adapted = setting(threshold=0.8)[0]
            checkpoint.restore(adapted, tmp_path / cut)
        begun(adapted, data[1], 1)
        optimizer = adapted.optimizer(adamw, 4)
        losses = train(adapted, data[1], optimizer, steps=2)
        if cut == "within":
            checkpoint.save(adapted, tmp_path / cut, {"step": 2}, optimizer)
            adapted = setting(threshold=0.8)[0]
            checkpoint.restore(adapted, tmp_path / cut)
            begun(adapted, data[1], 1)
            optimizer = adapted.optimizer(adamw, 4)
            optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, tmp_path / cut)["step"]
        losses += train(adapted, data[1], optimizer, start=2, steps=4)
        adapted.end()
        return losses, [m.rows.tolist() for _, _, m in part(adapted).pairs()]

    assert life("between") == life("") == life("within")


def test_a_damaged_memory_is_refused():
    adapted, base = setting()
    train(adapted, Regression(base), adapted.optimizer(adamw, 2), steps=2)
    adapted.end()
    perturb(adapted.adapter)
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    state["parts.continual.memories.0.rows"][0] *= 2
    with pytest.raises(UserError, match="orthonormal"):
        setting()[0].adapter.load(state)


def test_values_without_meaning():
    for wrong in ({"threshold": 1.5}, {"growth": -0.1}, {"batches": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            setting(**wrong)
    for other, word in (("pissa", "init"), ("lora_pro", "A is frozen")):
        with pytest.raises(UserError, match=word):
            setting(f"inflora+{other}")
