"""The loop: one big batch however it is cut, the same numbers again, and ends that say what they are."""

import json

import pytest
import torch
from runs import trainer

from lorafactory.errors import UserError
from lorafactory.evaluate import predict
from lorafactory.tasks.tokens import Rows
from lorafactory.train import Diverged


def trained(folder, *overrides, still=False):
    t = trainer(folder, *overrides)
    for m in t.adapted.modules():
        if still and isinstance(m, torch.nn.Dropout):
            m.p = 0.0  # the base's own
    t.train()
    return t, {n: p.detach().clone() for n, p in t.adapted.adapter.named_parameters()}


def apart(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(tmp_path):
    _, a = trained(tmp_path, "variant.dropout=0.3")
    _, b = trained(tmp_path, "variant.dropout=0.3")
    _, c = trained(tmp_path, "variant.dropout=0.3", "seed=1")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert apart(a, c) > 1e-4


@pytest.mark.parametrize("micro", [1, 3, 5])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_micro_batches_are_the_one_big_batch(tmp_path, micro, variant):
    """B33: also where the step's rows do not divide evenly, and in an epoch's short last batch."""
    options = (f"variant={variant}", "train.batch_size=16", "task.train_size=40", "train.optimizer=sgd", "train.lr=0.1")
    options += ("train.clip=0",)
    t, whole = trained(tmp_path, *options, still=True)
    assert [len(t.plan.batch(i)) for i in range(3)] == [16, 16, 8]
    cut, parts = trained(tmp_path, *options, f"train.micro_batch_size={micro}", still=True)
    assert apart(whole, parts) < 1e-6
    assert [r["loss"] for r in t.progress.curve] == pytest.approx([r["loss"] for r in cut.progress.curve], abs=1e-6)
    assert cut.lifecycle.index == 8  # optimiser steps, not micro-batches


def test_rows_of_like_length_share_a_micro_batch(tmp_path):
    t = trainer(tmp_path, "train.batch_size=16", "train.micro_batch_size=5")
    t.lengths = [(7 * i) % 23 for i in range(len(t.rows))]
    cut = t._micro_batches(1)
    assert [len(c) for c in cut] == [5, 5, 5, 1] and sorted(sum(cut, [])) == sorted(t.plan.batch(1))
    ordered = [t.lengths[i] for c in cut for i in c]
    assert ordered == sorted(ordered) != [t.lengths[i] for i in t.plan.batch(1)]


def test_clipping_bounds_the_step(tmp_path):
    options = ("train.optimizer=sgd", "train.lr=1.0", "train.warmup=0", "train.steps=1", "train.schedule=constant")
    start = {n: p.detach().clone() for n, p in trainer(tmp_path).adapted.adapter.named_parameters()}
    for clip in (0.01, 0.05):
        _, end = trained(tmp_path, *options, f"train.clip={clip}")
        moved = torch.sqrt(sum(((end[n] - start[n]) ** 2).sum() for n in start))
        assert float(moved) == pytest.approx(clip, rel=1e-3)


def test_head_lr_moves_only_the_head(tmp_path):
    _, a = trained(tmp_path, "train.steps=1", "train.optimizer=sgd", "train.clip=0")
    _, b = trained(tmp_path, "train.steps=1", "train.optimizer=sgd", "train.clip=0", "train.head_lr=0.1")
    for n in a:
        assert torch.equal(a[n], b[n]) != n.startswith("trained."), n


def test_weight_decay_spares_vectors(tmp_path):
    groups = trainer(tmp_path, "train.weight_decay=0.1").lifecycle.optimizer.param_groups
    assert all(g["weight_decay"] == (0.0 if p.dim() < 2 else 0.1) for g in groups for p in g["params"])


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    _, a = trained(tmp_path, "variant.dropout=0.2")
    t, b = trained(tmp_path, "variant.dropout=0.2", "train.gradient_checkpointing=true")
    assert apart(a, b) < 1e-6
    assert not t.adapted.model.is_gradient_checkpointing


def test_half_precision_trains(tmp_path):
    t, a = trained(tmp_path, "train.precision=bf16", "train.steps=20", "train.lr=3e-3")
    assert all(p.dtype == torch.float32 for p in a.values())
    losses = [r["loss"] for r in t.progress.curve]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    t = trainer(tmp_path, "train.lr=1e30", "train.clip=0", "train.optimizer=sgd")
    with pytest.raises(Diverged, match="at step"):
        t.train()


def test_a_layer_that_the_model_does_not_call_is_named(tmp_path):
    t = trainer(tmp_path)
    name, delta = next(iter(t.adapted.adapter.deltas.items()))
    delta.forward = lambda x, base: base(x)
    with pytest.raises(UserError, match=name.replace("/", ".")):
        t.train()


def test_patience_stops_and_best_is_kept(tmp_path):
    t = trainer(tmp_path, "train.steps=40", "train.eval_every=2", "train.patience=2", "train.keep=best", "train.lr=1e-9")
    t.train()
    assert t.progress.step == 6  # the first evaluation was never beaten: two more, and it stops
    assert t.progress.best["step"] == 2
    kept = json.loads((tmp_path / "best" / "adapter.json").read_text())
    assert kept["variant"] == "lora"


def test_best_is_the_adapter_of_the_best_evaluation(tmp_path):
    t = trainer(tmp_path, "train.steps=12", "train.eval_every=3", "train.keep=best", "train.lr=1e-2")
    t.train()
    scored = t.task.metrics(predict(t.adapted, t.task, "selection", 64, t.accelerator), t.task.references("selection"))
    assert scored["accuracy"] == max(e["selection"]["accuracy"] for e in t.progress.evaluations)


def test_rows_of_like_length_are_evaluated_together(tmp_path):
    t = trainer(tmp_path)
    ends = torch.tensor([3 + 4 * i % 9 for i in range(60)]).cumsum(0)
    columns = {n: torch.ones(int(ends[-1]), dtype=torch.int32) for n in ("input_ids", "attention_mask")}
    t.task.splits["test"] = Rows(columns, ends, labels=[0] * 60)
    seen, real = [], t.task.predict
    t.task.predict = lambda model, batch: seen.append(batch["attention_mask"].sum(1)) or real(model, batch)
    predict(t.adapted, t.task, "test", 7, t.accelerator)
    assert len(seen) > 2 and len({int(n) for lengths in seen for n in lengths}) > 1
    assert all(int(a.max()) <= int(b.min()) for a, b in zip(seen, seen[1:], strict=False))


def test_evaluation_keeps_order_and_mode_whatever_the_batch(tmp_path):
    t = trainer(tmp_path)
    t.adapted.train()
    whole = predict(t.adapted, t.task, "test", 1000, t.accelerator)
    parts = predict(t.adapted, t.task, "test", 7, t.accelerator)
    assert t.adapted.training
    assert len(whole) == len(t.task.splits["test"])
    assert torch.allclose(torch.tensor(whole), torch.tensor(parts), atol=1e-5)
