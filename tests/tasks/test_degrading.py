"""Degraded training pictures: a random subset in a random order, the same again, and never what is scored."""

import collections

import numpy as np
import pytest
from images import folders, picture, save_vit
from samples import loaded, make

from lorafactory import models
from lorafactory.tasks import degrading


def array(image):
    return np.asarray(image).astype(float)


@pytest.mark.parametrize("by", degrading.ALL)
@pytest.mark.parametrize("size", [(40, 32), (9, 21)])
def test_each_degradation_changes_the_picture_and_keeps_its_size(by, size):
    x = array(picture("red", 1, size)) / 255
    found = np.clip(by(x, np.random.default_rng(3)), 0, 1)
    assert found.shape == x.shape and np.isfinite(found).all() and np.abs(found - x).max() > 0.02


def test_what_they_do():
    x = np.random.default_rng(0).random((64, 64, 3))

    def edges(a):
        return np.abs(np.diff(a, axis=1)).mean()

    def by(f):
        return np.clip(f(x, np.random.default_rng(5)), 0, 1)

    assert edges(by(degrading.blur)) < 0.5 * edges(x)
    assert by(degrading.dark).mean() < x.mean() < by(degrading.haze).mean() and by(degrading.haze).std() < 0.9 * x.std()
    assert (by(degrading.rain) >= x - 1e-9).all()
    assert 0.01 < np.abs(by(degrading.noise) - x).mean() < 0.3


def test_subsets_and_orders_are_random_and_the_seed_settles_them():
    drawn = [tuple(f.__name__ for f in degrading.chosen(np.random.default_rng(i))) for i in range(2000)]
    assert all(len(set(d)) == len(d) >= 1 for d in drawn)
    assert {len(d) for d in drawn} == set(range(1, 7))
    assert len({d for d in drawn if len(d) == 2}) == 30, "every ordered pair occurs"
    first = collections.Counter(d[0] for d in drawn)
    assert min(first.values()) > 250
    image = picture("green", 2, (20, 24))
    same = [array(degrading.degrade(image, 7)) for _ in range(2)]
    assert (same[0] == same[1]).all() and (array(degrading.degrade(image, 8)) != same[0]).any()


def test_the_order_matters():
    x = array(picture("blue", 1, (32, 32))) / 255
    rng = np.random.default_rng
    one = degrading.blur(np.clip(degrading.rain(x, rng(1)), 0, 1), rng(2))
    other = np.clip(degrading.rain(degrading.blur(x, rng(2)), rng(1)), 0, 1)
    assert np.abs(one - other).max() > 0.1


def test_training_pictures_alone_are_degraded(tmp_path):
    for split, n in (("train", 18), ("test", 6)):
        folders(tmp_path / "data", split, n)
    source, vit = str(tmp_path / "data"), save_vit(tmp_path / "vit")
    clean, degraded = (loaded("image", source=source, selection_size=6, degraded=d) for d in (False, True))
    processor = models.load(models.ModelConfig(source=vit), clean).processor
    for task in (clean, degraded):
        task.prepare(processor)

    def values(task, split):
        return np.stack([r["pixel_values"] for r in task.splits[split]])

    for split in ("selection", "test"):
        assert (values(clean, split) == values(degraded, split)).all()
    differ = [(a != b).any() for a, b in zip(values(clean, "train"), values(degraded, "train"), strict=True)]
    assert all(differ)
    again = loaded("image", source=source, selection_size=6, degraded=True)
    again.prepare(processor)
    assert (values(again, "train") == values(degraded, "train")).all()
    assert clean.fingerprint != degraded.fingerprint == again.fingerprint
    other = make("image", source=source, selection_size=6, degraded=True, split_seed=1)
    other.load()
    assert other.fingerprint != degraded.fingerprint


def test_a_degraded_copy_of_a_scored_picture_is_still_a_duplicate(tmp_path):
    for split, n in (("train", 9), ("test", 3)):
        folders(tmp_path, split, n)
    (tmp_path / "test" / "red" / "again.png").write_bytes((tmp_path / "train" / "red" / "000.png").read_bytes())
    task = loaded("image", source=str(tmp_path), selection_size=3, degraded=True)
    clean = loaded("image", source=str(tmp_path), selection_size=3)
    assert task.describe()["duplicates"] == clean.describe()["duplicates"] and sum(task.describe()["duplicates"].values()) == 1
