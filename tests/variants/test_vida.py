from types import SimpleNamespace

import pytest
import torch
from runs import configured
from support import Net, Regression, adamw, attached, close, perturb

from lorafactory import UserError, attach, evaluate, record, run, train
from lorafactory.variants.vida import ViDA, ViDADelta, changed

SMALL = {"high": 4}


def setting(**options):
    torch.manual_seed(0)
    base = Net()
    return attached("vida", base, Regression(base), **{"high": 4, "target_modules": ["fc1", "fc2", "fc3"], **options})


def deltas(adapted):
    return [d for _, d in adapted.adapter.inside(ViDADelta)]


class Tiny(torch.nn.Module):
    """A classifier of pictures [n, 3, 4, 4] that says what its mode is."""

    def __init__(self):
        super().__init__()
        self.fc1, self.head = torch.nn.Linear(48, 12), torch.nn.Linear(12, 5)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.head(torch.tanh(self.fc1(pixel_values.flatten(1)))))


def online(**options):
    torch.manual_seed(1)
    adapted = attach(Tiny(), "vida", **{"high": 4, **options})
    perturb(adapted.adapter, 0.5)
    x = torch.randn(6, 3, 4, 4)
    adapted.train().begin([{"pixel_values": x}], lambda model, batch: model(**batch).logits.sum(), index=1)
    part = adapted.adapter.structure
    return adapted, part, deltas(adapted)[0], x


def outcome(options):
    """Four steps without labels, on pictures."""
    adapted, part, d, x = online(**options)
    optimizer = adapted.optimizer(adamw, 4)
    for i in range(4):
        torch.manual_seed(i)
        batch = {"pixel_values": x}
        adapted.adapter.before_forward(batch)
        logits = adapted(pixel_values=x).logits
        optimizer.zero_grad()
        (-batch["teacher"].softmax(-1) * logits.log_softmax(-1)).sum().backward()
        optimizer.step()
    return (str({n: t.tolist() for n, t in adapted.adapter.state_dict().items()}),)


def test_the_update_with_and_without_weights():
    adapted = setting()
    perturb(adapted.adapter, 0.5)
    for s, d in adapted.adapter.inside(ViDADelta):
        low, high = d.U_low @ d.D_low, d.U_high @ d.D_high
        assert close(d.weight(s.base) - s.base.weight, low + high, 3), "a LoRA of both ranks, while lam is 1"
        with torch.no_grad():
            d.lam.copy_(torch.tensor([0.7, 1.3]))
        assert close(d.weight(s.base) - s.base.weight, 0.7 * low + 1.3 * high, 3)
    fresh = setting(high=16)
    for d in deltas(fresh):
        assert not d.U_low.any() and not d.U_high.any() and float(d.D_high.std()) == pytest.approx(1 / 256, rel=0.2)


def test_the_count():
    """(r1 + r2)(d_in + d_out): 129 * (3072 + 1536) a block of ViT-B; here 5 (64 + 64 + 48)."""
    assert setting().cost()["adapter_parameters"] == 5 * (64 + 64 + 48)


def test_doubt_weighs_the_branches():
    _, part, d, _ = online()
    part.weigh(torch.tensor(0.3))
    assert close(d.lam, torch.tensor([0.7, 1.3]))
    part.weigh(torch.tensor(0.1))
    assert close(d.lam, torch.tensor([1.1, 0.9])) and float(d.lam.sum()) == pytest.approx(2)
    assert part.high == 1


def test_a_step_without_labels():
    """The teacher gives the targets and follows the student; it answers in evaluation; modes come back."""
    adapted, part, d, x = online(ema=0.9, restore=0.0, views=3)
    start = {n: t.clone() for n, t in d.named_parameters()}
    batch = {"pixel_values": x}
    part.before_forward(batch)
    assert adapted.training and not d.teaching and batch["teacher"].shape == (6, 5)
    assert close(batch["teacher"], adapted.model(x).logits.detach()), "student and teacher start alike"
    with torch.no_grad():
        for p in d.parameters():
            p.add_(1.0)
    adapted.adapter.after_step(None)
    for n, t in start.items():
        assert close(getattr(d, f"teacher_{n}"), t + 0.1) and close(getattr(d, f"source_{n}"), t)
    student = adapted.model(x).logits
    teacher = adapted.eval().model(x).logits
    assert not close(student, teacher)
    with torch.no_grad():
        for n, t in d.named_parameters():
            t.copy_(getattr(d, f"teacher_{n}"))
    assert close(adapted.train().model(x).logits, teacher)
    assert adapted.adapter.counters()["adapted_steps"] == 1


