"""The contract over every registered name and every legal composite: one test lives a composite's whole life."""

import life
import pytest
from composites import cases


@pytest.mark.parametrize("spelling", cases())
def test_life(spelling, tmp_path):
    bad = life.training(spelling, tmp_path) + life.surroundings(spelling) + life.numbers(spelling)
    assert not bad, "\n".join(bad)
