"""Every legal composite, smallest first, and which of them `make test` runs."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest

from lorafactory import UserError, registry

TRIPLES = 24  # of three names, in `make test`
LARGER = 40  # of four names and of five, in `make test-all`


@cache
def legal(spelling: str) -> bool:
    try:
        registry.config(spelling)
        return True
    except UserError:
        return False


@cache
def parts_of(structure: str) -> tuple[tuple[str, str], ...]:
    """(axis, name) of each part that the structure admits alone."""
    return tuple((a, n) for a in registry.PARTS for n in registry.names(a) if legal(f"{structure}+{n}"))


@cache
def of(size: int) -> tuple[str, ...]:
    """Shortest spellings of so many names. A composite is legal if every two of its names are: no rule looks at three."""
    found = set()
    implied = {registry.parse(n)[0].name for n in registry.names() if registry.get(n).axis != "structure"}
    for structure in registry.names("structure"):
        for count in (size - 1, size) if structure in implied else (size - 1,):  # `lora+pissa` is `pissa`
            for choice in itertools.combinations(parts_of(structure), count):
                if len({axis for axis, _ in choice}) < count:
                    continue
                names = [n for _, n in choice]
                if all(legal(f"{structure}+{p}+{q}") for p, q in itertools.combinations(names, 2)):
                    spelling = registry.spell(registry.config("+".join([structure, *names])))
                    if spelling.count("+") + 1 == size:
                        found.add(spelling)
    return tuple(sorted(found))


@cache
def sampled(size: int, count: int) -> tuple[str, ...]:
    """A seeded sample of larger composites, of which there are too many to list: each grows part by part."""
    draw, found = random.Random(size), set()
    structures = [s for s in registry.names("structure") if len({a for a, _ in parts_of(s)}) >= size - 1]
    while len(found) < count:
        structure, names, axes = draw.choice(structures), [], set()
        for axis, name in draw.sample(parts_of(structure), len(parts_of(structure))):
            if axis not in axes and all(legal(f"{structure}+{name}+{n}") for n in names):
                names, axes = [*names, name], {axis, *axes}
            if len(names) == size:
                break
        spelling = registry.spell(registry.config("+".join([structure, *sorted(names)])))
        if spelling.count("+") + 1 >= size:
            found.add(spelling)
    return tuple(sorted(found))


def sized(least: int, most: int) -> list[str]:
    return [s for size in range(least, most + 1) for s in of(size)]


def cases() -> list:
    """Singles, pairs and a sample of triples; the other triples and a sample of what is larger are slow."""
    some = set(random.Random(0).sample(of(3), TRIPLES))
    slow = [s for s in of(3) if s not in some] + [s for size in (4, 5) for s in sampled(size, LARGER)]
    return [*sized(1, 2), *sorted(some), *(pytest.param(s, marks=pytest.mark.slow) for s in slow)]
