"""A task that takes milliseconds: which of three letters stands in a line most often. For tests and first tries."""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np

from . import register_task
from .reading import Raw
from .text import Text

CLASSES = {"red": "r", "green": "g", "blue": "b"}


@register_task("toy")
class Toy(Text):
    """320 generated lines of single letters, the same on every machine."""

    @dataclass
    class Config(Text.Config):
        kind: str = "toy"
        source: str = "lorafactory:toy"
        selection_split: str = "validation"
        max_length: int = 16

    def read(self) -> dict[str, Raw]:
        return {split: _lines(split, size, i) for i, (split, size) in enumerate(SIZES.items())}


SIZES = {"train": 200, "validation": 60, "test": 60}


def _lines(split: str, size: int, seed: int) -> Raw:
    rng = np.random.default_rng([0, seed])
    noise = [c for c in string.ascii_lowercase if c not in CLASSES.values()]
    labels = [list(CLASSES)[i % len(CLASSES)] for i in range(size)]
    texts = []
    for label in labels:
        line = [CLASSES[label]] * 4 + list(rng.choice(list(CLASSES.values()), 2)) + list(rng.choice(noise, 4))
        texts.append((" ".join(rng.permutation(line)),))
    return Raw(texts, labels, [f"{split} row {i}" for i in range(size)])