def test_what_is_restored_is_the_source():
    adapted, _, d, _ = online(ema=0.0, restore=0.5)
    with torch.no_grad():
        d.D_high.add_(1.0)
    torch.manual_seed(0)
    adapted.adapter.after_step(None)
    assert torch.equal(d.teacher_D_high, d.source_D_high + 1.0), "ema 0: the teacher is the student of before"
    back = d.D_high == d.source_D_high
    assert 0.3 < back.float().mean() < 0.7 and close(d.D_high[~back], d.source_D_high[~back] + 1)


def test_views_are_random_and_keep_the_shape():
    x = torch.randn(4, 3, 8, 8)
    one, other = changed(x, True), changed(x, True)
    assert one.shape == x.shape and not torch.equal(one, other) and one.isfinite().all()


STAGES = ", ".join(
    f"{{task: digits, train_size: 64, selection_size: 20, test_size: 48{more}}}"
    for more in ("", ', corruption: "gaussian_noise:3"', ', corruption: "contrast:4"')
)
RUN = ["model=vit_mnist", "task=sequence", f"task.stages=[{STAGES}]", "task.heads=shared", "task.unlabelled=[1,2]",
       "train.steps=0", "train.epochs=1", "train.batch_size=16", "train.lr=1e-2"]  # fmt: skip


@pytest.mark.parametrize("variant", ["vida", "lora"])
def test_a_sequence_with_stages_without_labels(variant, tmp_path):
    """LoRA minimises its own entropy there."""
    options = [*RUN, f"variant={variant}", f"results.folder={tmp_path}"]
    options += ["variant.high=4", "variant.views=2", "variant.threshold=0"] if variant == "vida" else []
    path, made = (done := run.run(configured(*options))).path, done.record
    assert len(made["metrics"]["test"]["matrix"]) == 3 and made["optimizer"]["steps"] == 4 + 3 + 3
    assert all(r["loss"] >= 0 for r in made["curve"] if r["stage"])
    scales = {g["lr_scale"] for g in made["optimizer"]["groups"]}
    assert scales == ({0.01} if variant == "vida" else {1.0})
    trained = sum(g["parameters"] for g in made["optimizer"]["groups"])
    assert trained == made["cost"]["adapter_parameters"], "the head stays as it is"
    found, answers = made["metrics"]["test"], record.read_predictions(path)["online"]
    assert [len(a) for a in answers] == [0, 48, 48] and sorted(i for i, _ in answers[1]) == list(range(48))
    assert found["online"][0] is None and found["online_average"] == pytest.approx(sum(found["online"][1:]) / 2)
    assert found["source_average"] == pytest.approx(sum(found["matrix"][0][1:]) / 2)
    if variant == "vida":
        assert made["optimizer"]["method"] == {"adapted_steps": 6.0, "high_domain_steps": 6.0}


def test_no_row_is_learnt_from_before_it_is_answered(tmp_path, monkeypatch):
    """The answers to a batch are those of the model before the step, the lam of the batch left out."""
    options = ["variant=vida", "variant.high=4", "variant.views=2", "variant.ema=0.5", "variant.rate=1.0"]
    step, moved = train.Trainer._step, []

    def watched(self, index):
        if not self.task.online:
            return step(self, index)
        rows, known = self.plan.batch(index), len(self.progress.answers)

        def now():
            batch = self.task.collate([self.rows[i] for i in rows])
            return torch.tensor(evaluate.answer(self.adapted, self.task, batch, self.accelerator))

        before, found, after = now(), step(self, index), now()
        told = self.progress.answers[known:]
        assert [i for i, _ in told] == rows and torch.equal(torch.tensor([a for _, a in told]), before)
        moved.append(not torch.equal(before, after))
        return found

    monkeypatch.setattr(train.Trainer, "_step", watched)
    monkeypatch.setattr(ViDA, "weigh", lambda self, doubt: None)
    run.run(configured(*RUN, *options, f"results.folder={tmp_path}"))
    assert moved == [True] * 6


def test_what_does_not_move_is_scored_online_as_before_the_stage(tmp_path):
    stages = STAGES.replace('"gaussian_noise:3"', '"contrast:4"')
    options = ["variant=lora", "train.steps=4", "train.micro_batch_size=5", "train.lr=1e-12", f"task.stages=[{stages}]"]
    found = run.run(configured(*RUN, *options, f"results.folder={tmp_path}")).record["metrics"]["test"]
    assert found["online"] == [None, *found["before"][1:]] and found["online_average"] == found["source_average"]


def test_values_without_meaning():
    for wrong in ({"low": 0}, {"views": 1}, {"threshold": -0.1}, {"ema": 1.0}, {"restore": 1.5}, {"rate": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            setting(**wrong)
    for unlabelled in ("[0]", "[3]"):
        with pytest.raises(UserError, match="unlabelled"):
            configured(*RUN[:-1], f"task.unlabelled={unlabelled}")
