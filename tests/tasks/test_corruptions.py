"""Pictures corrupted on the fly: the same each time, worse with strength, and another data set than the clean one."""

import numpy as np
import pytest
from samples import loaded, make, refused

from lorafactory.tasks import corruptions


def values(task, count=40):
    return np.stack([np.asarray(p.rgb()) for p in task.inputs["test"][:count]]).astype(float)


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_each_kind_is_repeatable_and_worse_with_strength(kind):
    clean = values(loaded("digits"))
    weak, strong = ("rotate:10", "rotate:90") if kind == "rotate" else (f"{kind}:1", f"{kind}:5")
    once, again, worse = (values(loaded("digits", corruption=c)) for c in (weak, weak, strong))
    assert np.array_equal(once, again) and once.shape == clean.shape
    assert 0 < np.abs(once - clean).mean() < np.abs(worse - clean).mean()


def test_a_quarter_turn_is_one():
    clean, turned = values(loaded("digits")), values(loaded("digits", corruption="rotate:90"))
    assert np.array_equal(turned, np.rot90(clean, axes=(1, 2)))


def test_it_is_another_data_set_of_the_same_rows():
    clean, blurred = loaded("digits"), loaded("digits", corruption="blur:2")
    assert clean.targets == blurred.targets and clean.fingerprint != blurred.fingerprint
    places = [[p.place for p in t.inputs["test"]] for t in (clean, blurred)]
    assert places[0] == places[1] and clean.inputs["test"][0] != blurred.inputs["test"][0]


def test_wrong_ones_are_refused():
    refused(lambda: make("digits", corruption="blurr:2"), "blurr", "blur")
    for wrong in ("blur", "blur:0", "blur:6", "blur:x", "rotate:400"):
        refused(lambda w=wrong: make("digits", corruption=w), wrong, "from")
