"""A number for a text: what is learned, how it is split and scored, and what is refused."""

import numpy as np
import pytest
import torch
from samples import loaded, make, refused, tiny_config, write_csv
from scipy import stats

from lorafactory.tasks import metrics

WORDS = ("bad", "poor", "fair", "good", "great")


def source(folder, label=float, size=200):
    rng = np.random.default_rng(0)
    for split, rows in (("train", size), ("test", 60)):
        scores = rng.integers(0, 5, rows)
        write_csv(folder / f"{split}.csv", [(f"{WORDS[s]} film {i}", label(s + 0.25)) for i, s in enumerate(scores)])
    return str(folder)


def test_targets_keep_their_values_and_parts_their_shares(tmp_path):
    task = loaded("regression", source=source(tmp_path), selection_share=0.2)
    about = task.describe()
    assert about["sizes"] == {"train": 160, "selection": 40, "test": 60}
    assert about["range"]["train"] == [0.25, 4.25] and "majority" not in about and "labels" not in about
    for value in set(task.targets["train"]):
        counts = [task.targets[s].count(value) for s in ("train", "selection")]
        assert abs(counts[0] / 160 - counts[1] / 40) < 0.03
    assert task.fingerprint == loaded("regression", source=str(tmp_path), selection_share=0.2).fingerprint


def test_the_loss_is_the_sum_of_squares(tmp_path):
    task = loaded("regression", source=source(tmp_path))
    batch = {"labels": torch.tensor([1.0, 2.5]), "input_ids": torch.zeros(2, 3, dtype=torch.long)}

    class Model(torch.nn.Module):
        def forward(self, **given):
            assert "labels" not in given
            return type("Out", (), {"logits": torch.tensor([[0.0], [3.0]], dtype=torch.bfloat16)})

    assert float(task.loss(Model(), batch)) == pytest.approx(1.25) and task.size(batch) == 2
    assert task.predict(Model(), batch) == [[0.0], [3.0]]
    assert task.head()["num_labels"] == 1


def test_a_run_learns_and_its_predictions_give_the_metric_again(tmp_path):
    from lorafactory import config, record, registry, run, tasks

    task = tasks.get_task("regression").Config(kind="regression", name="films", source=source(tmp_path / "data"))
    train = config.TrainConfig(lr=1e-2, steps=150, batch_size=16)
    made = config.RunConfig(
        model=tiny_config(),
        task=task,
        variant=registry.config("lora"),
        train=train,
        results=config.ResultsConfig(folder=str(tmp_path / "results")),
    )
    outcome = run.run(made)
    found = outcome.record["metrics"]["test"]
    assert outcome.record["metrics"]["primary"] == "pearson" and found["pearson"] > 0.5
    raw = record.read_predictions(outcome.path)["test"]
    true = make("regression", source=task.source)
    true.load()
    assert stats.pearsonr(np.array(raw)[:, 0], true.targets["test"]).statistic == pytest.approx(found["pearson"])
    assert metrics.regress(["spearman"], raw, true.targets["test"])["spearman"] == pytest.approx(found["spearman"])


WRONG = [
    (lambda s: f"s{s}", "'s"),
    (lambda s: "inf" if s > 1 else s, "inf"),
    (lambda s: "" if s > 1 else s, "None"),
]


@pytest.mark.parametrize("label, told", WRONG)
def test_what_is_no_number_is_named_by_its_row(tmp_path, label, told):
    refused(make("regression", source=source(tmp_path, label)).load, "row", told, "not a number")


def test_class_options_are_refused(tmp_path):
    refused(lambda: make("regression", source="x", labels=["a", "b"]), "task.labels", "no classes")
    refused(lambda: make("regression", source="x", metrics=["accuracy"], primary="accuracy"), "accuracy", "pearson")
    refused(lambda: make("text", source="x", metrics=["pearson"], primary="pearson"), "pearson", "accuracy")
