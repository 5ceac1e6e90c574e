"""Rows and rates are functions of (seed, step)."""

import pytest

from lorafactory.config import TrainConfig
from lorafactory.errors import UserError
from lorafactory.plan import Plan, mix


def test_an_epoch_holds_every_row_once_and_its_last_batch_what_is_left():
    plan = Plan(10, TrainConfig(batch_size=4, epochs=2), seed=3)
    assert plan.total == 6
    for epoch in (0, 3):
        batches = [plan.batch(epoch + i) for i in range(3)]
        assert [len(b) for b in batches] == [4, 4, 2]
        assert sorted(sum(batches, [])) == list(range(10))
    assert plan.batch(0) != plan.batch(3)
    assert plan.batch(4) == Plan(10, TrainConfig(batch_size=4, epochs=2), seed=3).batch(4)
    assert plan.batch(0) != Plan(10, TrainConfig(batch_size=4), seed=4).batch(0)


def test_steps_overrule_epochs():
    assert Plan(10, TrainConfig(batch_size=4, steps=7), seed=0).total == 7


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 0.875, 0.125]),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.9619397, 0.0380602]),
    ],
)
def test_rates_warm_up_and_fall(schedule, rates):
    plan = Plan(100, TrainConfig(steps=10, warmup=0.2, schedule=schedule), seed=0)
    assert [plan.rate(i) for i in (0, 1, 2, 3, 9)] == pytest.approx(rates)


def test_no_rows_is_a_mistake():
    with pytest.raises(UserError, match="training split is empty"):
        Plan(0, TrainConfig(), 0)


def test_neighbouring_seeds_are_unrelated():
    assert len({mix(a, b) for a in range(30) for b in range(30)}) == 900
    assert mix(1, 2) != mix(2, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.0}, "train.lr is 0.0"),
        ({"optimizer": "adam"}, "adamw, sgd"),
        ({"precision": "fp8"}, "no, bf16, fp16"),
        ({"warmup": 1.0}, "train.warmup is 1.0"),
        ({"patience": 2}, "set train.eval_every"),
        ({"keep": "best"}, "set train.eval_every"),
        ({"batch_size": 0}, "must be positive"),
        ({"clip": -1.0}, "must not be negative"),
    ],
)
def test_an_option_without_meaning_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        TrainConfig(**options)
