"""The hooks that an optimiser's step runs: their order, what they see, and parameters that are replaced while training."""

import copy

import pytest
import torch
from support import Net, Regression, adamw, attached, begun, cloned, loss, same, train

from lorafactory import Adapted, Part, checkpoint, registry


@pytest.fixture
def recorder():
    """A part that notes its hooks, drops a rank of every pair in step 2, and halves the rate of odd steps."""

    @registry.register("test_recorder")
    class _Recorder(Part):
        """Recorder: drops a rank"""

        axis, needs, paper = "budget", frozenset({"low_rank"}), "none"

        def attach(self):
            self.__dict__["notes"] = []

        def rate(self, step):
            return 0.5 if step.index % 2 else 1.0

        def before_step(self, step):
            pairs = [low for _, low in self.adapter.low_ranks()]
            self.notes.append(("before", step.index, step.total, sum(float(low.B.grad.norm()) for low in pairs)))

        def after_step(self, step):
            self.notes.append(("after", step.index, step.total, [g["lr"] for g in step.optimizer.param_groups]))
            if step.index == 2:
                for _, low in self.adapter.low_ranks():
                    low.keep(torch.arange(low.rank - 1))
                step.rebuild_optimizer()

    yield "test_recorder"
    del registry._classes["test_recorder"]


def setting(spelling):
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    return base, data, attached(spelling, base, data)


def test_hooks_run_once_a_step_and_in_order(recorder):
    _, data, adapted = setting(recorder)
    optimizer = adapted.optimizer(adamw, 4)
    optimizer.lifecycle.clip = 1e-9
    train(adapted, data, optimizer, steps=4)
    notes = adapted.adapter.parts["budget"].notes
    assert [(n[0], n[1], n[2]) for n in notes] == [(w, i, 4) for i in range(4) for w in ("before", "after")]
    assert all(n[3] > 1e-6 for n in notes if n[0] == "before"), "a part sees the gradient before it is clipped"
    assert optimizer.lifecycle.norm > 1e-6


def test_the_rate_is_multiplied_and_put_back(recorder):
    """So that a scheduler, which reads the rate of a group, never compounds it."""
    _, data, adapted = setting(f"{recorder}+lora_plus")
    optimizer = adapted.optimizer(lambda groups: torch.optim.SGD(groups, lr=0.1), 4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
    scales = [g["lr_scale"] for g in optimizer.param_groups]
    assert len(set(scales)) == 2
    for i in range(2):
        before = cloned(dict(adapted.adapter.named_parameters()))
        task = loss(adapted, data(1)[0])
        optimizer.zero_grad()
        task.backward()
        grads = {n: p.grad.clone() for n, p in adapted.adapter.named_parameters()}
        optimizer.step()
        factor = 0.1 / (1 + i) * (0.5 if i % 2 else 1.0)
        for n, p in adapted.adapter.named_parameters():
            scale = adapted.adapter.config.dynamics.ratio if n.endswith(".B") else 1.0
            assert torch.allclose(p, before[n] - factor * scale * grads[n], atol=1e-7), n
        scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 / 3 * s for s in scales])


def test_a_loss_that_the_loop_tells_reaches_the_parts_of_that_step(recorder):
    _, data, adapted = setting(recorder)
    optimizer, seen = adapted.optimizer(adamw, 2), []
    adapted.adapter.parts["budget"].rate = lambda step: seen.append(step.loss) or 1.0
    for told in (0.5, None):
        if told:
            optimizer.lifecycle.loss = told
        loss(adapted, data(1)[0]).backward()
        optimizer.step()
    assert seen == [0.5, None], "and it is of no other step"


