"""Every legal composite, smallest first, and which of them `make test` runs."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest

from lorafactory import UserError, registry

TRIPLES = 24  # of the larger ones, in `make test`


@cache
def legal(spelling: str) -> bool:
    try:
        registry.config(spelling)
        return True
    except UserError:
        return False


@cache
def everything() -> tuple[str, ...]:
    """Shortest spellings. A composite is legal if every two of its names are: no rule looks at three."""
    found = set()
    for structure in registry.names("structure"):
        able = [[None, *(n for n in registry.names(a) if legal(f"{structure}+{n}"))] for a in registry.PARTS]
        for choice in itertools.product(*able):
            parts = [n for n in choice if n]
            if all(legal(f"{structure}+{p}+{q}") for p, q in itertools.combinations(parts, 2)):
                found.add(registry.spell(registry.config("+".join([structure, *parts]))))
    return tuple(sorted(found, key=lambda s: (s.count("+"), s)))


def sized(least: int, most: int) -> list[str]:
    return [s for s in everything() if least <= s.count("+") + 1 <= most]


def cases() -> list:
    """Singles, pairs and a sample of what is larger; the rest is slow."""
    larger = sized(3, 99)
    sample = set(random.Random(0).sample(larger, min(TRIPLES, len(larger))))
    slow = [pytest.param(s, marks=pytest.mark.slow) for s in larger if s not in sample]
    return [*sized(1, 2), *sorted(sample), *slow]
