"""Evaluating a posterior: its mean by default, or the mean prediction of several draws; how calibrated both are."""

import numpy as np
import pytest
import torch
from runs import configured, trainer

from lorafactory import UserError, record
from lorafactory.attach import seeded
from lorafactory.evaluate import predict, score
from lorafactory.run import run
from lorafactory.tasks import Task, metrics
from lorafactory.tasks.regression import Regression

SIZE = "variant.posterior.size=0.5"


def scored(t, seed=0):
    with seeded(seed):
        return score(t.adapted, t.task, "test", 7, t.accelerator)


def trained(folder, *overrides):
    t = trainer(folder, "variant=monteclora", SIZE, "train.lr=1e-2", *overrides)
    t.train()
    return t


def test_the_mean_is_evaluated_by_default(tmp_path):
    t = trained(tmp_path)
    found, raw = scored(t)
    assert raw == predict(t.adapted, t.task, "test", 7, t.accelerator) == scored(t, seed=1)[1]
    assert {"ece", "brier", "accuracy"} <= found.keys() and "spread" not in found
    assert found["brier"] == metrics.calibration(raw, t.task.references("test"))["brier"]


def test_draws_are_averaged_and_their_spread_is_told(tmp_path):
    t = trained(tmp_path, "variant.posterior.samples=3")
    found, raw = scored(t)
    assert found["samples"] == 3 and found["spread"] > 1e-4 and {"ece", "brier"} <= found.keys()
    assert (found, raw) == scored(t) and raw != scored(t, seed=1)[1]
    draws = []
    with seeded(0):
        for _ in range(3):
            with t.adapted.adapter.posterior.drawn():
                draws.append(predict(t.adapted, t.task, "test", 7, t.accelerator))
    mean = torch.tensor(draws, dtype=torch.float64).softmax(-1).mean(0)
    assert torch.allclose(torch.tensor(raw, dtype=torch.float64).softmax(-1), mean)
    with seeded(0):
        single = score(t.adapted, t.task, "test", 64, t.accelerator)
    assert np.allclose(single[1], raw, atol=1e-5)
    with t.adapted.disabled():
        assert "spread" not in scored(t)[0]


def test_another_variant_says_nothing_unless_asked(tmp_path):
    t = trainer(tmp_path, "variant=lora")
    assert not {"ece", "brier", "spread"} & scored(t)[0].keys()
    asked = trainer(tmp_path, "variant=lora", "task.metrics=[accuracy,ece]")
    assert "ece" in scored(asked)[0] and "brier" not in scored(asked)[0]
    with pytest.raises(UserError, match="brier.*smaller"):
        trainer(tmp_path, "task.metrics=[accuracy,brier]", "task.primary=brier")


def test_the_record_holds_them(tmp_path):
    config = configured("variant=monteclora", SIZE, "variant.posterior.samples=2", f"results.folder={tmp_path}")
    found = run(config).record
    for split in ("selection", "test"):
        assert found["metrics"][split]["samples"] == 2 and found["metrics"][split]["spread"] > 0
        assert 0 <= found["metrics"][split]["ece"] <= 1
    assert found["optimizer"]["method"]["drawn_steps"] == 8


def test_an_axis_that_is_not_chosen_leaves_an_id_as_it_was():
    settings = {"variant": {"name": "lora", "rank": 8}, "seed": 0}
    with_axis = {"variant": {"name": "lora", "rank": 8, "posterior": {"name": ""}}, "seed": 0}
    assert record.run_id(settings) == record.run_id(with_axis)
    chosen = {"variant": {"name": "lora", "rank": 8, "posterior": {"name": "monteclora", "samples": 0}}, "seed": 0}
    assert record.run_id(settings) != record.run_id(chosen)


def test_numbers_are_averaged_and_what_has_no_mean_is_refused():
    mean, spread = Regression.average(None, [[[1.0], [2.0]], [[3.0], [2.0]]])
    assert mean == [[2.0], [2.0]] and spread == 0.5
    with pytest.raises(UserError, match="samples=0"):
        Task.average(type("Texts", (), {"kind": "generation"}), [["a"], ["b"]])