@pytest.mark.parametrize("over", ["", "+lora_plus", "+lora_pro"])
def test_replaced_parameters_are_trained_and_the_old_ones_forgotten(recorder, over, tmp_path):
    base, data, adapted = setting(recorder + over)
    optimizer = adapted.optimizer(adamw, 8)
    scales = sorted({g["lr_scale"] for g in optimizer.param_groups})
    kept = [p for p in adapted.adapter.parameters()]
    losses = train(adapted, data, optimizer, steps=5)
    now = [p for p in adapted.adapter.parameters()]
    assert not any(p is q for p in kept for q in now), "keep() makes new parameters"
    owned = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(owned) == len(now) and set(owned) == set(now)
    assert optimizer.state and set(optimizer.state) <= set(now), "the state of what is gone is kept"
    assert sorted({g["lr_scale"] for g in optimizer.param_groups}) == scales
    assert all(low.rank == 3 for _, low in adapted.adapter.low_ranks())
    checkpoint.save(adapted, tmp_path / "a", {"step": 5}, optimizer)
    before = cloned(adapted.adapter.state_dict())
    losses += train(adapted, data, optimizer, steps=8, start=5)
    assert not same(adapted.adapter.state_dict(), before)

    again = Adapted(copy.deepcopy(base), adapted.adapter.config, seed=9)
    checkpoint.restore(again, tmp_path / "a")
    begun(again, data)
    other = again.optimizer(adamw, 8)
    other.lifecycle.index = checkpoint.restore_optimizer(other, tmp_path / "a")["step"]
    assert train(again, data, other, steps=8, start=5) == losses[5:]
    assert same(again.adapter.state_dict(), adapted.adapter.state_dict())


def test_state_moves_with_the_ranks_that_are_kept():
    """Moments follow by index, the count of steps stays; what grew starts afresh, and so does what was not moved."""
    _, data, adapted = setting("lora")
    optimizer = adapted.optimizer(adamw, 8)
    train(adapted, data, optimizer, steps=3)
    first, second, third, _ = (low for _, low in adapted.adapter.low_ranks())
    before = {n: {k: t.clone() for k, t in optimizer.state[getattr(first, n)].items()} for n in "AB"}
    index = torch.tensor([3, 1])
    moved = first.keep(index)
    second.keep(index)
    third.grow(2)
    optimizer.lifecycle.rebuild(moved)
    for name, dim in (("A", 0), ("B", 1)):
        state = optimizer.state[getattr(first, name)]
        assert float(state["step"]) == 3
        for k in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[k], before[name][k].index_select(dim, index)) and state[k].any()
        assert not {getattr(second, name), getattr(third, name)} & set(optimizer.state)
    assert (first.rank, second.rank, third.rank) == (2, 2, 6)
    losses = train(adapted, data, optimizer, steps=8, start=3)
    assert losses[-1] < losses[0]


def test_an_optimiser_that_calls_its_parents_step_runs_the_hooks_once(recorder):
    class Child(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    _, data, adapted = setting(recorder)
    optimizer = adapted.optimizer(lambda groups: Child(groups, lr=1e-3), 2)
    train(adapted, data, optimizer, steps=2)
    assert len(adapted.adapter.parts["budget"].notes) == 4 and optimizer.lifecycle.index == 2


def test_groups_follow_the_parts_and_vectors_are_not_decayed():
    _, _, adapted = setting("dora+lora_plus")
    optimizer = adapted.optimizer(
        lambda groups: torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1), 2, head={"lr_scale": 3.0}
    )
    found = {p: (g["lr_scale"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    ratio = adapted.adapter.config.dynamics.ratio
    for n, p in adapted.adapter.named_parameters():
        want = {"A": (1.0, 0.1, 1.0), "B": (ratio, 0.1, ratio), "magnitude": (1.0, 0.0, 1.0)}[n.rpartition(".")[2]]
        assert found[p] == want, n
    _, _, adapted = setting("head_only")
    optimizer = adapted.optimizer(
        lambda groups: torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1), 2, head={"lr_scale": 3.0}
    )
    found = {p: (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert [found[p] for p in adapted.adapter.heads()] == [(3.0, 0.1), (3.0, 0.0)]
