"""GLUE: real data in the hub's layout, hidden test labels (B56), and no hub."""

import time

import pytest
from samples import loaded, make, refused

PRESETS = {
    "cola": {"labels": ["unacceptable", "acceptable"], "metrics": ["matthews", "accuracy"], "primary": "matthews"},
    "sst2": {"labels": ["negative", "positive"]},
    "mrpc": {
        "labels": ["not_equivalent", "equivalent"],
        "text": ["sentence1", "sentence2"],
        "metrics": ["accuracy", "f1"],
    },
}
VALIDATION = {"cola": 1043, "sst2": 872, "mrpc": 408}


@pytest.mark.parametrize("subset", PRESETS)
def test_real_data(data, subset):
    task = loaded("glue", source=str(data / "glue"), subset=subset, **PRESETS[subset])
    about = task.describe()
    assert about["sizes"]["test"] == VALIDATION[subset] and about["splits"]["selection"] == "train"
    assert about["labels"] == PRESETS[subset]["labels"] and len(task.texts["test"][0]) == len(task.config.text)
    if subset == "cola":
        assert about["majority"]["matthews"] is None and about["majority"]["accuracy"] == pytest.approx(719 / 1043)
    if subset == "mrpc":
        assert about["majority"]["f1"] == pytest.approx(2 * 267 / (267 + 408))


def test_a_labelled_test_split_can_be_chosen(data):
    task = loaded("glue", source=str(data / "glue"), subset="mrpc", test_split="test", **PRESETS["mrpc"])
    assert task.describe()["sizes"]["test"] == 1725


def hub_layout(folder, subset, test_label):
    """The hub repository's folder without its README; real class names in the files, as there."""
    import datasets

    names = PRESETS[subset]["labels"]
    text = PRESETS[subset].get("text", ["sentence"])
    kinds = {**{t: datasets.Value("string") for t in text}, "label": datasets.ClassLabel(names=names)}
    for split, size in (("train", 40), ("validation", 10), ("test", 10)):
        labels = [test_label if split == "test" else i % 2 for i in range(size)]
        rows = [{**{t: f"{split} {i}" for t in text}, "label": n} for i, n in enumerate(labels)]
        made = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
        made.to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("subset", PRESETS)
def test_hidden_test_labels_are_refused_with_a_pointer(tmp_path, subset):
    hub_layout(tmp_path, subset, -1)
    options = {"source": str(tmp_path), "subset": subset, **PRESETS[subset]}
    assert loaded("glue", **options).describe()["sizes"] == {"train": 36, "selection": 4, "test": 10}
    refused(make("glue", **options, test_split="test").load, "test row 0", "-1", "task.test_split=validation")


def test_the_hubs_class_order_must_be_the_presets(tmp_path):
    hub_layout(tmp_path, "cola", -1)
    options = {**PRESETS["cola"], "labels": ["acceptable", "unacceptable"]}
    refused(make("glue", source=str(tmp_path), subset="cola", **options).load, "its own", "task.labels")


def test_without_a_hub_it_fails_at_once_and_says_what_would_serve(monkeypatch):
    from lorafactory import sources

    monkeypatch.setattr(sources, "_reachable", lambda endpoint: False)
    start = time.time()
    refused(make("glue", subset="cola").load, "task.source=nyu-mll/glue", "train.csv")
    assert time.time() - start < 3
